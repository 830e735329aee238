"""The one object that a model with adapters carries: who is attached, who is on, and what the base was before.

It stands in the model's `__dict__` and is no child module: names, state dicts and children of the model stay as they
were. Tensors of adapters that are off live here alone; those of adapters that are on stand on their leaves, as
parameters where trainable, as non-persistent buffers where frozen, and are written back on the next switch.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import bare, check_bare, wear
from lorakit.attach.kinds import low_rank_kind
from lorakit.attach.method import Draft, Method, Pair
from lorakit.attach.site import LowRank, Site, Slot
from lorakit.core.route import Route
from lorakit.errors import AdapterError, UsageError

KEY = "_lorakit"  # where the host stands in the model's __dict__


@dataclass
class Record:
    """One attached adapter. meta: what its file says and lorakit has no field for (see lorakit.store)."""

    name: str
    method: Method
    draft: Draft
    trainable: bool
    meta: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the adapter, in the model's order."""
        pairs = [tensor for pair in self.draft.pairs.values() for tensor in (pair.A, pair.Bt)]
        return pairs + [tensor for group in self.draft.replaced.values() for tensor in group.values()]

    def paths(self) -> set[str]:
        return set(self.draft.pairs) | set(self.draft.replaced)


@dataclass(frozen=True)
class State:
    """Which adapters are on: (name, strength) each, and the route that says which row takes which."""

    selection: tuple[tuple[str, float], ...] = ()
    route: Route | None = None


@dataclass
class Merged:
    """A merge that can be undone. originals: path -> {parameter name: the base's own values}."""

    names: tuple[str, ...]
    before: State
    originals: dict[str, dict[str, Tensor]]
    handles: list[Any]


class Host:
    """See the module's docstring. Every method expects the caller to hold `lock`."""

    def __init__(self, model: nn.Module) -> None:
        self.leaves: dict[str, nn.Module] = {}
        self.sites: dict[str, Site] = {}
        self.records: dict[str, Record] = {}
        self.state = State()
        self.merged: Merged | None = None
        self.epoch = 0
        self.lock = threading.RLock()
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    # -- leaves ------------------------------------------------------------------------------------------------------

    def dress(self, model: nn.Module) -> None:
        """Give every leaf that a record needs its adapted class, with a property for each parameter it replaces."""
        for path in self._needed():
            leaf = self.leaves.get(path)
            if leaf is None:
                leaf = model.get_submodule(path)
                if "_lk_site" in leaf.__dict__:
                    raise AdapterError(
                        f"{path} already carries adapters that were attached through another module of this model. "
                        "Attach, switch and detach through one and the same module."
                    )
                _check_free(leaf, path)
            site = self.sites.get(path) or Site(path, None)
            wear(leaf, site, self._replaced_names(path))
            self.leaves[path], self.sites[path] = leaf, site

    def undress(self, keep: Iterable[str] = ()) -> None:
        """Give every leaf that is not in `keep` its own class back."""
        kept = set(keep)
        for path in [path for path in self.leaves if path not in kept]:
            bare(self.leaves.pop(path))
            del self.sites[path]

    def check_undressable(self) -> None:
        for leaf in self.leaves.values():
            check_bare(leaf)

    def _needed(self) -> list[str]:
        return list(dict.fromkeys(path for record in self.records.values() for path in _ordered_paths(record)))

    def _replaced_names(self, path: str) -> frozenset[str]:
        return frozenset(name for record in self.records.values() for name in record.draft.replaced.get(path, ()))

    # -- switching ---------------------------------------------------------------------------------------------------

    def switch(self, state: State) -> None:
        """Put the tensors of `state`'s adapters on their leaves and take the others off. O(sites), whatever is resident."""
        if state == self.state:
            return
        records = [(self.records[name], strength) for name, strength in state.selection]
        with torch.inference_mode(False):  # what is made here is met again where gradients are recorded
            for record, _ in records:
                self._bring(record)  # all that can fail, before anything is changed
            self._write_back()
            self.epoch += 1
            self.state = state
            mark = torch.tensor(self.epoch, device="cpu")
            for path, leaf in self.leaves.items():
                slots = tuple(_install(leaf, path, record, weight, k) for k, (record, weight) in enumerate(records))
                used = any(slot.low is not None or slot.replaced for slot in slots)
                self.sites[path].switch(slots if used else (), state.route if used else None, self.epoch, mark)

    def _bring(self, record: Record) -> None:
        """Bring an adapter's tensors to the devices of their leaves."""
        for path, pair in record.draft.pairs.items():
            device = _device(self.leaves[path])
            pair.A, pair.Bt = _moved(pair.A, device), _moved(pair.Bt, device)
        for path, group in record.draft.replaced.items():
            device = _device(self.leaves[path])
            group.update({name: _moved(tensor, device) for name, tensor in group.items()})

    def _write_back(self) -> None:
        names = [name for name, _ in self.state.selection]
        for path, site in self.sites.items():
            for name, slot in zip(names, site.active, strict=False):
                _remove(self.leaves[path], path, self.records[name], slot)

    def current(self) -> None:
        """Bring the records up to date with the tensors that stand on the leaves (`model.to()` makes new ones)."""
        names = [name for name, _ in self.state.selection]
        for path, site in self.sites.items():
            for name, slot in zip(names, site.active, strict=False):
                _read_back(self.leaves[path], path, self.records[name], slot)


def _ordered_paths(record: Record) -> list[str]:
    return [*record.draft.pairs, *record.draft.replaced]


def _install(leaf: nn.Module, path: str, record: Record, strength: float, slot: int) -> Slot:
    """Put one adapter's tensors on one leaf, under names with the slot's suffix."""
    suffix = f"_{slot}" if slot else ""
    pair, replaced, low = record.draft.pairs.get(path), record.draft.replaced.get(path, {}), None
    if pair is not None:
        kind = low_rank_kind(type(leaf))
        if kind is None:
            raise TypeError(f"{path}: no kind is registered for {type(leaf).__name__}")
        scale = pair.scale * strength
        low = LowRank(
            kind.a_name + suffix,
            kind.b_name + suffix,
            scale,
            pair.factor(strength),
            pair.dropout,
        )
        _put(leaf, low.a, pair.A)
        _put(leaf, low.b, pair.Bt)
    names = {name: f"lora_{name}{suffix}" for name in replaced}
    for name, attribute in names.items():
        _put(leaf, attribute, replaced[name])
    return Slot(low, names, strength)


def _put(leaf: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        leaf._parameters[name] = tensor
    else:
        leaf._buffers[name] = tensor
        leaf._non_persistent_buffers_set.add(name)


def _device(leaf: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in leaf._parameters.values() if parameter is not None), None)


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    """The tensor on `device`; a parameter stays the object that it is, for an optimizer may hold it."""
    if device is None or tensor.device == device:
        return tensor
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
        return tensor
    return tensor.to(device)


def _check_free(leaf: nn.Module, path: str) -> None:
    """Raise where a leaf cannot carry an adapter: it has low-rank tensors of other code, or no weight at rest."""
    taken = [name for name in (*leaf._parameters, *leaf._buffers, *leaf._modules) if name.startswith("lora_")]
    if taken:
        raise AdapterError(
            f"{path} ({type(leaf).__name__}) has {taken[0]} already: another library's adapter stands there. "
            "Merge or remove that first, or leave the layer out with exclude_modules."
        )
    device = _device(leaf)
    if device is not None and device.type == "meta" and "forward" in leaf.__dict__:
        raise AdapterError(
            f"{path} is offloaded (accelerate's hooks fetch its weight for each call), and an adapter's tensors would have "
            "no place beside it. Load the model without offloading, or leave the layer out with exclude_modules."
        )


def _take(leaf: nn.Module, name: str) -> Tensor:
    leaf._non_persistent_buffers_set.discard(name)
    tensor: Tensor | None = leaf._parameters.pop(name, None)
    if tensor is None:
        tensor = leaf._buffers.pop(name, None)
    if tensor is None:
        raise AdapterError(f"the adapter's tensor {name} was taken off its leaf by other code")
    return tensor


def _remove(leaf: nn.Module, path: str, record: Record, slot: Slot) -> None:
    if slot.low is not None:
        pair = record.draft.pairs[path]
        pair.A, pair.Bt = _take(leaf, slot.low.a), _take(leaf, slot.low.b)
    for name, attribute in slot.replaced.items():
        record.draft.replaced[path][name] = _take(leaf, attribute)


def _read_back(leaf: nn.Module, path: str, record: Record, slot: Slot) -> None:
    if slot.low is not None:
        pair: Pair = record.draft.pairs[path]
        pair.A, pair.Bt = getattr(leaf, slot.low.a), getattr(leaf, slot.low.b)
    for name, attribute in slot.replaced.items():
        record.draft.replaced[path][name] = getattr(leaf, attribute)


def find_host(model: nn.Module) -> Host | None:
    """The model's host, None where nothing is attached. Raises UsageError for what is no module."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, not {type(model).__name__}.")
    return model.__dict__.get(KEY)


def host_of(model: nn.Module) -> Host:
    """The model's host. Raises AdapterError where nothing is attached, and says where it is if that is a wrapper or a part."""
    host = find_host(model)
    if host is not None:
        return host
    holder = next((path for path, module in model.named_modules() if KEY in module.__dict__), None)
    hint = (
        f" One is attached to its part {holder!r}: pass that."
        if holder
        else " Call lorakit.attach or lorakit.load first."
    )
    raise AdapterError(f"no adapter is attached to this {type(model).__name__}.{hint}")


def check_names(host: Host, names: Mapping[str, float]) -> None:
    unknown = [name for name in names if name not in host.records]
    if unknown:
        raise AdapterError(f"unknown adapter {unknown[0]!r}. Attached: {', '.join(map(repr, host.records)) or 'none'}.")


def check_not_merged(host: Host) -> None:
    if host.merged is not None:
        raise AdapterError(
            f"{', '.join(map(repr, host.merged.names))} is merged into the base. Call lorakit.unmerge(model) first."
        )
