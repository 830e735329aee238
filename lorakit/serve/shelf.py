"""The adapters of one server: what a name means now, loaded; publishing, rolling back, taking out of service."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from lorakit.errors import AdapterLoadingError, FileError, LorakitError, UnknownAdapterError, UsageError
from lorakit.serve.bank import Bank, Version
from lorakit.serve.names import is_name, shown
from lorakit.serve.registry import Registry, Release
from lorakit.serve.residents import Residents

log = logging.getLogger("lorakit.serve")
T = TypeVar("T")
RETRIES = 3
BASES_NAME = "the base's own name: requests for it reach the base, never this adapter. Publish it under another name."
PIN_SECONDS = 2.0  # that a pin of the start waits for room which requests hold; what is not pinned waits for none


@dataclass(frozen=True)
class AdapterInfo:
    """A name of the registry. state: "ready", "loading", "absent" (loads with its first request), "refused" or "unloaded".

    tier: "disk", "memory" or "device", None where it is not loaded. served: requests since the start. reason: why it was refused.
    """

    name: str
    hash: str
    state: str
    rank: int | None
    bytes: int | None
    task: str | None
    tier: str | None
    pinned: bool
    served: int
    versions: tuple[str, ...]
    aliases: tuple[str, ...]
    reason: str | None


class Shelf:
    """A registry over a bank. Its methods may be called from any thread.

    model_name: what requests call the base. warm: load every adapter in service now, in the background.
    """

    def __init__(self, registry: Registry, bank: Bank, model_name: str, *, warm: bool) -> None:
        self.registry, self.bank, self.model_name = registry, bank, model_name
        self.residents = Residents(bank)
        self.warmed = not warm
        self._served: Counter[str] = Counter()
        self._served_lock = threading.Lock()
        if model_name in {**registry.entries(), **registry.aliases()}:  # from the time when it served another base
            registry.refused[model_name] = BASES_NAME
        for name, reason in registry.refused.items():
            log.warning("the adapter in %s was not taken in: %s", ascii(name), ascii(reason))
        if warm:
            self.residents.warm(self._to_warm(), self._end_warming)

    # -- what a name means

    def find(self, reference: str | None, *, wait: bool) -> Version | None:
        """The bank's version of "name", "name@hash" or an alias; None for the base (None, or its name).

        wait: for its load; else AdapterLoadingError is raised while it loads. It is raised too where it cannot be loaded now
        (the memory is held, say). Raises UnknownAdapterError, and FileError for an adapter that was refused.
        """
        return self._named(reference, wait=wait)[1]

    def name_of(self, reference: str | None) -> str | None:
        """The adapter's own name; None for the base."""
        release = self._release(reference)
        return None if release is None else release.name

    def with_version(
        self, reference: str | None, call: Callable[[Version | None], T], *, wait: bool
    ) -> tuple[str | None, Version | None, T]:
        """(name, version, what `call` gives for it). Looked up, and called, again where the version was let go of in between."""
        for _ in range(RETRIES):
            name, version = self._named(reference, wait=wait)
            try:
                return name, version, call(version)
            except UnknownAdapterError:
                continue
        raise AdapterLoadingError(f"adapter {shown(reference)} changes too fast: ask again in a moment.")

    def count(self, version: Version | None, requests: int = 1) -> None:
        """Note requests that an adapter has taken."""
        if version is not None:
            with self._served_lock:
                self._served[version.hash] += requests

    # -- the adapters

    def publish(self, name: str, folder: str | Path) -> str:
        """Take an adapter's or a run's folder in as a new version of `name`; returns its hash.

        It is loaded before the name leads to it, so nothing that does not fit is admitted and no request waits; requests
        that run finish on the version before. Raises FileError, UsageError, OutputError.
        """
        self._check_free(name)
        return self._changed(self.registry.publish(name, folder, self._bring))

    def publish_loose(self, name: str, folder: str) -> str:
        """The same of a folder that lies in the registry's own, by its name."""
        self._check_free(name)
        return self._changed(self.registry.publish_loose(name, folder, self._bring))

    def roll_back(self, name: str, version: str | None = None) -> str:
        """Let `name` answer with the version before the current one, or with the given one (its hash); returns its hash.

        It is loaded before the name leads to it. Raises UnknownAdapterError, UsageError (there is none before), FileError.
        """
        return self._changed(self.registry.roll_back(name, version, self._bring))

    def unload(self, name: str) -> None:
        """Take a name out of service, for good; requests that run finish."""
        self.registry.put_in_service(name, False)
        self._tidy()

    def load(self, name: str) -> str:
        """Put a name into service again, loaded; returns its hash."""
        self.registry.put_in_service(name, True)
        return self._changed(self.registry.resolve(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a name's current version, and those to come, in memory (or no more); of a name out of service, once it is back.

        Where its version cannot be loaded or held, nothing has changed. Raises as `find`, and ServeError (no room).
        """
        before = self.registry.pin(name, pinned)
        if not pinned:
            return self._tidy()
        if before.loaded:
            try:
                self.with_version(name, self._hold_pinned, wait=True)
            except BaseException:
                self.registry.pin(name, before.pinned)
                raise

    def alias(self, alias: str, target: str) -> str:
        """Let `alias` stand for a name, or for one version of it ("name@hash"); returns what it stands for, in full."""
        self._check_free(alias)
        found = self.registry.alias(alias, target)
        self._tidy()
        return found

    def drop_alias(self, alias: str) -> None:
        self.registry.drop_alias(alias)
        self._tidy()

    def adapters(self) -> list[AdapterInfo]:
        """Every name of the registry."""
        resident = {one.version.hash: one for one in self.bank.resident()}
        aliases = self.registry.aliases()
        found = []
        for name, entry in self.registry.entries().items():
            digest = f"sha256:{entry.current}"
            one = resident.get(digest)
            found.append(
                AdapterInfo(
                    name=name,
                    hash=digest,
                    state=self._state(name, digest) if entry.loaded else "unloaded",
                    rank=one.version.rank if one else None,
                    bytes=one.version.bytes if one else None,
                    task=one.version.task if one else None,
                    tier=one.tier if one else None,
                    pinned=entry.pinned,
                    served=self._served[digest],
                    versions=tuple(f"sha256:{version}" for version in entry.versions),
                    aliases=tuple(alias for alias, target in aliases.items() if target.partition("@")[0] == name),
                    reason=BASES_NAME if name == self.model_name else self.residents.reason(digest),
                )
            )
        return found

    def in_service(self) -> list[tuple[str, Release, float]]:
        """(name or alias, what answers for it, when that was published) of all adapters that requests may name."""
        entries = self.registry.entries()
        found = []
        for name in sorted({*entries, *self.registry.aliases()} - {self.model_name}):
            try:
                release = self.registry.resolve(name)
            except (UnknownAdapterError, FileError):
                continue  # out of service, or its folder has become a link: requests for it are told
            digits = release.folder.name
            times = [event.at for event in entries[release.name].history if event.version == digits]
            found.append((name, release, times[-1] if times else 0.0))
        return found

    def close(self) -> None:
        """End loading."""
        self.residents.close()

    # -- inside

    def _release(self, reference: str | None) -> Release | None:
        return None if reference is None or reference == self.model_name else self.registry.resolve(reference)

    def _named(self, reference: str | None, *, wait: bool) -> tuple[str | None, Version | None]:
        """(name, version) of one look at the registry."""
        release = self._release(reference)
        if release is None:
            return None, None
        return release.name, self.residents.wait(release) if wait else self.residents.get(release)

    def _check_free(self, name: str) -> None:
        if name == self.model_name and is_name(name):
            raise UsageError(f"{name!r} is the base's own name: requests for it would not reach the adapter.")

    def _state(self, name: str, digest: str) -> str:
        return "refused" if name == self.model_name else self.residents.presence(digest)

    def _bring(self, release: Release) -> None:
        self.residents.again(release)

    def _changed(self, release: Release) -> str:
        """After a name's version changed: have it loaded and pinned as the one before, let go of what nothing leads to."""
        version = self.residents.again(release)
        if self.registry.entries()[release.name].pinned:
            self.bank.pin(version)
        self._tidy()
        return release.hash

    def _hold_pinned(self, version: Version | None) -> None:
        if version is not None:
            self.bank.pin(version)

    def _tidy(self) -> None:
        """Keep what a name or an alias leads to, and the version before each: rolling back is then immediate."""
        kept: set[str] = set()
        for entry in self.registry.entries().values():
            if entry.loaded:
                kept |= {entry.current, entry.before or entry.current}
        for alias in self.registry.aliases():
            try:
                kept.add(self.registry.resolve(alias).hash.removeprefix("sha256:"))
            except (UnknownAdapterError, FileError):
                continue  # its name is out of service, or its folder leads out of the registry
        self.residents.keep({f"sha256:{digits}" for digits in kept})
        pinned = {f"sha256:{entry.current}" for entry in self.registry.entries().values() if entry.pinned}
        for one in self.bank.resident():
            if one.pinned and one.version.hash not in pinned:  # a version that its name leads to no more
                self.bank.unpin(one.version)

    def _to_warm(self) -> list[Callable[[], None]]:
        """To load what names lead to, pinned ones first."""
        entries = self.registry.entries().items()
        order = sorted((not entry.pinned, name) for name, entry in entries if entry.loaded and name != self.model_name)
        return [partial(self._warm, name) for _, name in order]

    def _warm(self, name: str) -> None:
        """Load, and pin, what a name leads to now; what does not succeed is logged, and does not keep the others from it."""
        try:
            pinned = self.registry.entries()[name].pinned
            version = self.residents.wait(self.registry.resolve(name), patience=PIN_SECONDS if pinned else 0.0)
            if pinned:
                self.bank.acquire(version, patience=PIN_SECONDS)
                try:
                    self.bank.pin(version)
                finally:
                    self.bank.release(version)
        except Exception as error:
            if not self.residents.closed:
                fault = None if isinstance(error, LorakitError) else error
                log.warning("adapter %s was not made ready at the start: %s", name, ascii(str(error)), exc_info=fault)

    def _end_warming(self) -> None:
        self.warmed = True
