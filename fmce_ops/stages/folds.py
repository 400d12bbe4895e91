"""The folds of ``posttrain``: logits of every training image by a network that never saw it."""

from dataclasses import replace

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fmce_ops.data import Images, generator, to_input
from fmce_ops.models import load_into
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import Stage
from fmce_ops.stages.train import training_batches, training_plan, validation
from fmce_ops.training.classifier import point_file, train_classifier

_APART = 1000  # of the folds' seeds from train.seed: no checkpoint's start is likely to be theirs


def fold_logits(fabric: Fabric, stage: Stage, params: Params, images: Images) -> Tensor:
    """Train a network for each fold as the stage ``train`` does, on the images outside the fold.

    A stage that was killed goes on in the fold where it was and ends with the same bytes.

    Returns
    -------
    (N, K) float32 on the CPU, of all training images.
    """
    fold = draw_folds(images.counts["train"], params.posttrain.folds, params.train.seed)
    logits = torch.empty(len(fold), len(images.classes))
    for number in range(params.posttrain.folds):
        network = _train(fabric, stage, params, images, number, (fold != number).nonzero()[:, 0])
        rows = (fold == number).nonzero()[:, 0]
        logits[rows] = _logits(fabric, network, params, images, rows)
    return logits


def draw_folds(count: int, folds: int, seed: int) -> Tensor:
    """(count,) int64, the fold of each image; the sizes of two folds differ by one at most."""
    return torch.randperm(count, generator=generator(seed)) % folds


def _train(
    fabric: Fabric, stage: Stage, params: Params, images: Images, number: int, rows: Tensor
) -> nn.Module:
    """The network of fold ``number``, trained on the images at ``rows``."""
    own = _with_seed(params, params.train.seed + _APART + number)
    network = build_classifier(own, len(images.classes))
    plan = replace(training_plan(own), points_per_epoch=1)  # the last alone is read
    folder = stage.folder / f"fold-{number}"
    folder.mkdir(exist_ok=True)
    with stage.beneath(f"fold {number}", {"fmce.stage": f"{stage.name}-fold"}) as reporter:
        train_classifier(
            fabric,
            network,
            training_batches(fabric, images, own, rows),
            validation(fabric, images, own),
            plan,
            folder,
            reporter,
        )
    fabric.barrier()
    # Statistics of batch norm are each process's own until all read those that were recorded.
    load_into(network, point_file(folder, plan.points))
    if fabric.is_global_zero:
        for point in range(1, plan.points):
            point_file(folder, point).unlink(missing_ok=True)
    return network.eval()


def _with_seed(params: Params, seed: int) -> Params:
    return params.model_copy(update={"train": params.train.model_copy(update={"seed": seed})})


@torch.inference_mode()
def _logits(
    fabric: Fabric, network: nn.Module, params: Params, images: Images, rows: Tensor
) -> Tensor:
    """(n, K) float32 on the CPU, of the training images at ``rows`` (n,)."""
    pixels, _ = images.load("train")
    parts = []
    for some in rows.split(params.posttrain.batch_size):
        inputs = to_input(
            fabric.to_device(pixels[some]),
            size=params.data.image_size,
            mean=images.mean,
            std=images.std,
        )
        parts.append(network(inputs).float().cpu())
    return torch.cat(parts)
