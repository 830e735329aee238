"""Files of named tensors, by the ending that the user gave: .safetensors, or the pickles of old programs."""

import io
import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import OutputError
from lorakit.store.files import Write

PICKLES = (".bin", ".pt", ".pth")


def tensor_file(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, wrapper: str | None = None
) -> Write:
    """What fills `target`. wrapper: the key under which a pickle holds its tensors. Raises OutputError on another ending."""
    if target.suffix == ".safetensors":
        return partial(_fill_safetensors, tensors=dict(tensors), metadata={"format": "pt", **(metadata or {})})
    if target.suffix in PICKLES:
        return partial(_fill_pickle, content={wrapper: dict(tensors)} if wrapper else dict(tensors))
    raise OutputError(f"{target.name or target}: expected a file that ends in .safetensors, {' or '.join(PICKLES)}.")


def _fill_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    path.write_bytes(_in_order(save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata)))


def _in_order(data: bytes) -> bytes:
    """The same file with its header's metadata sorted: the library writes it in another order each time."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _fill_pickle(path: Path, content: object) -> None:
    buffer = io.BytesIO()  # torch.save writes a path's own name into the file
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())
