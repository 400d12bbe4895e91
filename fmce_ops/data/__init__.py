"""Images: prepared once into one file, read back, and made into batches."""

from fmce_ops.data.batches import Augment, TrainBatches, augment, epoch_order, to_input
from fmce_ops.data.images import Images, ImagesSummary
from fmce_ops.data.pictures import read_picture, read_pictures
from fmce_ops.data.prepare import prepare
from fmce_ops.data.seeds import derive_seed, generator

__all__ = [
    "Augment",
    "Images",
    "ImagesSummary",
    "TrainBatches",
    "augment",
    "derive_seed",
    "epoch_order",
    "generator",
    "prepare",
    "read_picture",
    "read_pictures",
    "to_input",
]
