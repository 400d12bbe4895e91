"""Safetensors on torch alone, for machines that have no library for it.

A file is the length of its header (8 bytes, little-endian), the header (JSON: of each tensor its
type, shape, and where it lies), and the tensors' bytes, one behind the other.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH = 8  # bytes of the header's length; the header's own length is a multiple of it
_WORDS = "__metadata__"
_TYPES = {  # in the order in which the library writes them
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(tensors: dict[str, Tensor], words: dict[str, str]) -> bytes:
    """The file that holds contiguous tensors on the CPU, and words about them.

    Raises
    ------
    ValueError
        A tensor is of a type that is not in the table above.
    """
    header: dict[str, Any] = {_WORDS: words}
    parts, end = list[bytes](), 0
    kinds, dtypes = list(_TYPES), list(_TYPES.values())
    for place, name in sorted((dtypes.index(tensors[name].dtype), name) for name in tensors):
        parts.append(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
        start, end = end, end + len(parts[-1])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": kinds[place], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *parts])


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the words about them; ValueError of a damaged one."""
    content = bytearray(path.read_bytes())
    begin = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    if not _LENGTH < begin <= len(content):
        raise ValueError("its header does not fit into it")
    try:
        header = json.loads(content[_LENGTH:begin])
        words = header.pop(_WORDS, {})
        if not all(isinstance(word, str) for word in words.values()):
            raise ValueError("its words are none")
        data = torch.frombuffer(content, dtype=torch.uint8)[begin:]
        return _tensors(header, data), words
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError) as error:
        raise ValueError("its header does not describe tensors") from error


def _tensors(header: dict[str, Any], data: Tensor) -> dict[str, Tensor]:
    """What the header tells of, cut from bytes that it must account for to the last."""
    tensors, end = dict[str, Tensor](), 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [start, end] or end > len(data):
            raise ValueError(f"{name} does not lie where its header has it")
        tensors[name] = data[start:end].clone().view(dtype).view(shape)
    if end != len(data):
        raise ValueError("its header does not account for all of it")
    return tensors
