"""Feature maps on disk: HDF5 shards that a manifest vouches for, written and read in a stream."""

from fmce_ops.shards.batches import Batch, RandomBatches
from fmce_ops.shards.codes import write_codes
from fmce_ops.shards.describe import Description, PhaseSize, describe
from fmce_ops.shards.manifest import Manifest, Shard, shard_file
from fmce_ops.shards.split import Split, split_by_image, split_paper
from fmce_ops.shards.store import ShardStore
from fmce_ops.shards.vouch import Report, verify
from fmce_ops.shards.writer import ShardWriter, existing

__all__ = [
    "Batch",
    "Description",
    "Manifest",
    "PhaseSize",
    "RandomBatches",
    "Report",
    "Shard",
    "ShardStore",
    "ShardWriter",
    "Split",
    "describe",
    "existing",
    "shard_file",
    "split_by_image",
    "split_paper",
    "verify",
    "write_codes",
]
