"""Feature maps on disk: HDF5 shards that a manifest vouches for, written and read in a stream."""

from fmce_ops.shards.manifest import Manifest, Shard, shard_file
from fmce_ops.shards.writer import ShardWriter, existing

__all__ = ["Manifest", "Shard", "ShardWriter", "existing", "shard_file"]
