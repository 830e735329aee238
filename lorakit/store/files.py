"""Writing files whole or not at all, one or several together."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakit.errors import OutputError, UsageError

Write = Callable[[Path], object]


def write_atomically(path: Path, write: Write) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to the disk, and put it in place in one step.

    Raises OutputError (disk full, no permission); what stood at `path` before is then still there, whole.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Write]) -> None:
    """Fill a temporary file beside each path, flush them all, and only then put them in place, in the order given.

    Raises OutputError (disk full, no permission). A disk that fills up is found out while the temporary files are
    written: what stood at the paths before is then still there, whole, and no temporary file is left.
    """
    staged: dict[Path, Path] = {}
    placed: list[str] = []
    path = next(iter(files))
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path] = _temporary(path)
            write(staged[path])
            _flush(staged[path])
        for path, temporary in staged.items():
            os.replace(temporary, path)
            placed.append(path.name)
        for folder in {path.parent for path in files}:
            _flush(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(_why(path, error, placed)) from error
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_files(paths: Iterable[Path]) -> None:
    """Remove the files of `paths` that are there. Raises OutputError where one cannot be removed."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot remove {path}, which is of another adapter: {error.strerror or error}."
            ) from error


def _temporary(path: Path) -> Path:
    """A new empty file beside `path`, with the permissions that any new file gets."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """`data`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically. Raises UsageError on what JSON cannot hold."""
    write_bytes(path, json_bytes(value, path.name))


def json_bytes(value: Any, what: str) -> bytes:
    """`value` as indented JSON. Raises UsageError on what JSON cannot hold: a number that is not finite, an object."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} takes texts, finite numbers, lists and mappings of them: {error}.") from error


def _why(path: Path, error: OSError | SafetensorError, placed: list[str]) -> str:
    number = error.errno if isinstance(error, OSError) else None
    full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "StorageFull" in str(error)
    state = (
        f"{', '.join(placed)} {'is' if len(placed) == 1 else 'are'} already in place, so the folder holds files of two saves."
        if placed
        else "What was there before is intact."
    )
    if full:
        return f"no space left on the disk while writing {path}. {state} Free some space and save again."
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"cannot write {path}: {reason}. {state} Choose a folder that can be written to."
