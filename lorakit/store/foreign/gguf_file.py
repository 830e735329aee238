"""Reading a GGUF file's tensors and settings, whatever is in it."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import FileError

HEAD = struct.Struct("<4sIQQ")  # magic, version, tensors, settings
LEAST = 12  # bytes that the shortest entry takes


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors with memory of their own, settings). Raises FileError where it is damaged or its tensors are quantised."""
    import gguf

    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD.size)
    counts = HEAD.unpack(head)[2:] if len(head) == HEAD.size else (size, size)
    if sum(counts) * LEAST > size:
        raise FileError(
            f"{path}: {size:,} bytes are too few for what its header announces: truncated, or no GGUF file."
        )
    try:
        reader = gguf.GGUFReader(path)
        settings = {name: field.contents() for name, field in reader.fields.items()}
        kinds = gguf.GGMLQuantizationType
        known = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
        faults = [f"{one.name}: {one.tensor_type.name}" for one in reader.tensors if one.tensor_type not in known]
        if faults:
            raise FileError(
                f"{path}: an adapter's tensors must be F32, F16 or BF16 to be carried over exactly:", faults
            )
        tensors = {str(one.name): _tensor(one, known[one.tensor_type]) for one in reader.tensors}
    except FileError:
        raise
    except Exception as error:  # the reader checks little: a damaged file ends in errors of any type
        raise FileError(f"{path} is damaged or truncated: no GGUF file can be read from it ({error}).") from error
    return tensors, settings


def _tensor(one: Any, dtype: torch.dtype) -> Tensor:
    shape = [int(width) for width in reversed(one.shape.tolist())]  # GGUF counts from the fastest dimension
    raw = torch.frombuffer(bytearray(one.data.tobytes()), dtype=dtype)
    return raw.reshape(shape)
