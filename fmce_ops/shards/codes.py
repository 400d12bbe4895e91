"""Path codes on disk: one HDF5 file, the same bytes for the same codes."""

import io
from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from fmce_ops.files import atomic


def write_codes(
    path: Path, codes: dict[str, Tensor], labels: Tensor, profiles: dict[str, Tensor]
) -> None:
    """Write, for each gated convolution, the gates (N, filters) of N images; and their labels.

    Gates are packed, eight to a byte, along the filters; the attribute ``filters`` says how many
    there are. ``numpy.unpackbits(..., axis=1, count=filters)`` brings them back. ``profiles`` are
    the shares (K, filters) of each class's images that open a filter, kept as they are.

    Raises
    ------
    DiskError
        ``path`` could not be written.
    """
    whole = io.BytesIO()  # HDF5 reports a full disk in ways that are hard to tell apart
    with h5py.File(whole, "w", libver=("v110", "v110")) as file:
        file.create_dataset("labels", data=labels.numpy(), track_times=False)
        gates = file.create_group("gates")
        for name, part in codes.items():
            packed = np.packbits(part.numpy(), axis=1)
            written = gates.create_dataset(name, data=packed, track_times=False)
            written.attrs["filters"] = part.shape[1]
        shares = file.create_group("profiles")
        for name, part in profiles.items():
            shares.create_dataset(name, data=part.numpy(), track_times=False)
    with atomic(path) as temporary:
        temporary.write_bytes(whole.getbuffer())
