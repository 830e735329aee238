"""Writing files whole or not at all, and reading safetensors headers with every fault listed."""

import contextlib
import errno
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError

# Bytes per element of the safetensors types.
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors library itself


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to the disk, and put it in place in one step.

    Raises OutputError (disk full, no permission); what stood at `path` before is then still there, whole.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OutputError(_why(path, error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`data`, atomically."""
    write_atomically(path, lambda temporary: _fill(temporary, data))


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically. A number that is not finite is an error, not invalid JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk while writing {path}. What was there before is intact. Free some space and save again."
    return f"cannot write {path}: {error.strerror or error}. Choose a folder that can be written to."


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], list[str]]:
    """(tensors, metadata, faults) of a safetensors file, from its header alone; nothing is allocated for tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return {}, {}, [f"{path.name}: {size} bytes are too few for a safetensors file: it is truncated or empty"]
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER or length > size - 8:
            return {}, {}, [_not_safetensors(path, head, length, size)]
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, ValueError) as error:
        return {}, {}, [f"{path.name}: its header is no JSON ({error}): the file is damaged"]
    if not isinstance(header, dict):
        return {}, {}, [f"{path.name}: its header is no JSON object: the file is damaged"]
    metadata = header.pop("__metadata__", None) or {}
    tensors, faults = _entries(path.name, header, size - 8 - length)
    return tensors, metadata, faults


def _not_safetensors(path: Path, head: bytes, length: int, size: int) -> str:
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return f"{path.name}: this is a pickle with another ending; pickles can run code and are refused"
    if head.lstrip()[:1] in (b"<", b"v"):
        return f"{path.name}: this is text (a web page or a Git LFS pointer), not tensors: download the file itself"
    return (
        f"{path.name}: its header claims {length:,} bytes and the file has {size:,}: truncated, or no safetensors file"
    )


def _entries(name: str, header: Mapping[str, Any], room: int) -> tuple[dict[str, TensorEntry], list[str]]:
    tensors: dict[str, TensorEntry] = {}
    faults: list[str] = []
    for key, value in header.items():
        try:
            dtype, shape = value["dtype"], tuple(int(side) for side in value["shape"])
            start, end = (int(offset) for offset in value["data_offsets"])
        except (KeyError, TypeError, ValueError):
            faults.append(f"{name}: {key}: its header entry is malformed")
            continue
        if dtype not in WIDTHS or any(side < 0 for side in shape):
            faults.append(f"{name}: {key}: unknown type {dtype} or shape {list(shape)}")
        elif not 0 <= start <= end or end - start != prod(shape) * WIDTHS[dtype]:
            faults.append(f"{name}: {key}: {end - start} bytes for {dtype} {list(shape)}")
        elif end > room:
            faults.append(f"{name}: {key}: ends at byte {end:,} of {room:,}: the file is truncated")
        else:
            tensors[key] = TensorEntry(dtype, shape, start, end)
    return tensors, faults
