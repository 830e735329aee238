"""What the registry knows, as one immutable value: names -> versions, aliases, history. Its JSON is checked like any input."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.errors import FileError
from lorakit.serve.names import is_hex, is_name, split_reference

FORMAT = 1
KEPT_EVENTS = 200  # of a name's history


@dataclass(frozen=True)
class Event:
    """at: seconds since 1970. action: publish, roll back, load, unload. version: the digits of the hash it was about."""

    at: float
    action: str
    version: str


@dataclass(frozen=True)
class Entry:
    """A name. versions: in the order of their publication; current: the one that answers.

    loaded: False while the name is taken out of service. pinned: never evicted. source: (bytes, time of change) of the
    loose folder that a version came from, so that it is not read anew at each start.
    """

    versions: tuple[str, ...]
    current: str
    loaded: bool = True
    pinned: bool = False
    history: tuple[Event, ...] = ()
    source: tuple[int, int] | None = None

    @property
    def before(self) -> str | None:
        """What answered before the current version was published; None where there was nothing.

        Read from the history: each publication stands on what answered then, and a roll back leads to a version together with
        what that one stands on. What the history has forgotten (it is bounded) counts in the order of publication.
        """
        stack: tuple[str, ...] = ()
        if len(self.history) >= KEPT_EVENTS:
            stack = self._up_to(self.history[0].version)
        published: dict[str, tuple[str, ...]] = {}
        for event in self.history:
            if event.action == "publish" and stack[-1:] != (event.version,):
                stack = published[event.version] = (*stack, event.version)
            elif event.action == "roll back" and event.version in stack:
                stack = stack[: len(stack) - stack[::-1].index(event.version)]
            elif event.action == "roll back":
                stack = published.get(event.version, self._up_to(event.version))
        if stack[-1:] != (self.current,):  # a history that was changed by hand
            stack = self._up_to(self.current)
        return next((one for one in stack[-2::-1] if one != self.current and one in self.versions), None)

    def _up_to(self, version: str) -> tuple[str, ...]:
        """The versions in the order of publication, up to this one."""
        return self.versions[: self.versions.index(version) + 1] if version in self.versions else ()

    def after(self, action: str, **changes: Any) -> "Entry":
        """Changed, with the change in the history."""
        changed = replace(self, **changes)
        event = Event(round(time.time(), 3), action, changed.current)
        return replace(changed, history=(*self.history, event)[-KEPT_EVENTS:])


@dataclass(frozen=True)
class State:
    names: Mapping[str, Entry] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def with_entry(self, name: str, entry: Entry) -> "State":
        return replace(self, names={**self.names, name: entry})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "aliases": dict(self.aliases),
            "names": {name: _entry_json(entry) for name, entry in self.names.items()},
        }


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "versions": list(entry.versions),
        "current": entry.current,
        "loaded": entry.loaded,
        "pinned": entry.pinned,
        "history": [[event.at, event.action, event.version] for event in entry.history],
        "source": None if entry.source is None else list(entry.source),
    }


def read_state(content: Any, where: str) -> State:
    """The state that a registry.json holds. Raises FileError with what is wrong: nothing of it is believed unchecked."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        came = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FileError(f"{where} cannot be read: expected a registry of format {FORMAT}, came {came!r}.")
    faults: list[str] = []
    names, aliases = content.get("names"), content.get("aliases")
    entries: dict[str, Entry] = {}
    for name, value in names.items() if isinstance(names, dict) else ():
        entry = _entry(value) if is_name(name) else None
        if entry is None:
            faults.append(f"{ascii(name)[:80]}: no name, or not a list of versions with one of them current")
        else:
            entries[name] = entry
    known = {alias: target for alias, target in aliases.items() if _alias_holds(alias, target, entries)} \
        if isinstance(aliases, dict) else {}  # fmt: skip
    if not isinstance(names, dict) or not isinstance(aliases, dict):
        faults.append("expected mappings under names and aliases")
    elif len(known) != len(aliases):
        faults += [f"{ascii(alias)[:80]}: an alias of nothing that is here" for alias in aliases if alias not in known]
    if faults:
        raise FileError(f"{where} is damaged or was changed by hand:", faults)
    return State(entries, known)


def _alias_holds(alias: Any, target: Any, names: Mapping[str, Entry]) -> bool:
    parts = split_reference(target) if isinstance(target, str) else None
    return is_name(alias) and alias not in names and parts is not None and parts[0] in names


def _entry(value: Any) -> Entry | None:
    try:
        versions, current, history, source = (value[key] for key in ("versions", "current", "history", "source"))
        entry = Entry(
            tuple(versions),
            current,
            bool(value["loaded"]),
            bool(value["pinned"]),
            tuple(Event(float(at), str(action), str(version)) for at, action, version in history),
            None if source is None else (int(source[0]), int(source[1])),
        )
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return entry if all(map(is_hex, versions)) and current in versions else None
