"""Adapted linear layers whose rows come in stretches with an adapter each, in one autograd node: what trains many at once.

For layers i of one input x and stretches k of its rows: `y_i[k] = x[k] W_i^T + b_i + s_ik (x[k] A_ik^T) B_ik^T`, W_i frozen.
The base's product is one for all rows, forward and backward; the low-rank products run on slices, which cost no gather, each
at its pair's true rank, those of one stretch for all layers together (see lorakit.core.autograd for the layouts).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.autograd import check_epoch
from lorakit.core.gemm import base_gradient, base_product, product, scaled_product

Span = tuple[int, int]


class Pair(NamedTuple):
    """A: (r, in); Bt: (r, out)."""

    A: Tensor
    Bt: Tensor
    scale: float


class Layer(NamedTuple):
    """weight: (out, in), or (in, out) where `transposed`. pairs: one a stretch; None = the base alone there. exact: see
    lorakit.core.gemm.base_product."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    pairs: tuple[Pair | None, ...]
    exact: bool = True


@lru_cache(maxsize=64)
def stretches(index: tuple[int, ...]) -> tuple[tuple[int, int, int], ...] | None:
    """(slot, first row, row after the last) of each adapter of a routing index (-1 = the base, left out); None where an
    adapter's rows are not all neighbours."""
    found: list[tuple[int, int, int]] = []
    begin = 0
    for row in range(1, len(index) + 1):
        if row == len(index) or index[row] != index[begin]:
            if index[begin] >= 0:
                found.append((index[begin], begin, row))
            begin = row
    return tuple(found) if len({slot for slot, _, _ in found}) == len(found) else None


def grouped_linear(
    x: Tensor, spans: Sequence[Span], layers: Sequence[Layer], mark: Tensor, epoch: int
) -> tuple[Tensor, ...]:
    """The outputs of all layers on x, (..., in). spans: the rows of x as (tokens, in) that each stretch takes, apart from
    each other. mark, epoch: see lorakit.core.autograd.check_epoch. A second derivative is refused by torch."""
    settings = tuple(
        (one.transposed, one.exact, tuple(None if pair is None else pair.scale for pair in one.pairs)) for one in layers
    )
    tensors: list[Tensor | None] = []
    for one in layers:
        tensors += [one.weight, one.bias]
        tensors += [tensor for pair in one.pairs if pair is not None for tensor in pair[:2]]
    return GroupedLinear.apply(x, tuple(spans), settings, mark, epoch, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class _Places(NamedTuple):
    """Where a layer's tensors stand among all: its weight (the bias is next), and of each stretch (A, before Bt; the scale)."""

    weight: int
    transposed: bool
    exact: bool
    pairs: tuple[tuple[int, float] | None, ...]


def _places(settings: Any) -> list[_Places]:
    found, at = [], 0
    for transposed, exact, scales in settings:
        weight, at, pairs = at, at + 2, []
        for scale in scales:
            pairs.append(None if scale is None else (at, scale))
            at += 0 if scale is None else 2
        found.append(_Places(weight, transposed, exact, tuple(pairs)))
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


class GroupedLinear(torch.autograd.Function):
    """See the module and grouped_linear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spans: tuple[Span, ...], settings: Any, mark: Tensor, epoch: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        x2, places = x.reshape(-1, x.shape[-1]), _places(settings)
        outputs = [
            base_product(x, tensors[one.weight], tensors[one.weight + 1], one.transposed, one.exact) for one in places
        ]
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        kept: list[Tensor | None] = []
        for k, (start, stop) in enumerate(spans):
            here = [(i, *one.pairs[k]) for i, one in enumerate(places) if one.pairs[k] is not None]  # type: ignore[misc]
            if not here:
                kept.append(None)
                continue
            xa_t = product(_joined([tensors[at] for _, at, _ in here]), x2[start:stop], tokens=stop - start)
            low = 0
            for i, at, scale in here:
                high = low + tensors[at].shape[0]
                flat[i][start:stop].addmm_(xa_t[low:high].t(), tensors[at + 1], alpha=scale)
                low = high
            kept.append(xa_t)
        ctx.save_for_backward(x, mark, *kept, *tensors)
        ctx.spans, ctx.settings, ctx.epoch = spans, settings, epoch
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mark, *rest = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        kept, tensors = rest[: len(ctx.spans)], rest[len(ctx.spans) :]
        places, x2 = _places(ctx.settings), x.reshape(-1, x.shape[-1])
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads]
        found: list[Tensor | None] = [None] * len(tensors)
        dx = _gradient_of_base(places, tensors, dys) if ctx.needs_input_grad[0] else None
        needs = ctx.needs_input_grad[5:]
        for k, (start, stop) in enumerate(ctx.spans):
            here = [(dys[i], *one.pairs[k]) for i, one in enumerate(places) if one.pairs[k] is not None]  # type: ignore[misc]
            if not here:
                continue
            xa_t, low = kept[k], 0
            dyb_t = torch.zeros_like(xa_t) if any(dy is None for dy, _, _ in here) else torch.empty_like(xa_t)
            for dy, at, scale in here:
                high = low + tensors[at].shape[0]
                if dy is not None:
                    scaled_product(tensors[at + 1], dy[start:stop], scale, dyb_t[low:high], tokens=stop - start)
                    if needs[at + 1]:
                        out = torch.empty_like(tensors[at + 1])
                        found[at + 1] = scaled_product(
                            xa_t[low:high], dy[start:stop].t(), scale, out, tokens=stop - start
                        )
                low = high
            if any(needs[at] for _, at, _ in here):
                dA = product(dyb_t, x2[start:stop].t(), tokens=stop - start)
                parts = torch.split(dA, [tensors[at].shape[0] for _, at, _ in here])
                for (_, at, _), part in zip(here, parts, strict=True):
                    found[at] = part
            if dx is not None:
                dx[start:stop].addmm_(dyb_t.t(), _joined([tensors[at] for _, at, _ in here]))
        return (None if dx is None else dx.view(x.shape), None, None, None, None, *found)


def _gradient_of_base(places: list[_Places], tensors: Sequence[Any], dys: Sequence[Tensor | None]) -> Tensor | None:
    """`sum of dy_i W_i` over the layers, (tokens, in)."""
    dx: Tensor | None = None
    for one, dy in zip(places, dys, strict=True):
        if dy is not None:
            dx = base_gradient(dy, tensors[one.weight], one.transposed, dx)
    return dx
