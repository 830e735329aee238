"""Autograd functions: the adapted linear layer as one node, and the guard against a switch under checkpointing.

`y = x W^T + b + s (x A^T) B^T` with W frozen. Autograd's own graph for it computes dB as `dy^T (x A^T)`, whose
inner rows are r long; here every low-rank product keeps its long axis contiguous (docs/benchmarks.md has the figure):
`dA = s (B^T dy^T) x`, `dB^T = s (A x^T) dy`, `dx = dy W + s (B^T dy^T)^T A`, and dW is never formed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.gemm import base_gradient, base_product, product, scaled_product
from lorakit.errors import AdapterError

SWITCHED = (
    "the active adapter changed between a forward pass and its backward pass under gradient checkpointing, so the "
    "recomputed activations belong to another adapter and the gradients would be wrong. Call backward() before "
    "lorakit.use, route, attach or detach, or switch gradient checkpointing off."
)


def check_epoch(mark: Tensor, epoch: int) -> None:
    """`mark` as unpacked in backward must be the one saved in forward.

    A checkpoint discards what forward saved and saves it anew when it recomputes, so the mark that backward unpacks
    tells at which epoch the recompute ran; without checkpointing it is the very tensor saved, and always agrees.
    """
    if int(mark) != epoch:
        raise AdapterError(SWITCHED)


class LowRankLinear(torch.autograd.Function):
    """One frozen linear layer with one adapter. The weight gets no gradient; bias, A, Bt and x do where they want one.

    x: (..., in); weight: (out, in), or (in, out) where `transposed` (Hugging Face's Conv1D); A: (r, in); Bt: (r, out);
    exact: y's base part has the very bits of the layer alone (see lorakit.core.gemm.base_product). mark: a 0-dim CPU tensor
    that holds `epoch` (see check_epoch). A second derivative is refused by torch with an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        scale: float,
        transposed: bool,
        exact: bool,
        mark: Tensor,
        epoch: int,
    ) -> Tensor:
        y = base_product(x, weight, bias, transposed, exact)
        x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
        xa_t = product(A, x2, tokens=x2.shape[0])  # (r, tokens)
        y.view(-1, y.shape[-1]).addmm_(xa_t.t(), Bt, alpha=scale)
        ctx.save_for_backward(x, weight, A, Bt, xa_t, mark)
        ctx.scale, ctx.transposed, ctx.epoch = scale, transposed, epoch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, Bt, xa_t, mark = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy2, x2, scale = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), ctx.scale
        dx = dbias = dA = dBt = None
        if need_x or need_a:
            dyb_t = product(Bt, dy2, tokens=dy2.shape[0])  # (r, tokens)
            if need_x:
                dx = base_gradient(dy2, weight, ctx.transposed)
                dx = dx.addmm_(dyb_t.t(), A, alpha=scale).view(x.shape)
            if need_a:
                dA = scaled_product(dyb_t, x2.t(), scale, torch.empty_like(A), tokens=x2.shape[0])
        if need_b:
            dBt = scaled_product(xa_t, dy2.t(), scale, torch.empty_like(Bt), tokens=dy2.shape[0])
        if need_bias:
            dbias = dy2.sum(0)
        return dx, None, dbias, dA, dBt, None, None, None, None, None


class EpochGuard(torch.autograd.Function):
    """The identity, whose backward raises when the adapters were switched under a checkpoint (see check_epoch)."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, mark: Tensor, epoch: int) -> Tensor:
        ctx.save_for_backward(mark)
        ctx.epoch = epoch
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mark,) = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        return grad, None, None
