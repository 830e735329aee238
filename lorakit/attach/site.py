"""What an adapted leaf carries: which adapters are on, under which attribute names their tensors stand on the leaf."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.core.autograd import SWITCHED
from lorakit.core.route import Route
from lorakit.errors import AdapterError


class LowRank(NamedTuple):
    """One active low-rank pair of a leaf. The tensors are read through the leaf at each call, because `model.to()`,
    FSDP and `load_state_dict(assign=True)` put others in their place."""

    a: str  # attribute name of A, (r, in), or of At, (vocab, r), for an embedding
    b: str  # attribute name of Bt, (r, out)
    scale: float
    scale_tensor: Tensor  # the same as a 0-dim tensor: under torch.compile a new value then recompiles nothing
    dropout: float


class Slot(NamedTuple):
    """What one active adapter does at one leaf."""

    low: LowRank | None
    replaced: dict[str, str]  # parameter name -> attribute name of the tensor that stands for it
    strength: float


class Site:
    """The state of one adapted leaf. It does not refer to the host, so that a leaf can be copied on its own."""

    __slots__ = ("active", "epoch", "inner", "mark", "only", "path", "route", "seen")

    def __init__(self, path: str, inner: Callable[..., Any] | None) -> None:
        self.path = path
        self.inner = inner  # an instance `forward` that was there before (accelerate's hooks), else None
        self.active: tuple[Slot, ...] = ()
        self.route: Route | None = None
        self.only: int | None = None  # while a routed group is computed: the one slot that is on; -1 = the base
        self.epoch = 0  # the host's epoch when this site was last switched
        self.seen = 0  # the epoch of the last forward outside a backward pass
        self.mark = torch.tensor(0, device="cpu")

    def switch(self, active: tuple[Slot, ...], route: Route | None, epoch: int) -> None:
        self.active, self.route, self.epoch = active, route, epoch
        self.mark = torch.tensor(epoch, device="cpu")

    def notice(self) -> None:
        """Called on the first forward after a switch. Inside a backward pass that can only be a checkpoint's recompute."""
        if torch._C._current_graph_task_id() != -1:
            raise AdapterError(f"{self.path}: {SWITCHED}")
        self.seen = self.epoch


def replacement(leaf: torch.nn.Module, site: Site, name: str) -> Tensor | None:
    """What stands for parameter `name` of a leaf: an adapter's own tensor, or `W + strength * (W' - W)`.

    With one adapter at strength 1 it is the very tensor, so that gradients reach it and nothing is computed.
    """
    base = leaf._parameters[name]
    slots = site.active if site.only is None else site.active[site.only : site.only + 1] if site.only >= 0 else ()
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
