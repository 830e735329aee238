"""A layer whose rows take different adapters, without gradients: on stacks of pairs (see lorakit.core.batched).

`lorakit.route` stacks the pairs that stand on the leaf; a serving bank has stacks of its own, which it keeps up to date.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.attach.site import LowRank, Site, Slot
from lorakit.core.batched import Plan, Span, Stack, Tables
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
        stack: Stack | Tables | None = route.stacks.get(site.path)
        plan = route.of(site.path, leading, rows)
        if stack is None or plan is None:
            return call(x)  # type: ignore[no-any-return]
    else:
        stack = _stack_of(kind, leaf, site, x)
        if stack is None:
            return None
        plan = route.plan(leading, rows)
    return _computed(kind, leaf, site, call, x, stack, plan)


def _computed(
    kind: "LeafKind", leaf: nn.Module, site: Site, call: "Call", x: Tensor, stack: Stack | Tables, plan: Plan
) -> Tensor:
    y: Tensor = call(x)
    like = stack.A if isinstance(stack, Stack) else y
    steps = plan.steps(stack, like)
    if not steps.runs:
        return y
    own = site.inner is None and type(leaf)._lk_stock  # type: ignore[attr-defined]  # y is no one else's
    out = y if own and y.is_contiguous() and y.dtype == like.dtype else y.to(like.dtype, copy=True).contiguous()
    flat = x.reshape(-1, *x.shape[x.dim() - kind.row_width(x) :])
    if flat.is_floating_point() and flat.dtype != like.dtype:
        flat = flat.to(like.dtype)
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
