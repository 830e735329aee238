"""The layout of a combination of methods: a folder for each part, in its own layout, and a lorakit.json above them."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, Method, Several, joined
from lorakit.errors import LorakitError, UsageError
from lorakit.methods.table import METHODS
from lorakit.store.files import json_bytes
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.layout import EXTRA, FORMAT, Layout, Stored, hash_faults, read_extra
from lorakit.store.peft_config import CONFIG
from lorakit.store.skeleton import outline


@dataclass
class Combined(Stored):
    """A combination's folder as read; `tensors` are all of its parts', by `part/key`."""

    parts: dict[str, Stored] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return f"lorakit ({' + '.join(self.parts) or 'several'})"

    def replaced(self) -> Collection[str]:
        return {name for part in self.parts.values() for name in part.replaced()}

    def base(self) -> str | None:
        return next((name for one in self.parts.values() if (name := one.base())), None)

    def identity(self) -> str:
        return _hash({name: part.identity() for name, part in self.parts.items()})

    def meta(self) -> dict[str, Any]:
        return {"extra": self.extra, "parts": {name: part.meta() for name, part in self.parts.items()}}


class SeveralLayout(Layout):
    """See the module. parts: the layouts that a part may be in."""

    def __init__(self, parts: Sequence[Layout]) -> None:
        self.parts = parts

    def takes(self, method: Method) -> bool:
        return isinstance(method, Several) and all(self._writer(one) is not None for one in method.methods)

    def recognises(self, folder: Path) -> bool:
        there = os.path.isfile(folder / EXTRA) and not os.path.isfile(folder / CONFIG)
        return there and read_extra(folder)[0].get("method") == Several.name

    def files(self, model: nn.Module, record: Record, notes: Mapping[str, Any]) -> dict[str, bytes]:
        content: dict[str, bytes] = {}
        hashes: dict[str, str] = {}
        known = record.meta.get("parts", {})
        for one in cast(Several, record.method).methods:
            part = Record(
                record.name, one, part_of(record.draft, one, model), record.trainable, known.get(one.name, {})
            )
            written = cast(Layout, self._writer(one)).files(model, part, {})
            hashes[one.name] = json.loads(written[EXTRA])["adapter"]
            content |= {f"{one.name}/{file}": data for file, data in written.items()}
        replaced = {f"{path}.{name}" for path, group in record.draft.replaced.items() for name in group}
        extra = {
            **record.meta.get("extra", {}),
            **notes,
            "format": FORMAT,
            "method": Several.name,
            "parts": list(hashes),
            "adapter": _hash(hashes),
            "base": fingerprint(model, replaced),
        }
        return {EXTRA: json_bytes(extra, "notes"), **content}

    def read(self, folder: Path) -> Combined:
        found = Combined(folder)
        found.extra, found.faults = read_extra(folder)
        names = found.extra.get("parts")
        found.faults += _names_faults(names)
        if found.faults:
            return found
        found.config = {"method": Several.name, "parts": names}
        for name in cast(list[str], names):
            part = found.parts[name] = self._reader(folder / name).read(folder / name)
            part.settle()
            found.faults += [type(fault)(f"{name}: {fault}") for fault in part.faults]
            found.tensors |= {f"{name}/{key}": tensor for key, tensor in part.tensors.items()}
            if part.method is not None and part.method.name != name:
                found.faults.append(f"{name}: holds an adapter of another method, {part.method.name}")
        if not found.faults:
            try:
                found.method = Several(tuple(cast(Method, part.method) for part in found.parts.values()))
            except UsageError as error:
                found.faults.append(str(error))
        found.faults += hash_faults(found)
        return found

    def draft(self, found: Stored, method: Method, model: nn.Module) -> tuple[Method, Draft, list[str]]:
        methods, drafts, faults = [], [], list[str]()
        for name, part in cast(Combined, found).parts.items():
            own, draft, more = self._reader(part.folder).draft(part, cast(Method, part.method), model)
            methods.append(own)
            drafts.append(draft)
            faults += [f"{name}: {fault}" for fault in more]
        faults += _unlike(drafts)
        if faults:
            return method, Draft(), faults
        try:
            return Several(tuple(methods)), joined(drafts), []
        except LorakitError as error:
            return method, Draft(), [str(error)]

    def _writer(self, method: Method) -> Layout | None:
        return next((one for one in self.parts if one.takes(method)), None)

    def _reader(self, folder: Path) -> Layout:
        return next(one for one in self.parts if one.recognises(folder))


def part_of(whole: Draft, method: Method, model: nn.Module) -> Draft:
    """What one method of a combination has of the joined draft; a head that two train is in both parts."""
    like = outline(method, model)
    return Draft(
        pairs={path: whole.pairs[path] for path in like.pairs},
        replaced={path: {name: whole.replaced[path][name] for name in group} for path, group in like.replaced.items()},
        raw={path: {name: whole.raw[path][name] for name in group} for path, group in like.raw.items()},
        tokens={path: whole.tokens[path] for path in like.tokens},
        tied={head: whole.tied[head] for head in like.tied},
        inserts={path: {label: whole.inserts[path][label] for label in group} for path, group in like.inserts.items()},
    )


def _names_faults(names: object) -> list[str]:
    """What is wrong with the list of parts, which are names of folders: no other name than a method's is followed."""
    if not isinstance(names, list) or len(names) < 2:
        return [f"{EXTRA}: parts: expected the names of at least two methods, got {names!r}"]
    unknown = [name for name in names if not isinstance(name, str) or name not in METHODS]
    faults = [
        f"{EXTRA}: parts: {name!r} is no method that this lorakit knows: {', '.join(METHODS)}" for name in unknown
    ]
    return faults or ([f"{EXTRA}: parts: a name stands twice in {names!r}"] if len(set(names)) < len(names) else [])


def _unlike(drafts: Sequence[Draft]) -> list[str]:
    """Parameters that two parts train in full, and of which they have different values."""
    seen: dict[str, torch.Tensor] = {}
    faults = []
    for draft in drafts:
        for path, group in draft.replaced.items():
            for name, tensor in group.items():
                first = seen.setdefault(f"{path}.{name}", tensor)
                if not torch.equal(first, tensor):
                    faults.append(f"{path}.{name}: two parts have it, with different values")
    return faults


def _hash(parts: Mapping[str, str]) -> str:
    return content_hash({"method": Several.name, "parts": dict(parts)}, {}, {})
