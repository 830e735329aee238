"""The one object that a model with adapters carries: who is attached, who is on, and what the base was before.

It stands in the model's `__dict__` and is no child module: names, state dicts and children of the model stay as they
were. Tensors of adapters that are off live here alone; those of adapters that are on stand on their leaves, as
parameters where trainable, as non-persistent buffers where frozen, and are written back on the next switch.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import bare, check_bare, plain, wear
from lorakit.attach.anatomy import module_at
from lorakit.attach.feedforward import feed, starve
from lorakit.attach.group import Group
from lorakit.attach.kinds import LinearKind, low_rank_kind
from lorakit.attach.method import Draft, Method
from lorakit.attach.norm import fuse_norm
from lorakit.attach.reading import siblings
from lorakit.attach.site import Site, Slot
from lorakit.attach.slots import EMPTY, Holder, attributes_of, note_in, places_of, read_of, slot_for
from lorakit.core.route import Route
from lorakit.errors import AdapterError, UsageError

KEY = "_lorakit"  # where the host stands in the model's __dict__
Standing = tuple[str, str, str, Holder]  # path of a leaf, attribute on it, key and holder of the tensor in the draft


@dataclass
class Record:
    """One attached adapter. meta: what its file says and lorakit has no field for (see lorakit.store)."""

    name: str
    method: Method
    draft: Draft
    trainable: bool
    meta: dict[str, Any] = field(default_factory=dict)

    slots: dict[tuple[int, float], dict[str, Slot]] = field(default_factory=dict, repr=False, compare=False)
    standing: dict[tuple[int, float], list[Standing]] = field(default_factory=dict, repr=False, compare=False)
    held: list[tuple[str, str, Holder]] = field(default_factory=list, repr=False, compare=False)

    def tensors(self) -> list[Tensor]:
        """Every trained tensor of the adapter, in the model's order."""
        return self.draft.tensors()

    def paths(self) -> dict[str, None]:
        return self.draft.paths()

    def slots_at(self, k: int, strength: float, leaves: dict[str, nn.Module]) -> dict[str, Slot]:
        """path -> what this adapter does there as the k-th that is on; kept, for they hold names and no tensors."""
        if (k, strength) not in self.slots:
            self.slots[k, strength] = {
                path: slot_for(leaves[path], path, self.draft, strength, f"_{k}" if k else "") for path in self.paths()
            }
        return self.slots[k, strength]

    def standing_at(self, k: int, strength: float, leaves: dict[str, nn.Module]) -> list[Standing]:
        """What it puts on its leaves as the k-th that is on; kept, for a switch spends its time here."""
        if (k, strength) not in self.standing:
            self.standing[k, strength] = [
                (path, *place)
                for path, slot in self.slots_at(k, strength, leaves).items()
                for place in attributes_of(slot, path, self.draft)
            ]
        return self.standing[k, strength]

    def places(self) -> list[tuple[str, str, Holder]]:
        """Where its tensors stand while it is off (see places_of)."""
        self.held = self.held or list(places_of(self.draft))
        return self.held


@dataclass(frozen=True)
class State:
    """Which adapters are on: (name, strength) each, and the route that says which row takes which."""

    selection: tuple[tuple[str, float], ...] = ()
    route: Route | None = None


@dataclass
class Untied:
    """What a merge took apart. parameters: (path, name) -> the shared parameter; configs: those that said "tied"."""

    parameters: dict[tuple[str, str], nn.Parameter] = field(default_factory=dict)
    configs: list[Any] = field(default_factory=list)


@dataclass
class Merged:
    """A merge that can be undone. originals: path -> {parameter name: the base's own values}."""

    names: tuple[str, ...]
    before: State
    originals: dict[str, dict[str, Tensor]]
    handles: list[Any]
    untied: Untied = field(default_factory=Untied)


class Host:
    """See the module's docstring. Every method expects the caller to hold `lock`."""

    def __init__(self, flags: Mapping[str, bool]) -> None:
        """flags: whether each parameter of the base wanted gradients, by name."""
        self.leaves: dict[str, nn.Module] = {}
        self.sites: dict[str, Site] = {}
        self.records: dict[str, Record] = {}
        self.state = State()
        self.merged: Merged | None = None
        self.epoch = 0
        self.lock = threading.RLock()
        self.flags = dict(flags)
        self.together: list[tuple[str, ...]] = []  # paths of leaves that share an input
        self.joined = False  # whether their sites know of each other
        self.looked = False  # whether what stands beside the leaves is fused as they are now
        self.owner: str | None = None  # who alone may change what is attached, and switch (a serving bank)
        self.fed: dict[str, nn.Module] = {}  # feed-forward modules and norms whose class is swapped

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.joined, self.owner = False, None  # a copied site has no group, and a copied model no bank
        self.lock = threading.RLock()

    # -- leaves ------------------------------------------------------------------------------------------------------

    def dress(self, model: nn.Module, new: Record | None = None) -> None:
        """Give every leaf that a record needs its adapted class, with a property for each parameter it replaces.

        new: the one record that was added since, so that adding one costs no more with a thousand resident; None = any.
        """
        before = len(self.leaves)
        for path, replaced in self.needed(new).items():
            leaf = self.leaves.get(path)
            if leaf is not None and new is not None:
                replaced = replaced | type(leaf)._lk_replaced  # type: ignore[attr-defined]
            if leaf is None:
                leaf = module_at(model, path)
                if "_lk_site" in leaf.__dict__:
                    raise AdapterError(
                        f"{path} already carries adapters that were attached through another module of this model. "
                        "Attach, switch and detach through one and the same module."
                    )
                _check_free(leaf, path)
                self.fed.pop(path, None)  # it takes the adapted class instead
            site = self.sites.get(path) or Site(path, None)
            wear(leaf, site, replaced)
            self.leaves[path], self.sites[path] = leaf, site
        if len(self.leaves) != before or not self.looked:
            self._look_around(model)

    def _look_around(self, model: nn.Module) -> None:
        """Find which leaves share an input, and which feed-forward modules have all their layers adapted."""
        below: dict[str, list[str]] = {}
        for path in self.leaves:
            parent, _, child = path.rpartition(".")
            below.setdefault(parent, []).append(child)
        together = []
        for parent, children in below.items():
            if len(children) < 2:
                continue
            module = module_at(model, parent)
            cls = plain(type(module))
            for names in siblings(cls):
                shared = tuple(f"{parent}.{name}" if parent else name for name in names if name in children)
                together += [shared] if len(shared) > 1 else []
            if parent not in self.fed and feed(module):
                self.fed[parent] = module
        self.together, self.joined, self.looked = together, False, True
        self._calm(model, below)

    def _calm(self, model: nn.Module, parents: Iterable[str]) -> None:
        """Fuse the norms that stand beside the adapted layers, and beside the modules that hold these."""
        for place in {holder for path in parents for holder in (path, path.rpartition(".")[0])}:
            for name, child in module_at(model, place)._modules.items():
                path = f"{place}.{name}" if place else name
                if child is not None and path not in self.fed and fuse_norm(child):
                    self.fed[path] = child

    def _join(self) -> None:
        """Make the sites of leaves that share an input known to each other."""
        for site in self.sites.values():
            site.group = None
        for paths in self.together:
            members = [(self.leaves[path], self.sites[path]) for path in paths if path in self.leaves]
            kinds = {low_rank_kind(type(leaf)) for leaf, _ in members}
            if len(members) > 1 and len(kinds) == 1 and isinstance(next(iter(kinds)), LinearKind):
                group = Group(members)
                for _, site in members:
                    site.group = group
        self.joined = True

    def part(self) -> None:
        """Give the feed-forward modules and norms their own classes back."""
        for module in self.fed.values():
            starve(module)
        self.fed.clear()
        self.looked = False

    def undress(self, keep: Iterable[str] = ()) -> None:
        """Give every leaf that is not in `keep` its own class back."""
        kept = set(keep)
        for path in [path for path in self.leaves if path not in kept]:
            bare(self.leaves.pop(path))
            del self.sites[path]
        self.part()
        self.joined = False

    def check_undressable(self) -> None:
        for leaf in self.leaves.values():
            check_bare(leaf)

    def needed(self, only: Record | None = None) -> dict[str, frozenset[str]]:
        """path -> names of the parameters that some adapter (`only` that one) replaces there, of every leaf that one needs."""
        names: dict[str, set[str]] = {}
        for record in self.records.values() if only is None else (only,):
            for path in record.paths():
                names.setdefault(path, set())
            for group in (record.draft.replaced, record.draft.raw):
                for path, own in group.items():
                    names[path].update(own)
        return {path: frozenset(own) for path, own in names.items()}

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
            if not self.joined:
                self._join()
            self.epoch += 1
            self.state = state
            mark = torch.tensor(self.epoch, device="cpu")
            on = [record.slots_at(k, strength, self.leaves) for k, (record, strength) in enumerate(records)]
            for k, (record, strength) in enumerate(records):
                for path, attribute, key, holder in record.standing_at(k, strength, self.leaves):
                    _put(self.leaves[path], attribute, read_of(holder, key))
            for path, site in self.sites.items():
                here = tuple(group.get(path, EMPTY) for group in on)
                used = any(slot is not EMPTY for slot in here)
                site.switch(here if used else (), state.route if used else None, self.epoch, mark)

    def _bring(self, record: Record) -> None:
        """Bring an adapter's tensors to the devices of their leaves."""
        for path, name, holder in record.places():
            tensor, device = read_of(holder, name), _device(self.leaves[path])
            if device is not None and tensor.device != device:
                note_in(holder, name, _moved(tensor, device))

    def _write_back(self) -> None:
        self._each(_take)

    def current(self) -> None:
        """Bring the records up to date with the tensors that stand on the leaves (`model.to()` makes new ones)."""
        self._each(getattr)

    def _each(self, read: Callable[[nn.Module, str], Tensor]) -> None:
        """Have `read` give each tensor that stands on a leaf, and note it in its record."""
        for k, (name, strength) in enumerate(self.state.selection):
            record = self.records[name]
            for path, attribute, key, holder in record.standing_at(k, strength, self.leaves):
                note_in(holder, key, read(self.leaves[path], attribute))


def _put(leaf: nn.Module, name: str, tensor: Tensor) -> None:
    if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):
        leaf._parameters[name] = tensor
    else:
        leaf._buffers[name] = tensor
        leaf._non_persistent_buffers_set.add(name)


def _device(leaf: nn.Module) -> torch.device | None:
    for parameter in leaf._parameters.values():
        if parameter is not None:
            return parameter.device
    return None


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device; a parameter stays the object that it is, for an optimizer may hold it."""
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
    """Raise where adapters cannot be changed or switched now: one is merged, or the model is being served."""
    if host.owner is not None:
        raise AdapterError(f"this model belongs to {host.owner}, which alone switches its adapters. Close that first.")
    if host.merged is not None:
        raise AdapterError(
            f"{', '.join(map(repr, host.merged.names))} is merged into the base. Call lorakit.unmerge(model) first."
        )
