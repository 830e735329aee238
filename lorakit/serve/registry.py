"""The registry: a folder of adapters, each name an alias to a version, every change whole or not at all.

    folder/
      registry.json       names -> versions, aliases, history
      .versions/<hash>/   a version's files; written once, never changed
      sql/, runs of lorakit train, ...   loose adapters: taken in, as versions of a name, when the registry is opened

A version is staged beside its place, flushed, renamed; then registry.json is replaced. Killed in between, the next start
finds the set of adapters and aliases of before. Several processes may open one folder: each notices the others' changes.
"""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.errors import FileError, LorakitError, OutputError, UnknownAdapterError, UsageError
from lorakit.serve.intake import AdapterBounds, check_files, copy_files, files_of
from lorakit.serve.names import check_name, is_name, shown, split_reference
from lorakit.serve.registry_state import Entry, State, read_state
from lorakit.store.files import write_json
from lorakit.store.layout import TENSORS
from lorakit.store.peft_config import CONFIG

FILE, VERSIONS, LOCK, STAGE = "registry.json", ".versions", ".registry.lock", ".stage-"

Check = Callable[["Release"], None]
"""Raises a LorakitError where an adapter, its files in place, does not fit the base that it would be served on."""


@dataclass(frozen=True)
class Release:
    """A version of a name. hash: "sha256:..." of its content. folder: where its files are; they never change."""

    name: str
    hash: str
    folder: Path


class Registry:
    """A folder of adapters. Safe to use from several threads, and to open from several processes.

    folder: made where it is missing. adopt: take in the loose folders now, as `adopt` does.
    refused: loose folders that were not taken in, each with the reason.
    Raises OutputError (not writable) and FileError (a registry.json that is damaged).
    """

    def __init__(self, folder: str | Path, *, bounds: AdapterBounds | None = None, adopt: bool = True) -> None:
        from filelock import FileLock

        self.bounds = bounds or AdapterBounds()
        self.refused: dict[str, str] = {}
        try:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
            self.folder = Path(folder).expanduser().resolve(strict=True)
            (self.folder / VERSIONS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be the folder of adapters: {error.strerror or error}.") from error
        self._versions = self.folder / VERSIONS
        self._within(self._versions)
        self._mutex, self._file_lock = threading.RLock(), FileLock(self.folder / LOCK)
        self._stamp: tuple[int, ...] | None = None  # of a registry.json that is not there
        self._state = State()
        with self._changing():
            self._sweep()
            if adopt:
                self._adopt({})

    # -- reading

    def entries(self) -> dict[str, Entry]:
        """Every name with its versions, those out of service too."""
        return dict(self._current().names)

    def aliases(self) -> dict[str, str]:
        return dict(self._current().aliases)

    def resolve(self, reference: str) -> Release:
        """The version of "name", "alias" or "name@hash" (at least six digits). Raises UnknownAdapterError."""
        state = self._current()
        parts = split_reference(reference)
        if parts is None:
            raise UnknownAdapterError(f"there is no adapter {shown(reference)}: that is no name.")
        name, digits = parts
        if name in state.aliases and digits is None:
            name, digits = split_reference(state.aliases[name]) or parts
        entry = state.names.get(name)
        if entry is None or not entry.loaded:
            raise UnknownAdapterError(
                f"there is no adapter {shown(reference)} in service. GET /v1/models, or Server.adapters(), lists those there are."
            )
        return self.version(name, _chosen(name, entry, digits))

    def version(self, name: str, digits: str) -> Release:
        """A version by all the digits of its hash. Raises FileError where its folder leads out of the registry."""
        folder = self._versions / digits
        self._within(folder)
        return Release(name, f"sha256:{digits}", folder)

    # -- changing

    def adopt(self, reserved: Mapping[str, str]) -> None:
        """Take in loose folders with an adapter that their name has not had yet. reserved: names that are not taken, and why."""
        with self._changing():
            self._adopt(reserved)

    def publish(self, name: str, source: str | Path, check: Check | None = None) -> Release:
        """Take the adapter in the folder `source` in as a version of `name`, which from then on answers with it.

        source: an adapter's or a run's folder anywhere: for the operator; requests name a loose folder (`publish_loose`).
        check: called with the version before any name leads to it; where it raises, nothing has changed.
        Raises UsageError (a name that is none, or an alias's), FileError (every fault of the adapter), OutputError.
        """
        check_name(name)
        return self._publish(name, Path(source).expanduser(), None, check)

    def publish_loose(self, name: str, folder: str, check: Check | None = None) -> Release:
        """The same of a folder that lies in the registry's own, named by its name alone; no link is followed."""
        check_name(name)
        return self._publish(name, self.folder / check_name(folder, "the name of a folder"), self.folder, check)

    def roll_back(self, name: str, version: str | None = None, check: Check | None = None) -> Release:
        """Let `name` answer with an earlier version: the given one (digits of its hash), or the one that answered before the
        current one was published.

        check: called with it before `name` leads to it; where it raises, nothing has changed.
        """
        with self._changing() as state:
            entry = self._entry(state, name)
            digits = entry.before if version is None else _chosen(name, entry, version.removeprefix("sha256:"))
            if digits is None:
                raise UsageError(f"adapter {name!r} has no version before the current one to roll back to.")
            release = self.version(name, digits)
            if check is not None:
                check(release)
            self._write(state.with_entry(name, entry.after("roll back", current=digits, loaded=True)))
            return release

    def put_in_service(self, name: str, loaded: bool) -> None:
        """Let a name answer again, or no more; its versions stay."""
        with self._changing() as state:
            entry = self._entry(state, name)
            if entry.loaded != loaded:
                self._write(state.with_entry(name, entry.after("load" if loaded else "unload", loaded=loaded)))

    def pin(self, name: str, pinned: bool = True) -> Entry:
        """Note whether a name's versions are to be kept in memory; returns the name's entry as it was."""
        with self._changing() as state:
            before = self._entry(state, name)
            self._write(state.with_entry(name, replace(before, pinned=pinned)))
            return before

    def alias(self, alias: str, target: str) -> str:
        """Let `alias` stand for a name (and follow its versions), or for one version "name@hash"; returns the target in full."""
        check_name(alias, "an alias")
        with self._changing() as state:
            parts = split_reference(target)
            if alias in state.names:
                raise UsageError(f"{alias!r} is an adapter's own name, which cannot be an alias too.")
            if parts is None or parts[0] not in state.names:
                raise UnknownAdapterError(f"there is no adapter {shown(target)} to stand for.")
            if parts[1] is not None:
                target = f"{parts[0]}@{_chosen(parts[0], state.names[parts[0]], parts[1])}"
            self._write(replace(state, aliases={**state.aliases, alias: target}))
            return target

    def drop_alias(self, alias: str) -> None:
        with self._changing() as state:
            if alias not in state.aliases:
                raise UnknownAdapterError(f"there is no alias {shown(alias)}.")
            self._write(
                replace(state, aliases={name: target for name, target in state.aliases.items() if name != alias})
            )

    # -- inside

    def _publish(self, name: str, source: Path, within: Path | None, check: Check | None) -> Release:
        with self._changing() as state:
            changed = self._taken_in(state, name, source, within)
            release = self.version(name, changed.names[name].current)
            if check is not None:
                self._try(check, release, state)
            self._write(changed)
            return release

    def _try(self, check: Check, release: Release, state: State) -> None:
        """Call `check`; files that it refuses, and that no name has a use for, are removed again."""
        try:
            check(release)
        except BaseException:
            if all(release.folder.name not in entry.versions for entry in state.names.values()):
                shutil.rmtree(release.folder, ignore_errors=True)
            raise

    def _taken_in(self, state: State, name: str, source: Path, within: Path | None, *, anew: bool = True) -> State:
        """`state` with the adapter in `source` as the current version of `name`, its files in place.

        anew: also where `name` has had this version; else that changes nothing (someone may have rolled it back).
        """
        if name in state.aliases:
            raise UsageError(f"{name!r} is an alias (of {state.aliases[name]}): drop it first, or publish that name.")
        stage = self._versions / f"{STAGE}{secrets.token_hex(8)}"
        origin = files_of(source)
        try:
            copy_files(origin, stage, self.bounds, within=within)
            digits = check_files(stage, self.bounds)
            self._place(stage, digits)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        before = state.names.get(name) or Entry((digits,), digits)
        before = replace(before, source=_stamp(origin / TENSORS) if within else before.source)
        if name in state.names and digits in before.versions and not anew:
            return state.with_entry(name, before)
        versions = (*(one for one in before.versions if one != digits), digits)
        return state.with_entry(name, before.after("publish", versions=versions, current=digits, loaded=True))

    def _place(self, stage: Path, digits: str) -> None:
        """Rename a staged version into place; what is there already stays if it is whole, else it makes room."""
        target = self._versions / digits
        try:
            if os.path.lexists(target):
                if not self._whole(target, digits):
                    os.rename(target, self._versions / f"{STAGE}{secrets.token_hex(8)}")
                else:
                    return
            os.rename(stage, target)
            handle = os.open(self._versions, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}.") from error

    def _whole(self, target: Path, digits: str) -> bool:
        try:
            return not target.is_symlink() and check_files(target, self.bounds) == digits
        except (FileError, OSError):
            return False

    def _adopt(self, reserved: Mapping[str, str]) -> None:
        """See adopt: each folder whole or not at all."""
        state = self._state
        for folder in sorted(self.folder.iterdir()):
            if folder.name.startswith(".") or not (files_of(folder) / CONFIG).is_file():
                continue
            if folder.is_symlink():
                self.refused[folder.name] = "a link: only what lies in the registry's folder is read. Copy it there."
                continue
            if folder.name in reserved:
                self.refused[folder.name] = reserved[folder.name]
                continue
            entry, stamp = state.names.get(folder.name), _stamp(files_of(folder) / TENSORS)
            if entry is not None and entry.source == stamp:
                continue
            try:
                check_name(folder.name)
                state = self._taken_in(state, folder.name, folder, self.folder, anew=False)
            except LorakitError as error:
                self.refused[folder.name] = str(error)
        if state is not self._state:
            self._write(state)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written. Only called while no other process writes."""
        for left in [*self._versions.glob(f"{STAGE}*"), *self.folder.glob(f".{FILE}.*.tmp")]:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[State]:
        """The newest state, which nobody else changes meanwhile."""
        with self._mutex:
            try:
                self._file_lock.acquire()
            except OSError as error:
                raise OutputError(f"cannot write in {self.folder}: {error.strerror or error}.") from error
            try:
                yield self._current()
            finally:
                self._file_lock.release()

    def _current(self) -> State:
        """The state; read anew where another process has replaced the file."""
        path = self.folder / FILE
        if _which(path) != self._stamp:
            with self._mutex:
                stamp = _which(path)
                self._within(path)
                self._state = State() if stamp is None else _read(path)
                self._stamp = stamp
        return self._state

    def _write(self, state: State) -> None:
        path = self.folder / FILE
        write_json(path, state.to_json())
        self._state, self._stamp = state, _which(path)

    def _within(self, path: Path) -> None:
        if path.is_symlink() or not path.resolve().is_relative_to(self.folder):
            raise FileError(f"{path} leads out of the registry's folder: links in it are refused.")

    @staticmethod
    def _entry(state: State, name: str) -> Entry:
        if not is_name(name) or name not in state.names:
            raise UnknownAdapterError(f"there is no adapter {shown(name)} in the registry.")
        return state.names[name]


def _chosen(name: str, entry: Entry, digits: str | None) -> str:
    """The version of `entry` whose hash begins with `digits`; the current one for None."""
    if digits is None:
        return entry.current
    fitting = [version for version in entry.versions if version.startswith(digits)] if len(digits) >= 6 else []
    if len(fitting) != 1:
        raise UnknownAdapterError(
            f"adapter {name!r} has {'no' if not fitting else 'more than one'} version {shown(digits)}; it has: "
            + ", ".join(version[:12] for version in entry.versions[-10:])
        )
    return fitting[0]


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one content of a file from the next without reading it; None where it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns)


def _which(path: Path) -> tuple[int, ...] | None:
    """What tells one registry.json from the next: each is a new file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _read(path: Path) -> State:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read ({error}). Restore it, or remove it to begin anew.") from error
    return read_state(content, str(path))
