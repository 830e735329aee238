"""Several adapted linear layers of one input (q, k, v; gate, up) as one autograd node, with or without dropout.

`y_i = x W_i^T + b_i + s_i (d(x) A_i^T) B_i^T`, W_i frozen, d the dropout that all share. Against a node a layer it
computes all `A_i x` in one product, and writes the n gradients of x into one tensor instead of adding n up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.autograd import check_epoch
from lorakit.core.dropout import add_where_kept_, draw, without, zeroed_
from lorakit.core.gemm import base_gradient, base_product, product, scaled_product


class Member(NamedTuple):
    """One layer. weight: (out, in), or (in, out) where `transposed`; A: (r, in); Bt: (r, out). exact: see
    lorakit.core.gemm.base_product."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    Bt: Tensor
    scale: float
    transposed: bool
    exact: bool = True


Setting = tuple[float, bool, bool]


def flattened(members: list[Member]) -> tuple[tuple[Setting, ...], list[Tensor | None]]:
    """((scale, transposed, exact) a member, [weight, bias, A, Bt a member]): autograd looks for tensors in no nested argument."""
    tensors = [tensor for one in members for tensor in (one.weight, one.bias, one.A, one.Bt)]
    return tuple((one.scale, one.transposed, one.exact) for one in members), tensors


def low_rank_siblings(x: Tensor, members: list[Member], dropout: float, mark: Tensor, epoch: int) -> tuple[Tensor, ...]:
    """The outputs of all members on x: (..., in). dropout: the probability, 0 outside training. mark, epoch: see
    lorakit.core.autograd.check_epoch. A second derivative is refused by torch with an error."""
    settings, tensors = flattened(members)
    return LowRankSiblings.apply(x, settings, dropout, mark, epoch, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class LowRankSiblings(torch.autograd.Function):
    """See the module and low_rank_siblings."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        settings: tuple[Setting, ...],
        dropout: float,
        mark: Tensor,
        epoch: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        drawn, factor = draw(x.reshape(-1, x.shape[-1]), dropout) if dropout else (None, 1.0)
        outputs, xa_t = outputs_of(x, settings, tensors, drawn, factor)
        ctx.save_for_backward(x, xa_t, drawn, mark, *tensors)
        ctx.settings, ctx.factor, ctx.epoch = settings, factor, epoch
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, xa_t, drawn, mark, *tensors = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dx, dyb_t, found = gradients_of(dys, xa_t, ctx.settings, tensors, drawn, ctx.factor, need_x, needs)
        if any(needs[2::4]):
            found[2::4] = a_gradients(dyb_t, without(x.reshape(-1, x.shape[-1]), drawn), tensors)
        return None if dx is None else dx.view(x.shape), None, None, None, None, *found


def outputs_of(
    x: Tensor,
    settings: Sequence[Setting],
    tensors: Sequence[Any],
    drawn: Tensor | None,
    factor: float,
    *,
    last: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """(each member's output on x, `A d(x)` of all members one below the other, (sum of ranks, tokens)).

    settings, tensors: as `flattened` gives them. drawn, factor: see lorakit.core.dropout.draw. last: no one reads x, which is
    contiguous, any more: it becomes d(x).
    """
    x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
    outputs = [
        base_product(x, tensors[4 * i], tensors[4 * i + 1], transposed, exact)
        for i, (_, transposed, exact) in enumerate(settings)
    ]
    dx2 = zeroed_(x2, drawn) if last and drawn is not None else without(x2, drawn)
    xa_t, start = product(_joined(tensors[2::4]), dx2, tokens=len(x2)), 0
    for y, (scale, _, _), A, Bt in zip(outputs, settings, tensors[2::4], tensors[3::4], strict=True):
        end = start + A.shape[0]
        y.view(-1, y.shape[-1]).addmm_(xa_t[start:end].t(), Bt, alpha=scale * factor)
        start = end
    return outputs, xa_t


def gradients_of(
    dys: Sequence[Tensor | None],
    xa_t: Tensor,
    settings: Sequence[Setting],
    tensors: Sequence[Any],
    drawn: Tensor | None,
    factor: float,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """(the gradient of x as (tokens, in), `s B^T dy^T` of all members one below the other, the gradients of the tensors but
    for those of the A's, see a_gradients). dys: (tokens, out) a member, None where its output was not used; needs: one flag
    a tensor."""
    found: list[Tensor | None] = [None] * len(tensors)
    dyb_t = torch.zeros_like(xa_t) if any(dy is None for dy in dys) else torch.empty_like(xa_t)
    dx, start = None, 0
    for i, (dy, (scale, transposed, _)) in enumerate(zip(dys, settings, strict=True)):
        weight, _, A, Bt = tensors[4 * i : 4 * i + 4]
        rows = slice(start, start + A.shape[0])
        start = rows.stop
        if dy is None:
            continue
        scaled_product(Bt, dy, scale * factor, dyb_t[rows], tokens=dy.shape[0])
        if need_x:
            dx = base_gradient(dy, weight, transposed, dx)
        if needs[4 * i + 1]:
            found[4 * i + 1] = dy.sum(0)
        if needs[4 * i + 3]:
            found[4 * i + 3] = scaled_product(
                xa_t[rows], dy.t(), scale * factor, torch.empty_like(Bt), tokens=dy.shape[0]
            )
    if dx is not None and drawn is None:
        dx.addmm_(dyb_t.t(), _joined(tensors[2::4]))
    elif dx is not None:
        add_where_kept_(dx, dyb_t.t(), _joined(tensors[2::4]), drawn)  # type: ignore[arg-type]
    return dx, dyb_t, found


def a_gradients(dyb_t: Tensor, x2: Tensor, tensors: Sequence[Any]) -> list[Tensor]:
    """The gradients of the members' A's, `(s B^T dy^T) d(x)`. dyb_t: see gradients_of; x2: d(x), (tokens, in)."""
    dA = product(dyb_t, x2.t(), tokens=len(x2))
    return list(torch.split(dA, [A.shape[0] for A in tensors[2::4]]))


def _joined(As: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(As)) if len(As) > 1 else As[0]
