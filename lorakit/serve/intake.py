"""Taking an adapter's files into the registry: bounded, from plain files only, checked as a whole before they count."""

import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import FileError, OutputError
from lorakit.serve.patterns import Tried
from lorakit.store.layout import EXTRA, TENSORS
from lorakit.store.layouts import read
from lorakit.store.peft_config import CONFIG

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class AdapterBounds:
    """What an adapter may be at most. Checked on the header's numbers, before anything is allocated for them."""

    tensor_bytes: int = 4 << 30
    """Bytes of the safetensors file."""
    header_bytes: int = 8 << 20
    """Bytes of its header: parsed as JSON they take some twenty times as many."""
    json_bytes: int = 8 << 20
    """Bytes of each JSON file beside it."""
    rank: int = 4096
    """The largest rank of a pair (of a stack of experts: of all together)."""


def files_of(folder: Path) -> Path:
    """Where the adapter of `folder` lies: in it, or in `adapter/` of a run's folder."""
    return folder / "adapter" if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).exists() else folder


def copy_files(source: Path, stage: Path, bounds: AdapterBounds, *, within: Path | None) -> None:
    """Copy what an adapter consists of from `source` to the new folder `stage`, flushed to the disk.

    within: the folder that nothing may lead out of; links are then refused altogether. None: a folder that the operator
    named; links in it (a hub's cache has them) are followed to plain files.
    Raises FileError (missing, too large, a link, no plain file) and OutputError.
    """
    faults: list[str] = []
    limits = {CONFIG: bounds.json_bytes, TENSORS: bounds.tensor_bytes, EXTRA: bounds.json_bytes}
    try:
        stage.mkdir()
        for name, most in limits.items():
            fault = _copy(source, name, stage / name, most, within)
            if fault and not (name == EXTRA and fault == "not there"):
                faults.append(f"{name}: {fault}")
        _flush(stage)
    except OSError as error:
        raise OutputError(
            f"cannot write {stage}: {error.strerror or error}. The registry is as it was before."
        ) from error
    if faults:
        raise FileError(f"the adapter in {source} cannot be taken in:", faults)


def check_files(stage: Path, bounds: AdapterBounds) -> str:
    """The digits of the hash of an adapter's folder. Raises FileError with every fault."""
    fault = _header_fault(stage / TENSORS, bounds)
    if fault:
        raise FileError("the adapter cannot be taken in:", [f"{TENSORS}: {fault}"])
    Tried().check(stage)
    found = read(stage)
    if found.faults:
        raise FileError("the adapter cannot be taken in:", found.faults)
    return found.identity().removeprefix("sha256:")


def _copy(source: Path, name: str, target: Path, most: int, within: Path | None) -> str | None:
    """What is wrong with a file; None where it is copied."""
    opened = _open(source, name, within)
    if isinstance(opened, str):
        return opened
    with os.fdopen(opened, "rb") as file:
        mode = os.fstat(file.fileno())
        if not stat.S_ISREG(mode.st_mode):
            return "expected a plain file"
        if mode.st_size > most:
            return f"{mode.st_size:,} bytes, and at most {most:,} are taken"
        with open(target, "xb") as copy:
            left = most
            while chunk := file.read(min(CHUNK, left + 1)):  # it may grow while it is read
                left -= len(chunk)
                if left < 0:
                    return f"more than {most:,} bytes"
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
    return None


def _open(source: Path, name: str, within: Path | None) -> int | str:
    """A descriptor of a file, or what is wrong with it. Inside `within` every step is opened without following a link."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not make the server wait
    try:
        if within is None:
            return os.open(source / name, flags)
        handle = os.open(within, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        folders = source.relative_to(within).parts
        for part, kind in (*((folder, os.O_DIRECTORY) for folder in folders), (name, 0)):
            try:
                step = os.open(part, flags | os.O_NOFOLLOW | kind, dir_fd=handle)
            finally:
                os.close(handle)
            handle = step
        return handle
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return f"cannot be opened ({error.strerror}); links are not followed" if within else f"{error.strerror}"


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header_fault(path: Path, bounds: AdapterBounds) -> str | None:
    """What of a header goes beyond the bounds. Other faults are left to the reading itself, which lists them all."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length > os.fstat(file.fileno()).st_size:
            return None
        if length > bounds.header_bytes:
            return f"its header has {length:,} bytes, and at most {bounds.header_bytes:,} are taken"
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    ranks = {key: _rank(key, entry) for key, entry in header.items()} if isinstance(header, dict) else {}
    wide = [f"{key[:120]!r} has rank {rank:,}" for key, rank in ranks.items() if rank > bounds.rank]
    return f"{wide[0]}, and at most {bounds.rank:,} is taken" if wide else None


def _rank(key: str, entry: Any) -> int:
    """The rank of a tensor that is the first half of a pair; 0 for any other."""
    if not key.endswith(("lora_A.weight", "lora_embedding_A")) or not isinstance(entry, dict):
        return 0
    shape = entry.get("shape")
    return shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else 0
