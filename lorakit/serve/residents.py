"""Which versions of the registry the bank has: loaded off the serving thread, each once, in the order they are needed."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Literal

from lorakit.errors import AdapterLoadingError, FileError, LorakitError, ServeError
from lorakit.serve.bank import Bank, Version
from lorakit.serve.registry import Release

Presence = Literal["absent", "loading", "ready", "refused"]


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

        Raises AdapterLoadingError while it loads, and what the load raised where it failed.
        """
        load = self._started(release)
        if not load.done():
            raise AdapterLoadingError(f"adapter {release.name!r} is still loading: ask again in a moment.")
        return load.result()

    def wait(self, release: Release) -> Version:
        """The bank's version, once it is loaded. Raises what the load raised."""
        return self._started(release).result()

    def again(self, release: Release) -> Version:
        """As `wait`; a load that failed is tried once more."""
        if self.presence(release.hash) == "refused":
            with self._lock:
                self._loads.pop(release.hash, None)
        return self.wait(release)

    def presence(self, digest: str) -> Presence:
        load = self._loads.get(digest)
        if load is None:
            return "absent"
        return "loading" if not load.done() else "ready" if load.exception() is None else "refused"

    def reason(self, digest: str) -> str | None:
        """Why a version was refused."""
        return str(self._loads[digest].exception()) if self.presence(digest) == "refused" else None

    def found(self, digest: str) -> Version | None:
        """The bank's version of this hash, where it is loaded."""
        return self._loads[digest].result() if self.presence(digest) == "ready" else None

    def warm(self, releases: Iterable[Release], then: Callable[[], None]) -> None:
        """Load them one after the other in a thread of their own, so that a request's own load never waits for more than one."""
        queue = list(releases)

        def work() -> None:
            for release in queue:
                if self._closed.is_set():
                    return
                try:
                    self.wait(release)
                except (LorakitError, CancelledError):
                    continue  # presence and reason tell of it
            then()

        self._warming = threading.Thread(target=work, name="lorakit-warm", daemon=True)
        self._warming.start()

    def keep(self, hashes: set[str]) -> None:
        """Let the bank forget every version but these. Requests that run on one finish on it."""
        with self._lock:
            gone = [self._loads.pop(digest) for digest in set(self._loads) - hashes if self._loads[digest].done()]
        for load in gone:
            if load.exception() is None:
                self._bank.unload(load.result())

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        self._workers.shutdown(wait=True, cancel_futures=True)
        if self._warming is not None:
            self._warming.join()

    def _started(self, release: Release) -> Future[Version]:
        with self._lock:
            load = self._loads.get(release.hash)
            if load is None:
                if self._closed.is_set():
                    raise ServeError("this server is closed.")
                load = self._loads[release.hash] = self._workers.submit(self._load, release)
            return load

    def _load(self, release: Release) -> Version:
        version = self._bank.load(release.folder, release.name)
        if version.hash != release.hash:
            self._bank.unload(version)
            raise FileError(
                f"the files of adapter {release.name!r} in {release.folder} have changed: expected {release.hash}, came "
                f"{version.hash}. Publish it again."
            )
        return version
