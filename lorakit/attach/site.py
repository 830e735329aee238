"""What an adapted leaf carries: which adapters are on, under which attribute names their tensors stand on the leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from lorakit.attach.method import effective
from lorakit.attach.operation import Operation
from lorakit.core.autograd import SWITCHED
from lorakit.core.delta import expert_delta, guarded
from lorakit.core.route import Route
from lorakit.errors import AdapterError


@dataclass(slots=True)
class LowRank:
    """One active low-rank pair of a leaf. The tensors are read through the leaf at each call, because `model.to()`,
    FSDP and `load_state_dict(assign=True)` put others in their place.

    No tuple of names: torch.compile would look at all of it, and compile anew for another scale."""

    a: str  # attribute name of A, (r, in), or of At, (vocab, r), for an embedding
    b: str  # attribute name of Bt, (r, out)
    scale: float  # the pair's own times the strength
    scale_tensor: Tensor  # the same as a 0-dim tensor: under torch.compile a new value then recompiles nothing
    dropout: float
    strength: float
    magnitude: str | None  # attribute names of what the pair may have besides (see lorakit.attach.method.Pair)
    bias: str | None
    fixed_a: str | None
    fixed_b: str | None
    parts: tuple[bool, ...] | None
    crossed: bool  # the pair of an embedding, seen by the head whose weight it shares
    plain: bool  # nothing but A and Bt: what the fused function and in-place addition take

    def factors(self, leaf: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """(A, Bt) as the leaf's kind takes them."""
        A, Bt = getattr(leaf, self.a), getattr(leaf, self.b)
        if self.parts is not None or self.fixed_a is not None:
            fixed_a = None if self.fixed_a is None else getattr(leaf, self.fixed_a)
            fixed_bt = None if self.fixed_b is None else getattr(leaf, self.fixed_b)
            A, Bt = effective(A, Bt, self.parts, fixed_a, fixed_bt)
        return (Bt, A.t()) if self.crossed else (A, Bt)


@dataclass(slots=True)
class Slot:
    """What one active adapter does at one leaf."""

    low: LowRank | None
    replaced: dict[str, str]  # parameter name -> attribute name of the tensor that stands for it
    strength: float
    raw: dict[str, LowRank]  # parameter name -> the pair on it, where the module reads the parameter itself
    rows: str | None  # attribute name of an embedding's rows that are trained in full
    indices: str | None  # attribute name of their numbers
    inserts: tuple[
        tuple[Operation, dict[str, str]], ...
    ] = ()  # and {name of a tensor: attribute name}, innermost first

    @property
    def own(self) -> bool:
        """Whether a parameter of the leaf is another one while this adapter is on."""
        return bool(self.replaced or self.raw)


class Site:
    """The state of one adapted leaf. It does not refer to the host, so that a leaf can be copied on its own."""

    __slots__ = (
        "active", "born", "epoch", "group", "inner", "inserts", "kept", "mark", "only", "path", "ready", "route", "seen",
        "thread",
    )  # fmt: skip

    def __init__(self, path: str, inner: Callable[..., Any] | None) -> None:
        self.path = path
        self.inner = inner  # an instance `forward` that was there before (accelerate's hooks), else None
        self.active: tuple[Slot, ...] = ()
        self.inserts = False  # whether any of them computes something besides the leaf
        self.route: Route | None = None
        self.only: dict[int, int] = {}  # thread -> the one slot that is on while it computes a routed group; -1 = base
        self.ready: Any = None  # lorakit.attach.kinds.mixed.Ready: the way through a step, as the last call found it
        self.group: Any = None  # lorakit.attach.group.Group: the layers that share this one's input
        self.kept: dict[int, dict[str, Tensor]] = {}  # thread -> raw parameters as adapted, while a forward runs
        self.epoch = 0  # the host's epoch when this site was last switched
        self.seen = 0  # the epoch of the last forward outside a backward pass
        self.born, self.thread = 0, 0  # autograd's sequence number at the last switch, in the thread that counts it
        self.mark = torch.tensor(0, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        """All but what holds in this process alone."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"born": 0, "thread": 0, "only": {}, "kept": {}, "group": None, "ready": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def switch(self, active: tuple[Slot, ...], route: Route | None, epoch: int, mark: Tensor) -> None:
        """mark: a 0-dim CPU tensor that holds `epoch` (see lorakit.core.autograd.check_epoch)."""
        self.active, self.route, self.epoch, self.mark, self.ready = active, route, epoch, mark, None
        self.inserts = any(slot.inserts for slot in active)
        self.born, self.thread = torch._C._autograd._get_sequence_nr(), get_ident()

    def notice(self) -> None:
        """Raise where this forward is a checkpoint's recompute of one that ran before the last switch.

        A forward inside a backward pass can only be a recompute. The node that asks for it is older than the switch when
        its sequence number is lower; those count per thread, so a forward in another thread ends the comparison.
        """
        if torch._C._current_graph_task_id() == -1:
            if self.thread != get_ident():
                self.born, self.thread = 0, get_ident()
            self.seen = self.epoch
            return
        node = torch._C._current_autograd_node()
        if self.seen != self.epoch or (node is not None and node._sequence_nr() < self.born):
            raise AdapterError(f"{self.path}: {SWITCHED}")


def this_thread() -> int:
    """The thread's number; 0 while torch.compile traces, which cannot trace it."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def replacement(leaf: torch.nn.Module, site: Site, name: str) -> Tensor | None:
    """What stands for parameter `name` of a leaf: an adapter's own tensor, `W + strength * (W' - W)`, or W plus an update.

    With one adapter at strength 1 it is the very tensor, so that gradients reach it and nothing is computed. Within one
    forward an updated parameter is computed once, however often its module reads it.
    """
    base = leaf._parameters[name]
    slots = site.active
    if site.route is not None:
        only = site.only.get(this_thread())
        slots = slots if only is None else slots[only : only + 1] if only >= 0 else ()
    found = [(getattr(leaf, slot.replaced[name]), slot.strength) for slot in slots if name in slot.replaced]
    updates = [slot.raw[name] for slot in slots if name in slot.raw]
    if updates:
        return _updated(leaf, site, name, updates)
    if not found:
        return base
    if len(found) == 1 and found[0][1] == 1.0:
        return found[0][0]  # type: ignore[no-any-return]
    if base is None:
        raise AdapterError(f"{site.path}.{name}: the base has no such parameter to weigh an adapter's against.")
    total = base
    for tensor, strength in found:
        total = total + strength * (tensor - base)
    return total


def _updated(leaf: torch.nn.Module, site: Site, name: str, updates: list[LowRank]) -> Tensor:
    """A raw parameter with its updates, for a module that reads it itself."""
    if site.route is not None:
        raise AdapterError(
            f"{site.path}.{name} is read by its module for all rows at once, so rows of one batch cannot take different "
            "adapters there. Run one adapter at a time with lorakit.use."
        )
    kept = site.kept.get(this_thread())
    if kept is not None and name in kept:
        return kept[name]
    base: Tensor = leaf._parameters[name]  # type: ignore[assignment]
    total = base
    for low in updates:
        delta = raw_delta(leaf, site, name, low, base.dtype)
        checked = delta.requires_grad and not torch.compiler.is_compiling()
        total = total + (guarded(delta, site.mark, site.epoch) if checked else delta)
    if kept is not None:
        kept[name] = total
    return total


def raw_delta(leaf: torch.nn.Module, site: Site, name: str, low: LowRank, dtype: torch.dtype) -> Tensor:
    """The update of a raw parameter in its own layout: (out, in), or a stack of experts' (see expert_delta)."""
    A, Bt = (factor.to(dtype) for factor in low.factors(leaf))
    scale = low.scale_tensor.to(dtype) if torch.compiler.is_compiling() else low.scale
    parameter: Tensor = leaf._parameters[name]  # type: ignore[assignment]
    if parameter.dim() == 2:
        return (Bt.t() @ A) * scale
    return expert_delta(A, Bt, parameter.shape[0], scale, transposed=bool(getattr(leaf, "is_transposed", False)))
