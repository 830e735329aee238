"""The cache of models: where it lies, how a folder gets into it whole or not at all, and how it is checked.

<cache>/models/<packaged name>/      a transformers folder + lorakit-model.json (the manifest)
<cache>/gguf/<stem>-<hash>/          a user's .gguf, converted
<cache>/wheels/                      wheels put there by hand, used instead of a download
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import ModelError

MANIFEST = "lorakit-model.json"


def cache_folder() -> Path:
    """`$LORAKIT_CACHE`, else `$XDG_CACHE_HOME/lorakit`, else `~/.cache/lorakit`. It need not exist yet."""
    own, shared = os.environ.get("LORAKIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "lorakit"


def sha256(path: Path) -> str:
    """The hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_cached(folder: Path) -> bool:
    """True where a finished folder stands: the manifest arrives with the rename, so it is never there half-made."""
    return (folder / MANIFEST).is_file()


def verify_folder(folder: Path) -> None:
    """Hold every file of a cached folder against its manifest, size and sha256 (about 1 s a GB).

    Raises ModelError that names each damaged or missing file and the folder to delete.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        faults = [fault for name, known in files.items() if (fault := _fault(folder / name, known))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        faults = [f"{MANIFEST} cannot be read ({error})"]
    if faults:
        raise ModelError(
            f"the cached model in {folder} is damaged: {'; '.join(faults)}. "
            "Delete that folder and run the same command again: the model is then fetched anew."
        )


def _fault(path: Path, known: dict[str, object]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != known["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, expected {known['bytes']}"
    if (found := sha256(path)) != known["sha256"]:
        return f"{path.name} has sha256 {found}, expected {known['sha256']}"
    return None


def write_manifest(folder: Path, origin: dict[str, str]) -> None:
    """Record size and sha256 of every file in `folder`, and where the model came from."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2), encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path | None]:
    """Yield a temporary folder to fill; at a clean exit it becomes `folder` by one rename, else it is removed.

    One process at a time works on a folder. Yields None where another one finished it while this one waited.
    Raises ModelError when the cache cannot be written or its disk is full.
    """
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if is_cached(folder):
                yield None
                return
            yield from _fill(folder)
    except OSError as error:
        raise ModelError(
            f"the model cache at {folder.parent} cannot be written ({error}). "
            "Free space there, or set LORAKIT_CACHE to a folder with room that you may write."
        ) from error


def _fill(folder: Path) -> Iterator[Path]:
    prefix = f".{folder.name}.part-"
    for stale in folder.parent.glob(f"{prefix}*"):  # left by a killed process: we hold the lock, so nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        raise ModelError(
            f"{folder} exists but is no finished model (no {MANIFEST}). Move or delete it and run the command again."
        )
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield work
        _sync(work)
        work.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a shared cache
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush the files to disk before the rename, so that a power cut leaves no empty file under a finished name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
