"""An adapter's folder, read and checked wholly, as rows for a bank. Nothing of the model is changed."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.attach.method import Draft
from lorakit.errors import FileError
from lorakit.serve.heads import classes_of, head_path, skeleton
from lorakit.serve.patterns import Tried
from lorakit.serve.rows import Rows, to_rows
from lorakit.store.identity import fingerprint, same_base
from lorakit.store.layout import TENSORS, Stored, base_faults
from lorakit.store.layouts import fit, read
from lorakit.store.read import AdapterFile

HEADER = 1 << 20  # bytes that a file may have beside its tensors' values


@dataclass(frozen=True)
class Taken:
    """What a folder holds. task: PEFT's task_type; labels: names of its own head's classes."""

    rows: Rows
    hash: str
    task: str | None
    labels: tuple[str, ...] | None


class AsGiven(nn.Module):
    """A model's parameters as it came, whatever stands in their place now: what a fingerprint is taken of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = dict(model.named_parameters())  # under their whole names: all that is read of them


class Base:
    """A model that is not changed any more, and what loads ask of it again and again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.own = {path: _as_given(module) for path, module in self.modules.items()}
        """The modules with the weights that they came with, whatever is merged into them meanwhile, in another thread."""
        self.aside: dict[str, Any] = {}  # the own weights of layers whose adapter is merged (lorakit.serve.merging)
        self._known: dict[frozenset[str], str | None] = {}
        self._given = AsGiven(model)
        self.tried = Tried([path for path in self.modules if path])

    def is_of(self, found: Stored) -> bool:
        """Whether a file says that it is of this base."""
        without = frozenset(found.replaced())
        if without not in self._known:
            self._known[without] = fingerprint(self._given, without)
        return same_base(self._known[without], found.extra.get("base"))


def _as_given(module: nn.Module) -> nn.Module:
    """A stand-in that keeps its parameters; the module itself where none can be merged into it (lorakit.serve.merging)."""
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return module
    stand_in = copy.copy(module)
    stand_in._parameters = dict(module._parameters)
    return stand_in


def take(folder: Path, base: Base, *, check_base: bool, most: int) -> Taken:
    """Read an adapter for a base. most: bytes that its tensors may take.

    Raises FileError with every fault, UsageError where rows of one batch cannot take it.
    """
    path = folder / TENSORS
    size = path.stat().st_size if path.is_file() else 0
    if size > most + HEADER:
        raise FileError(
            f"the adapter in {folder} is refused:", [f"{TENSORS} has {size:,} bytes, and {most:,} are allowed"]
        )
    base.tried.check(folder)
    model, found = base.model, read(folder, wait=False)  # `fit` waits for the hash
    check_base = check_base and not base.is_of(found)  # else to say in which way it is another's
    classes = classes_of(model, found.parsed.plain) if isinstance(found, AdapterFile) else None
    if classes is None or classes == model.config.num_labels:
        _, draft = fit(found, model, check_base=check_base)
    else:  # a head for other classes than the base's: all else must fit, and the base be the one it was trained on
        found.faults = [*found.faults, *(base_faults(found, model) if check_base else [])]
        _, draft = fit(found, skeleton(model, classes), check_base=False)
    top = head_path(model)
    head = {} if classes is None else _head(draft, top or "")
    task = found.config.get("task_type")
    labels = None if classes is None else _labels(found, model, classes)
    rows = to_rows(draft, base.own, head, top)
    return Taken(rows, _hash(found), task if isinstance(task, str) else None, labels)


def _head(draft: Draft, path: str) -> dict[str, Tensor]:
    """The tensors of the adapter's own head, by their names in it, taken out of the draft."""
    own: dict[str, Tensor] = {}
    for place in [place for place in draft.replaced if place == path or place.startswith(f"{path}.")]:
        inner = place.removeprefix(path).removeprefix(".")
        own |= {f"{inner}.{name}" if inner else name: one for name, one in draft.replaced.pop(place).items()}
    return own


def _labels(found: Stored, model: Any, classes: int) -> tuple[str, ...]:
    """The names of a head's classes: those that a run wrote into lorakit.json, else the base's where it has as many."""
    named = found.extra.get("label_names")
    if isinstance(named, list) and all(isinstance(name, str) for name in named) and len(set(named)) == classes:
        return tuple(dict.fromkeys(named))
    if classes == model.config.num_labels:
        return tuple(str(model.config.id2label[k]) for k in range(classes))
    return tuple(f"LABEL_{k}" for k in range(classes))


def _hash(found: Stored) -> str:
    """The content's hash; where lorakit.json names one, it was checked when the folder was read."""
    named = found.extra.get("adapter")
    return named if isinstance(named, str) else found.identity()
