"""lorakit's own layout, for methods that PEFT does not have: lorakit.json says which method and how it is configured, and
adapter_model.safetensors holds its tensors: `<module>:<label>.<tensor>` of what it computes at a module, and under the
model's own names what stands for a parameter of the base.
"""

import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, Method
from lorakit.errors import LorakitError, UsageError
from lorakit.methods.lora import LoRA
from lorakit.methods.table import METHODS
from lorakit.store.card import method_card
from lorakit.store.files import json_bytes
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.layout import (
    EXTRA,
    FORMAT,
    TENSORS,
    Layout,
    Stored,
    hash_faults,
    read_extra,
    read_tensors_of,
    value_faults,
)
from lorakit.store.peft_config import CONFIG
from lorakit.store.skeleton import outline

Place = tuple[str, dict[str, Tensor], str]  # (key in the file, the draft's mapping, the name in it)


@dataclass
class OwnFile(Stored):
    """A folder of this layout as read."""

    def replaced(self) -> Collection[str]:
        return _replaced(self.tensors)

    def identity(self) -> str:
        return _hash(self.config, self.tensors)


class Own(Layout):
    """See the module."""

    def takes(self, method: Method) -> bool:
        return type(method) in METHODS.values() and not isinstance(method, LoRA)

    def recognises(self, folder: Path) -> bool:
        if os.path.isfile(folder / CONFIG) or not os.path.isfile(folder / EXTRA):
            return False
        extra, faults = read_extra(folder)
        return bool(faults) or extra.get("method", LoRA.name) != LoRA.name

    def files(self, model: nn.Module, record: Record, notes: Mapping[str, Any]) -> dict[str, bytes]:
        from safetensors.torch import save as serialise

        if list(record.draft.all_pairs()) or record.draft.tokens:
            raise UsageError(f"{type(record.method).__name__} drafts low-rank pairs, which belong in LoRA's layout.")
        config = _configuration(record.method)
        tensors = {key: group[name].detach().cpu().contiguous() for key, group, name in _unique(record.draft)}
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        extra = {
            "base_model": name,
            **record.meta.get("extra", {}),
            **notes,
            "format": FORMAT,
            "method": record.method.name,
            "config": config,
            "adapter": _hash({"method": record.method.name, **config}, tensors),
            "base": fingerprint(model, _replaced(tensors)),
        }
        return {
            EXTRA: json_bytes(extra, "notes"),
            TENSORS: serialise(tensors, metadata={"format": "pt"}),
            "README.md": method_card(type(record.method).__name__, tensors, extra).encode(errors="replace"),
        }

    def read(self, folder: Path) -> OwnFile:
        found = OwnFile(folder)
        found.extra, faults = read_extra(folder)
        if not faults:
            found.config, found.method, faults = _read_method(found.extra)
        found.faults += [fault if fault.startswith(EXTRA) else f"{EXTRA}: {fault}" for fault in faults]
        found.tensors, faults = read_tensors_of(folder)
        found.faults += faults + value_faults(found.tensors)
        if found.tensors:
            found.faults += hash_faults(found)
        return found

    def draft(self, found: Stored, method: Method, model: nn.Module) -> tuple[Method, Draft, list[str]]:
        try:
            draft = outline(method, model)
        except (LorakitError, RecursionError, OverflowError) as error:  # a regular expression may be anything
            return method, Draft(), [str(error)]
        return method, draft, fill(draft, found.tensors)


def fill(draft: Draft, tensors: Mapping[str, Tensor]) -> list[str]:
    """Put a file's tensors in the places of an outline; returns what does not fit. Tensors keep their dtype."""
    faults, filled = [], dict[int, Tensor]()
    expected = {key: group[name] for key, group, name in _unique(draft)}
    for key, like in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            faults.append(f"{key}: the method has such a tensor on this model, and the file has none")
        elif tensor.shape != like.shape:
            faults.append(f"{key}: expected {list(like.shape)}, got {list(tensor.shape)}")
        elif not tensor.is_floating_point() and like.is_floating_point():
            faults.append(f"{key}: expected floating-point numbers, got {tensor.dtype}")
        else:
            filled[id(like)] = tensor
    faults += [
        f"{key}: in the file, but the method has no such tensor on this model" for key in tensors if key not in expected
    ]
    if not faults:
        for _, group, name in _places(draft):
            group[name] = filled[id(group[name])]
    return faults


def _places(draft: Draft) -> Iterator[Place]:
    """Where each tensor of a draft stands."""
    for path, inserts in draft.inserts.items():
        for label, insert in inserts.items():
            for name in insert.tensors:
                yield f"{path}:{label}.{name}", insert.tensors, name
    for path, group in draft.replaced.items():
        for name in group:
            yield f"{path}.{name}" if path else name, group, name


def _unique(draft: Draft) -> Iterator[Place]:
    """The same, a tensor that several places share under its first name."""
    seen: set[int] = set()
    for key, group, name in _places(draft):
        if id(group[name]) not in seen:
            seen.add(id(group[name]))
            yield key, group, name


def _replaced(keys: Iterable[str]) -> Collection[str]:
    """The keys that are names of the base's own."""
    return {key: None for key in keys if ":" not in key}.keys()


def _configuration(method: Method) -> dict[str, Any]:
    """The method's fields as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(method).items()}  # type: ignore[call-overload]


def _hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    cls = METHODS.get(str(config.get("method")))
    defaults = {} if cls is None else {one.name: one.default for one in fields(cls)}  # type: ignore[arg-type]
    return content_hash(config, tensors, defaults)


def _read_method(extra: Mapping[str, Any]) -> tuple[dict[str, Any], Method | None, list[str]]:
    """(configuration, method, faults) of lorakit.json's content."""
    name, config = extra.get("method"), extra.get("config")
    if not isinstance(name, str) or name not in METHODS or METHODS[name] is LoRA:
        known = ", ".join(one for one in METHODS if one != LoRA.name)
        return {}, None, [f"method {name!r} is none that this lorakit knows: {known}"]
    if not isinstance(config, dict):
        return {}, None, [f"config: expected an object with the fields of {METHODS[name].__name__}, got {config!r}"]
    cls: Any = METHODS[name]
    known_fields = [one.name for one in fields(cls)]
    faults = []
    for key in config:
        if key not in known_fields:
            near = difflib.get_close_matches(key, known_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known_fields)}"
            faults.append(f"config.{key}: unknown key, whose effect would be lost; {hint}")
    whole = {"method": name, **config}
    if faults:
        return whole, None, faults
    try:
        return whole, cls(**config), []
    except (UsageError, TypeError, ValueError, OverflowError) as error:
        return whole, None, [f"config: {error}"]
