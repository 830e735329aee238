"""A layer whose rows take different adapters, without gradients: on stacks of pairs (see lorakit.core.batched).

`lorakit.route` stacks the pairs that stand on the leaf; a serving bank has stacks of its own, which it keeps up to date.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.attach.site import LowRank, Site, Slot
from lorakit.core.batched import Plan, Span, Stack, Steps, Tables
from lorakit.core.kernels import autocasting
from lorakit.core.route import Live
from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from lorakit.attach.kinds.base import Call, LeafKind


def mixed(kind: "LeafKind", leaf: nn.Module, site: Site, call: "Call", x: Tensor) -> Tensor | None:
    """The leaf's output where its rows' adapters can be computed from stacks; None where they cannot."""
    route: Any = site.route
    leading = x.shape[0] if x.dim() > kind.row_width(x) else 1
    rows = x.numel() // x.shape[-1] if kind.row_width(x) else x.numel()
    if isinstance(route, Live):
        return _served(kind, leaf, site, route.of(site.path, leading, rows), call(x), x)
    stack = _stack_of(kind, leaf, site, x)
    if stack is None:
        return None
    plan = route.plan(leading, rows)
    y: Tensor = call(x)
    return _added(kind, leaf, site, y, x, stack, plan.steps(stack, stack.A if isinstance(stack, Stack) else y))


def _served(kind: "LeafKind", leaf: nn.Module, site: Site, plan: Plan | None, y: Tensor, x: Tensor) -> Tensor:
    """The output of a bank's layer; what was worked out on the way is kept for the next call like this one."""
    route: Any = site.route
    stack: Stack | Tables | None = route.stacks.get(site.path)
    if stack is None or plan is None:
        return y
    site.ready = None
    like = stack.A if isinstance(stack, Stack) else y
    steps = plan.steps(stack, like)
    if isinstance(stack, Stack) and _owned(leaf, site, y, like) and x.dtype == y.dtype and x.device == y.device:
        site.ready = Ready(kind, route, stack, steps, x, y)
    return _added(kind, leaf, site, y, x, stack, steps)


def _owned(leaf: nn.Module, site: Site, y: Tensor, like: Tensor) -> bool:
    """Whether a product can be added to the layer's output in place."""
    stock = site.inner is None and type(leaf)._lk_stock  # type: ignore[attr-defined]  # y is no one else's
    return stock and y.is_contiguous() and y.dtype == like.dtype


class Ready:
    """A served layer's way through a step, found by a call of the same step, layout, shape and type: nothing is looked up."""

    __slots__ = (
        "bound", "dtype", "inputs", "key", "kind", "lines", "outputs", "route", "shape", "shaped", "stack", "step",
        "steps",
    )  # fmt: skip

    def __init__(self, kind: "LeafKind", route: Live, stack: Stack, steps: Steps, x: Tensor, y: Tensor) -> None:
        self.kind, self.route, self.step, self.steps = kind, route, route.step, steps
        self.stack, self.key = stack, stack.key
        self.shape, self.dtype = x.shape, x.dtype
        self.bound = stack.bound(steps) if steps.runs else None
        self.lines = None if self.bound is None else self.bound.lines
        lead = (x.numel() // x.shape[-1],) if self.lines is None else self.lines.lead
        self.inputs, self.outputs = (*lead, x.shape[-1]), (*lead, y.shape[-1])
        self.shaped = x.shape == self.inputs

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these is such a call."""
        if kwargs or len(args) != 1:
            return False
        x = args[0]
        return (
            self.route.step is self.step
            and self.stack.key == self.key
            and x.shape == self.shape
            and x.dtype is self.dtype
        )

    def add_(self, leaf: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """y, the layer's own output on x, with what the tokens' adapters add."""
        bound = self.bound
        if bound is None:
            return y
        if y.dtype is not self.dtype:  # under autocast
            return _added(self.kind, leaf, leaf._lk_site, y, x, self.stack, self.steps)  # type: ignore[arg-type]
        out, flat = (y, x) if self.shaped else (y.view(self.outputs), x.reshape(self.inputs))
        if self.lines is not None:
            self.lines.add_(out, flat)
        else:
            bound.add_(out, flat, None if bound.rescale is None else leaf.bias)  # type: ignore[arg-type]
        return y


def _added(
    kind: "LeafKind", leaf: nn.Module, site: Site, y: Tensor, x: Tensor, stack: Stack | Tables, steps: Steps
) -> Tensor:
    if not steps.runs:
        return y
    like = stack.A if isinstance(stack, Stack) else y
    out = y if _owned(leaf, site, y, like) else y.to(like.dtype, copy=True).contiguous()
    flat = x.reshape(-1, *x.shape[x.dim() - kind.row_width(x) :])
    if flat.is_floating_point() and flat.dtype != like.dtype:
        flat = flat.to(like.dtype)
    with torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext():  # the pairs keep their type
        kind.add_mixed(leaf, out.view(-1, out.shape[-1]), flat, stack, steps)
    return out if out is y else out.to(y.dtype)


def check_plain(slot: Slot, leaf: nn.Module) -> bool:
    """Whether stacks hold all that an adapter does at a leaf."""
    low = slot.low
    dropping = low is not None and bool(low.dropout) and leaf.training
    return slot.rows is None and not slot.own and not dropping and slot.strength in (0.0, 1.0)


def _stack_of(kind: "LeafKind", leaf: nn.Module, site: Site, x: Tensor) -> Stack | Tables | None:
    """The stack of what stands on the leaf; kept with the route while none of the tensors is another or changed."""
    route: Any = site.route
    kept = route.stacks.get(site.path)
    if kept is not None:
        stack, known, dtype = kept
        if dtype == x.dtype and all(_unchanged(leaf, *one) for one in known):
            return stack  # type: ignore[no-any-return]
        del route.stacks[site.path]
    if not kind.mixes or not all(check_plain(slot, leaf) for slot in site.active):
        return None
    stack = stacked(kind, leaf, {k: slot.low for k, slot in enumerate(site.active) if slot.low is not None}, x)
    names = [name for slot in site.active if slot.low is not None for name in _names(slot.low)]
    held = [(name, leaf._buffers.get(name)) for name in names]
    sources = [(name, tensor, _version(tensor)) for name, tensor in held if tensor is not None]
    if len(sources) == len(names):  # none of them is trained
        route.stacks[site.path] = (stack, sources, x.dtype)
    return stack


def _unchanged(leaf: nn.Module, name: str, tensor: Tensor, version: int) -> bool:
    return leaf._buffers.get(name) is tensor and _version(tensor) == version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _names(low: LowRank) -> list[str]:
    return [name for name in (low.a, low.b, low.magnitude, low.bias, low.fixed_a, low.fixed_b) if name is not None]


def stacked(kind: "LeafKind", leaf: nn.Module, lows: dict[int, LowRank], x: Tensor) -> Stack | Tables:
    """The pairs that stand on a leaf, in one stack, in the input's type where that is one to compute in."""
    dtype = x.dtype if x.is_floating_point() else None
    factors = {k: low.factors(leaf) for k, low in lows.items()}
    gains = {k: kind.gain(leaf, *factors[k], low) for k, low in lows.items() if low.magnitude is not None}
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for k, (A, Bt) in factors.items():
        Bt = Bt * gains[k].to(Bt.dtype) if k in gains else Bt
        pairs[k] = (A, Bt) if dtype is None else (A.to(dtype), Bt.to(dtype))
    spans, start = {}, 0
    for k, low in lows.items():
        spans[k] = Span(start, pairs[k][1].shape[0], low.scale)
        start = spans[k].end
    key = tuple(spans.items())
    if dtype is None:
        return Tables(pairs, spans, key, gains)
    empty = x.new_zeros(0, x.shape[-1])
    stack = Stack(
        torch.cat([A for A, _ in pairs.values()]) if pairs else empty,
        torch.cat([Bt for _, Bt in pairs.values()]) if pairs else empty,
        spans,
        key,
    )
    stack.gains = gains
    for k, low in lows.items():
        if low.bias is not None:
            shift = getattr(leaf, low.bias) * low.scale
            stack.shifts[k] = shift * gains[k].to(shift.dtype) if k in gains else shift
    return stack


def refuse_gradients(site: Site) -> None:
    """Raise where a served model is to record gradients."""
    if isinstance(site.route, Live) and site.route.serving:
        raise AdapterError(
            f"{site.path}: this model is being served, and cannot be trained at the same time. Close its engine and bank first."
        )
