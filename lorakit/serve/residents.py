"""Which versions of the registry the bank has: loaded off the serving thread, each once, in the order they are needed."""

import copy
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Literal, TypeGuard

from lorakit.errors import (
    AdapterError,
    AdapterLoadingError,
    FileError,
    LorakitError,
    ServeError,
    UsageError,
    WrongKindError,
)
from lorakit.serve.bank import Bank, Version
from lorakit.serve.registry import Release

log = logging.getLogger("lorakit.serve")
Presence = Literal["absent", "loading", "ready", "refused"]
LASTING = (FileError, UsageError, AdapterError, WrongKindError)
"""What tells of the adapter itself, and will be so again. All else (no room, a file that could not be read now) may be over
in a moment."""
PATIENCE = 10.0  # seconds that a load waits for room which requests hold
SOON = 2.0  # seconds after which to ask again for what could not be loaded


class Residents:
    """Releases by the hash of their content, as the bank's versions. Safe in any thread."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        self._loads: dict[str, Future[Version]] = {}
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="lorakit-load")
        self._closed = threading.Event()
        self._warming: threading.Thread | None = None

    def get(self, release: Release) -> Version:
        """The bank's version; begins to load it where nobody has.

        Raises AdapterLoadingError while it loads and where it could not be loaded now (the next call begins anew), and what
        the load raised where the adapter is refused.
        """
        load = self._started(release)
        if not load.done():
            raise AdapterLoadingError(f"adapter {release.name!r} is still loading: ask again in a moment.")
        return _outcome(release, load)

    def wait(self, release: Release, *, patience: float = PATIENCE) -> Version:
        """The bank's version, once it is loaded. Raises as `get` does when the load has ended.

        patience: seconds that a load which begins here waits for room.
        """
        return _outcome(release, self._started(release, patience))

    def again(self, release: Release) -> Version:
        """As `wait`; a version that was refused is tried once more."""
        with self._lock:
            load = self._loads.get(release.hash)
            if load is not None and _presence(load) == "refused":
                del self._loads[release.hash]
        return self.wait(release)

    def presence(self, digest: str) -> Presence:
        return _presence(self._loads.get(digest))

    def reason(self, digest: str) -> str | None:
        """Why a version was refused."""
        load = self._loads.get(digest)
        return str(load.exception()) if load is not None and _presence(load) == "refused" else None

    def found(self, digest: str) -> Version | None:
        """The bank's version of this hash, where it is loaded."""
        load = self._loads.get(digest)
        return load.result() if load is not None and _presence(load) == "ready" else None

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def warm(self, jobs: Iterable[Callable[[], None]], end: Callable[[], None]) -> None:
        """Do the jobs one after the other in a thread of their own: a request's own load never waits for more than one.

        end: called when all are done, or the server closes, or one raises.
        """
        queue = list(jobs)

        def work() -> None:
            try:
                for job in queue:
                    if self.closed:
                        return
                    job()
            finally:
                end()

        self._warming = threading.Thread(target=work, name="lorakit-warm", daemon=True)
        self._warming.start()

    def keep(self, hashes: set[str]) -> None:
        """Let the bank forget every version but these. Requests that run on one finish on it."""
        with self._lock:
            gone = [self._loads.pop(digest) for digest in set(self._loads) - hashes if self._loads[digest].done()]
        for load in gone:
            if _presence(load) == "ready":
                self._bank.unload(load.result())

    def stop(self) -> None:
        """Begin no more loads. Those that wait for room in the bank end when the bank is closed."""
        with self._lock:
            self._closed.set()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop, and wait for what is being loaded."""
        self.stop()
        self._workers.shutdown(wait=True)
        if self._warming is not None:
            self._warming.join()

    def _started(self, release: Release, patience: float = PATIENCE) -> Future[Version]:
        with self._lock:
            load = self._loads.get(release.hash)
            if load is None:
                if self.closed:
                    raise ServeError("this server is closed.")
                load = self._loads[release.hash] = self._workers.submit(self._load, release, patience)
            return load

    def _load(self, release: Release, patience: float) -> Version:
        """The version. A refusal is remembered; what may pass is forgotten before anyone is told, so that the next asks anew."""
        try:
            return self._admitted(release, patience)
        except BaseException as error:
            if not _lasting(error):
                with self._lock:
                    self._loads.pop(release.hash, None)
                if not self.closed:
                    log.warning(
                        "adapter %s could not be loaded now: %s", release.name, ascii(str(error) or repr(error))
                    )
                raise
            refusal = _bare(error)  # the error as it is holds the frames of the load, and with them the tensors
        raise refusal

    def _admitted(self, release: Release, patience: float) -> Version:
        version = self._bank.load(release.folder, release.name, patience=patience)
        if version.hash != release.hash:
            self._bank.unload(version)
            raise FileError(
                f"the files of adapter {release.name!r} in {release.folder} have changed: expected {release.hash}, came "
                f"{version.hash}. Publish it again."
            )
        return version


def _lasting(error: BaseException) -> TypeGuard[LorakitError]:
    """Whether an error tells of the adapter itself."""
    return isinstance(error, LASTING) and not (isinstance(error, FileError) and error.passing)


def _presence(load: Future[Version] | None) -> Presence:
    if load is None or load.cancelled():
        return "absent"
    return "loading" if not load.done() else "ready" if load.exception() is None else "refused"


def _outcome(release: Release, load: Future[Version]) -> Version:
    """What a load gave, once it is done. Every caller gets an error of its own: one that is shared gathers their frames."""
    try:
        error = load.exception()
    except CancelledError:
        raise ServeError("this server is closed.") from None
    if error is None:
        return load.result()
    if _lasting(error):
        raise _bare(error)
    message = f"adapter {release.name!r} could not be loaded now: ask again in a moment."
    if isinstance(error, LorakitError):
        message = f"{message} ({error})"
    raise AdapterLoadingError(message, retry_after=SOON)


def _bare(error: LorakitError) -> LorakitError:
    return copy.copy(error).with_traceback(None)
