"""Reading a safetensors file with every fault of its header listed, before a single tensor is made."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

# Bytes per element of the safetensors types.
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors library itself
LFS = b"version https://git-lfs"


class Entry(NamedTuple):
    """Where one tensor lies: from byte `start` to byte `end` of the data behind the header."""

    key: str
    start: int
    end: int


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, faults) of a safetensors file. The tensors stand in memory of their own, whatever becomes of the file.

    A header that does not fit the file's size is found out before anything is allocated for tensors.
    """
    from safetensors.torch import load

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            fault = _opening_fault(path.name, head, size)
            if fault:
                return {}, [fault]
            (length,) = struct.unpack("<Q", head)
            raw = file.read(length)
            faults = _header_faults(path.name, raw, size - 8 - length)
            if faults:
                return {}, faults
            file.seek(0)
            tensors = load(file.read(size))
            return dict(sorted(tensors.items())), []  # the library gives them in another order each time
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return {}, [f"{path.name}: cannot be read ({error})"]


def _opening_fault(name: str, head: bytes, size: int) -> str | None:
    """What is wrong where the first eight bytes cannot be the length of a header."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
    if length is not None and length <= min(MAX_HEADER, size - 8):
        return None
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return f"{name}: this is a pickle with another ending; pickles can run code and are refused"
    if head.lstrip()[:1] == b"<" or (head and LFS.startswith(head)):
        return f"{name}: this is text (a web page or a Git LFS pointer), not tensors: download the file itself"
    if length is None:
        return f"{name}: {size} bytes are too few for a safetensors file: it is truncated or empty"
    return f"{name}: its header claims {length:,} bytes and the file has {size:,}: truncated, or no safetensors file"


def _header_faults(name: str, raw: bytes, room: int) -> list[str]:
    """Every fault of a header. room: bytes of data behind it."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                twice.append(key)
            found[key] = value
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=collect, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return [f"{name}: its header is no JSON ({error}): the file is damaged"]
    if not isinstance(header, dict):
        return [f"{name}: its header is no JSON object: the file is damaged"]
    faults = [f"{name}: {_shown(key)}: stands twice in the header" for key in twice]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append(f"{name}: the header's __metadata__ must map names to texts")
    if not header:
        faults.append(f"{name}: holds no tensor")
    return faults + _entry_faults(name, header, room)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _entry_faults(name: str, header: Mapping[str, Any], room: int) -> list[str]:
    faults: list[str] = []
    entries: list[Entry] = []
    for key, value in header.items():
        checked = _entry(key, value, room)
        if isinstance(checked, Entry):
            entries.append(checked)
        else:
            faults.append(f"{name}: {_shown(key)}: {checked}")
    return faults + _layout_faults(name, entries, room, complete=not faults)


def _entry(key: str, value: Any, room: int) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not key.isprintable():
        return "its name holds characters that cannot be printed"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "its header entry must give dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return "its shape and its two offsets must be whole numbers of at least 0"
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        return f"unknown type {_shown(str(dtype))}"
    start, end = offsets
    if end - start != prod(shape) * WIDTHS[dtype]:
        return f"its offsets give it {end - start} bytes, but {dtype} {shape} takes {prod(shape) * WIDTHS[dtype]}"
    if end > room:
        return f"ends at byte {end:,} of {room:,}: the file is truncated"
    return Entry(key, start, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _layout_faults(name: str, entries: list[Entry], room: int, *, complete: bool) -> list[str]:
    """Tensors that overlap, and, where every entry is known, bytes that belong to none (room for something hidden)."""
    faults: list[str] = []
    position, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start < position:
            faults.append(f"{name}: {entry.key}: overlaps with {before}")
        elif entry.start > position and complete:
            faults.append(f"{name}: {entry.start - position:,} bytes before {entry.key} belong to no tensor")
        if entry.end > position:
            position, before = entry.end, entry.key
    if complete and position < room:
        faults.append(f"{name}: {room - position:,} bytes after the last tensor belong to none")
    return faults


def _shown(text: str) -> str:
    """A name from the file, safe to print."""
    short = text if len(text) <= 120 else text[:120] + "..."
    return short if short.isprintable() else repr(short)
