"""Several adapted linear layers of one input (q, k, v; gate, up) as one autograd node, with or without dropout.

`y_i = x W_i^T + b_i + s_i (d(x) A_i^T) B_i^T`, W_i frozen, d the dropout that all share. Against a node a layer it
computes all `A_i x` in one product, and writes the n gradients of x into one tensor instead of adding n up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.autograd import check_epoch
from lorakit.core.dropout import keep_mask, kept
from lorakit.core.gemm import base_gradient, base_product, product


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
        x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
        As: Any = tensors[2::4]
        A = torch.cat(As) if len(As) > 1 else As[0]  # (sum of ranks, in)
        keep, factor = keep_mask(x2, dropout) if dropout else (None, 1.0)
        xa_t = product(A, kept(x2, keep))  # (sum of ranks, tokens)
        outputs, start = [], 0
        for i, (scale, transposed, exact) in enumerate(settings):
            weight, bias, own, Bt = tensors[4 * i : 4 * i + 4]
            y = base_product(x, weight, bias, transposed, exact)  # type: ignore[arg-type]
            end = start + own.shape[0]  # type: ignore[union-attr]
            y.view(-1, y.shape[-1]).addmm_(xa_t[start:end].t(), Bt, alpha=scale * factor)  # type: ignore[arg-type]
            outputs.append(y)
            start = end
        ctx.save_for_backward(x, xa_t, keep, mark, *tensors)
        ctx.settings, ctx.factor, ctx.epoch = settings, factor, epoch
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, xa_t, keep, mark, *tensors = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        x2 = x.reshape(-1, x.shape[-1])
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads]
        needs = ctx.needs_input_grad
        As = tensors[2::4]
        found: list[Tensor | None] = [None] * len(tensors)
        dyb_t = torch.zeros_like(xa_t) if any(dy is None for dy in dys) else torch.empty_like(xa_t)
        dx, start = None, 0
        for i, (scale, transposed, _) in enumerate(ctx.settings):
            weight, _, A, Bt = tensors[4 * i : 4 * i + 4]
            dy, rows = dys[i], slice(start, start + A.shape[0])
            start = rows.stop
            if dy is None:
                continue
            torch.mul(product(Bt, dy), scale * ctx.factor, out=dyb_t[rows])
            if needs[0]:
                dx = base_gradient(dy, weight, transposed, dx)
            if needs[5 + 4 * i + 1]:
                found[4 * i + 1] = dy.sum(0)
            if needs[5 + 4 * i + 3]:
                found[4 * i + 3] = product(xa_t[rows], dy.t()).mul_(scale * ctx.factor)
        if any(needs[5 + 4 * i + 2] for i in range(len(As))):
            dA = product(dyb_t, kept(x2, keep).t())
            found[2::4] = list(dA.split([A.shape[0] for A in As]))
        if dx is not None:
            dx = _low_rank_gradient(dx, dyb_t, As, keep).view(x.shape)
        return dx, None, None, None, None, *found


def _low_rank_gradient(dx: Tensor, dyb_t: Tensor, As: list[Tensor], keep: Tensor | None) -> Tensor:
    """dx with what the low-rank products add: `(B^T dy^T)^T A`, where dropout kept the entry."""
    A = torch.cat(As) if len(As) > 1 else As[0]
    if keep is None:
        return dx.addmm_(dyb_t.t(), A)
    return dx.addcmul_(dyb_t.t() @ A, keep.to(dx.dtype))
