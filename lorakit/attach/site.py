"""What an adapted leaf carries: which adapters are on, under which attribute names their tensors stand on the leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from lorakit.core.autograd import SWITCHED
from lorakit.core.route import Route
from lorakit.errors import AdapterError


@dataclass(slots=True)
class LowRank:
    """One active low-rank pair of a leaf. The tensors are read through the leaf at each call, because `model.to()`,
    FSDP and `load_state_dict(assign=True)` put others in their place.

    No tuple: torch.compile would look at all of it, and compile anew for another scale."""

    a: str  # attribute name of A, (r, in), or of At, (vocab, r), for an embedding
    b: str  # attribute name of Bt, (r, out)
    scale: float
    scale_tensor: Tensor  # the same as a 0-dim tensor: under torch.compile a new value then recompiles nothing
    dropout: float


@dataclass(slots=True)
class Slot:
    """What one active adapter does at one leaf."""

    low: LowRank | None
    replaced: dict[str, str]  # parameter name -> attribute name of the tensor that stands for it
    strength: float


class Site:
    """The state of one adapted leaf. It does not refer to the host, so that a leaf can be copied on its own."""

    __slots__ = ("active", "born", "epoch", "inner", "mark", "only", "path", "route", "seen", "thread")

    def __init__(self, path: str, inner: Callable[..., Any] | None) -> None:
        self.path = path
        self.inner = inner  # an instance `forward` that was there before (accelerate's hooks), else None
        self.active: tuple[Slot, ...] = ()
        self.route: Route | None = None
        self.only: dict[int, int] = {}  # thread -> the one slot that is on while it computes a routed group; -1 = base
        self.epoch = 0  # the host's epoch when this site was last switched
        self.seen = 0  # the epoch of the last forward outside a backward pass
        self.born, self.thread = 0, 0  # autograd's sequence number at the last switch, in the thread that counts it
        self.mark = torch.tensor(0, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        """All but what holds in this process alone."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"born": 0, "thread": 0, "only": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def switch(self, active: tuple[Slot, ...], route: Route | None, epoch: int, mark: Tensor) -> None:
        """mark: a 0-dim CPU tensor that holds `epoch` (see lorakit.core.autograd.check_epoch)."""
        self.active, self.route, self.epoch, self.mark = active, route, epoch, mark
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
    """What stands for parameter `name` of a leaf: an adapter's own tensor, or `W + strength * (W' - W)`.

    With one adapter at strength 1 it is the very tensor, so that gradients reach it and nothing is computed.
    """
    base = leaf._parameters[name]
    slots = site.active
    if site.route is not None:
        only = site.only.get(this_thread())
        slots = slots if only is None else slots[only : only + 1] if only >= 0 else ()
    found = [(getattr(leaf, slot.replaced[name]), slot.strength) for slot in slots if name in slot.replaced]
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
