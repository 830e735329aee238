"""One process at a time in a folder of runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import OutputError


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, made where it is not there: two of `what` ("comparison") in one would make each other's runs.

    Raises OutputError where another process holds it, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another {what} is at work in {folder}. Let it end, or choose another output.") from error
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to: {error.strerror or error}. Choose another output."
        ) from error
    try:
        yield
    finally:
        lock.release()
