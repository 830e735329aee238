"""The adapters of one base: on disk, in memory, on the device; versions, leases, pins.

Each adapter that is loaded is a version with a number of its own, never used again: a second load under the same name
makes another, and requests that run on the first finish on it. In memory an adapter takes what its file takes. Those that no
request holds go, the longest unused first, when the memory's bound is reached, and are read again when they are asked for.
"""

import itertools
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit.attach.adapted import bare, wear
from lorakit.attach.anatomy import parameters_of
from lorakit.attach.host import KEY, Host, find_host
from lorakit.attach.site import Site
from lorakit.attach.slots import EMPTY
from lorakit.core.route import Live
from lorakit.errors import AdapterError, FileError, ServeError, UnknownAdapterError, UsageError
from lorakit.serve.places import Places
from lorakit.serve.rows import Rows
from lorakit.serve.take import Base, Taken, take

Tier = Literal["disk", "memory", "device"]


@dataclass(frozen=True)
class Version:
    """One loaded adapter.

    id: unique in this process, never used again; hash: "sha256:..." of its content; rank: its greatest; bytes: of its
    tensors in memory; task: PEFT's task_type, None where the file does not say; labels: names of its own head's classes,
    None where it has no head of its own.
    """

    id: int
    name: str
    hash: str
    rank: int
    bytes: int
    task: str | None
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Resident:
    """What the bank knows of a version at this moment. users: requests that hold it; uses: leases so far."""

    version: Version
    tier: Tier
    pinned: bool
    users: int
    uses: int
    folder: Path


@dataclass
class Entry:
    """A version's state. rows: None where it is on disk alone. reading: held by the thread that reads it again."""

    version: Version
    folder: Path
    check_base: bool
    rows: Rows | None
    pinned: bool = False
    users: int = 0
    uses: int = 0
    used: int = 0
    gone: bool = False
    reading: threading.Lock = field(default_factory=threading.Lock)


class Bank:
    """Thread safe. `with Bank(model) as bank:`, or `close`, gives the plain model back.

    memory: bytes that adapters may take in the host's memory; device_ranks: rows of each layer's stack, so the sum of the
    ranks of the adapters that run at once. Raises AdapterError where the model has adapters attached.
    """

    def __init__(self, model: Any, *, memory: int = 8 << 30, device_ranks: int = 1024) -> None:
        if memory < 1 or device_ranks < 1:
            raise UsageError(f"memory and device_ranks must be at least 1, not {memory} and {device_ranks}.")
        if find_host(model) is not None:
            raise AdapterError(
                "this model has adapters attached, and a bank brings its own. Save and detach them first, or give the bank a "
                "freshly loaded base."
            )
        self.model, self.memory = model, memory
        flags = [(f"{path}.{key}" if path else key, one) for path, key, one in parameters_of(model)]
        self.host = Host({full: parameter.requires_grad for full, parameter in flags})
        self.host.owner = "a serving bank"
        model.__dict__[KEY] = self.host
        for _, parameter in flags:
            parameter.requires_grad_(False)
        self.live = Live()
        self.base = Base(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.places = Places(self.live.stacks, self.host.leaves.__getitem__, dtype, device_ranks)
        self._entries: dict[int, Entry] = {}
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._numbers, self._clock = itertools.count(1), itertools.count(1)
        self._bytes = 0
        self._counts = {"loads": 0, "disk_reads": 0, "memory_hits": 0, "memory_evictions": 0}
        self._closed = False

    def __enter__(self) -> "Bank":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(self, folder: str | Path, name: str, *, check_base: bool = True, patience: float = 10.0) -> Version:
        """Read, check wholly and admit. No running request waits for it or is disturbed: call it off the serving thread.

        patience: seconds to wait for room where requests hold all of the memory; then ServeError.
        Raises FileError with every fault of the folder (shapes, unexpected tensors, another base), UsageError where the
        adapter has parts that rows of one batch cannot take, or a rank above device_ranks.
        """
        if not name or not isinstance(name, str):
            raise UsageError(f"an adapter's name is a non-empty string, not {name!r}.")
        taken = self._read(Path(folder), check_base)
        version = Version(
            next(self._numbers), name, taken.hash, taken.rows.rank, taken.rows.bytes(), taken.task, taken.labels
        )
        if version.rank > self.places.limit:
            raise UsageError(
                f"{name!r} has rank {version.rank}, above the {self.places.limit} that device_ranks allows."
            )
        with self._lock:
            self._check_open()
            self._make_room(version.bytes, patience)
            self._dress(taken.rows)
            self._entries[version.id] = Entry(version, Path(folder), check_base, taken.rows, used=next(self._clock))
            self._bytes += version.bytes
            self._counts["loads"] += 1
        return version

    def _read(self, folder: Path, check_base: bool) -> Taken:
        return take(folder, self.base, check_base=check_base, most=self.memory)

    def _dress(self, rows: Rows) -> None:
        """Have the layers that an adapter needs look at the bank's stacks. Theirs is the base's output until a plan says else."""
        host = self.host
        fresh = {path: self.base.modules[path] for path in rows.layers if path not in host.leaves}
        carried = next((path for path, leaf in fresh.items() if "_lk_site" in leaf.__dict__), None)
        if carried is not None:
            raise AdapterError(f"{carried} carries adapters that were attached through another module of this model.")
        for path, leaf in fresh.items():
            site = Site(path, None)
            site.switch((EMPTY,), self.live, host.epoch, torch.tensor(host.epoch, device="cpu"))
            host.leaves[path], host.sites[path] = leaf, site
            wear(leaf, site, frozenset())

    def _make_room(self, wanted: int, patience: float) -> None:
        """Let go of what no one holds, the longest unused first, until `wanted` bytes fit.

        patience: seconds to wait for requests to end where all is held.
        """
        patience = patience if wanted <= self.memory else 0.0
        if self._released.wait_for(lambda: self._room(wanted) or self._closed, patience) and not self._closed:
            return
        self._check_open()
        raise ServeError(
            f"the bank holds {self._bytes:,} of {self.memory:,} bytes in adapters that are pinned or in use, and {wanted:,} "
            "more do not fit. Unpin some, wait, or give the bank more memory."
        )

    def _room(self, wanted: int) -> bool:
        idle = [e for e in self._entries.values() if e.rows is not None and not e.users and not e.pinned]
        for entry in sorted(idle, key=lambda entry: entry.used):
            if self._bytes + wanted <= self.memory:
                break
            self._let_go(entry)
            self._counts["memory_evictions"] += 1
        return self._bytes + wanted <= self.memory

    def _let_go(self, entry: Entry) -> None:
        if entry.rows is not None:
            entry.rows = None
            self._bytes -= entry.version.bytes

    # -- use ---------------------------------------------------------------------------------------------------------

    def acquire(self, version: Version, *, patience: float = 60.0) -> None:
        """Hold a version in memory until `release`; reads it again where it was let go.

        patience: seconds to wait for room where requests hold all of the memory. Raises ServeError when they are over,
        UnknownAdapterError where it was unloaded, FileError where its folder has changed since.
        """
        if self.hold(version):
            return
        try:
            self.fetch(version, patience=patience)
        except BaseException:
            self.release(version)
            raise

    def hold(self, version: Version) -> bool:
        """The first half of `acquire`, which waits for nothing: the version stays, whatever comes, until `release`.

        False where it is on disk alone, and `fetch` has still to bring it. Raises UnknownAdapterError.
        """
        with self._lock:
            entry = self._entry(version)
            entry.users += 1
            entry.uses += 1
            entry.used = next(self._clock)
            self._counts["memory_hits"] += entry.rows is not None
            return entry.rows is not None

    def fetch(self, version: Version, *, patience: float = 60.0) -> None:
        """The second half: bring a version that the caller holds into memory. Raises as `acquire`."""
        with self._lock:
            self._check_open()
            entry = self._entries[version.id]
        with entry.reading:
            if entry.rows is None:
                self._read_again(entry, patience)

    def _read_again(self, entry: Entry, patience: float) -> None:
        taken = self._read(entry.folder, entry.check_base)
        if taken.hash != entry.version.hash:
            raise FileError(
                f"the adapter in {entry.folder} is not the one that was loaded as {entry.version.name!r}:",
                [f"loaded was {entry.version.hash}, the folder now holds {taken.hash}: load it as a new version"],
            )
        with self._lock:
            self._make_room(entry.version.bytes, patience)
            entry.rows = taken.rows
            self._bytes += entry.version.bytes
            self._counts["disk_reads"] += 1

    def release(self, version: Version) -> None:
        """Give up one hold."""
        with self._lock:
            entry = self._entries[version.id]
            entry.users -= 1
            self._forget(entry)
            self._released.notify_all()

    @contextmanager
    def lease(self, version: Version) -> Iterator[None]:
        """acquire, and release on the way out."""
        self.acquire(version)
        try:
            yield
        finally:
            self.release(version)

    def pin(self, version: Version) -> None:
        """Keep it in memory whatever comes (it is read again first, where it was let go)."""
        with self.lease(version), self._lock:
            self._entry(version).pinned = True

    def unpin(self, version: Version) -> None:
        with self._lock:
            self._entry(version).pinned = False

    def unload(self, version: Version) -> None:
        """Forget it. Requests that hold it finish first; new ones get UnknownAdapterError."""
        with self._lock:
            entry = self._entry(version)
            entry.gone = True
            self._forget(entry)
            self._released.notify_all()

    def _forget(self, entry: Entry) -> None:
        if entry.gone and not entry.users:
            self._let_go(entry)
            self._entries.pop(entry.version.id, None)

    def place(self, version: Version, active: Collection[int]) -> bool:
        """Put a held version's rows into the layers' stacks. Serving thread, between forwards; see Places.ensure."""
        with self._lock:
            rows = self._entries[version.id].rows
        if rows is None:
            raise TypeError(f"{version.name!r} is placed by a request that does not hold it")
        return self.places.ensure(version.id, rows, active)

    def settle(self) -> None:
        """Have the running versions' rows stand side by side. Serving thread, between forwards; see Places.settle."""
        with self._lock:
            self.places.settle()

    def rows(self, version: Version) -> Rows:
        """The tensors of a version that the caller holds."""
        with self._lock:
            rows = self._entries[version.id].rows
        if rows is None:
            raise TypeError(f"{version.name!r} is used by a request that does not hold it")
        return rows

    # -- what there is -----------------------------------------------------------------------------------------------

    def resident(self) -> list[Resident]:
        """Every version, in the order of loading."""
        with self._lock:
            placed = set(self.places.placed)
            return [
                Resident(entry.version, _tier(entry, placed), entry.pinned, entry.users, entry.uses, entry.folder)
                for entry in self._entries.values()
                if not entry.gone
            ]

    def counters(self) -> dict[str, int]:
        """loads, disk_reads, memory_hits, memory_evictions, device_hits, device_copies, device_evictions since the start;
        bytes: that adapters take in memory now."""
        places = self.places
        device = {"device_hits": places.hits, "device_copies": places.copies, "device_evictions": places.evictions}
        with self._lock:
            return self._counts | device | {"bytes": self._bytes}

    def _entry(self, version: Version) -> Entry:
        self._check_open()
        entry = self._entries.get(version.id)
        if entry is None or entry.gone:
            known = (
                ", ".join(sorted({repr(one.version.name) for one in self._entries.values() if not one.gone})) or "none"
            )
            raise UnknownAdapterError(f"{version.name!r} (version {version.id}) is not loaded. Loaded: {known}.")
        return entry

    def _check_open(self) -> None:
        if self._closed:
            raise ServeError("this bank is closed.")

    def close(self) -> None:
        """Give the plain model back, bit for bit. Close the engine first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._released.notify_all()
            self._entries.clear()
            self.live.stacks.clear()
            self.places.placed.clear()
            for leaf in self.host.leaves.values():
                bare(leaf)
            del self.model.__dict__[KEY]
        for path, key, parameter in parameters_of(self.model):
            full = f"{path}.{key}" if path else key
            parameter.requires_grad_(self.host.flags.get(full, parameter.requires_grad))


def _tier(entry: Entry, placed: Collection[int]) -> Tier:
    if entry.version.id in placed:
        return "device"
    return "disk" if entry.rows is None else "memory"
