"""Attention with dropout on its probabilities, as one autograd node for a CPU.

`y = d(softmax(s q k^T + mask)) v`. torch's fused attention on a CPU has no dropout: its plain one draws a double an entry from
a serial generator and keeps three matrices (batch, heads, queries, keys); here one is kept, and the numbers of what is dropped.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.dropout import draw, zeroed_


def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float, scale: float
) -> Tensor:
    """query: (batch, heads, queries, size); key, value: (batch, heads, keys, size); mask: added to the scores, or boolean (true
    = is seen), of a shape that spreads to (batch, heads, queries, keys). Returns (batch, heads, queries, size), whose memory is
    that of (batch, queries, heads, size). A query that sees no key attends to all alike. No gradient for the mask."""
    return DroppedAttention.apply(query, key, value, mask, probability, scale)  # type: ignore[no-any-return,no-untyped-call]


class DroppedAttention(torch.autograd.Function):
    """See the module and dropped_attention."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float, scale: float
    ) -> Tensor:
        q, k, v = (one.reshape(-1, *one.shape[2:]) for one in (query, key, value))  # (batch heads, positions, size)
        scores = scaled_bmm(q, k.transpose(1, 2), scale)
        if mask is not None:
            grid = scores.view(*query.shape[:2], *scores.shape[1:])
            least = torch.finfo(scores.dtype).min
            grid.masked_fill_(~mask, least) if mask.dtype == torch.bool else grid.add_(mask)
        weights = torch.softmax(scores, -1)
        drawn, factor = draw(weights, probability)
        ctx.save_for_backward(q, k, v, weights, drawn)
        ctx.factor, ctx.scale = factor, scale
        y = scaled_bmm(zeroed_(weights.clone(), drawn), v, factor)
        return y.view(query.shape[:2] + y.shape[1:]).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, drawn = ctx.saved_tensors
        grid, dy3 = dy.shape[:2], dy.reshape(-1, *dy.shape[2:])
        dv = scaled_bmm(zeroed_(weights.clone(), drawn).transpose(1, 2), dy3, ctx.factor)
        grads = zeroed_(scaled_bmm(dy3, v.transpose(1, 2), ctx.factor), drawn)
        grads = torch._softmax_backward_data(grads, weights, -1, weights.dtype)
        dq, dk = scaled_bmm(grads, k, ctx.scale), scaled_bmm(grads.transpose(1, 2), q, ctx.scale)
        return *(one.view(grid + one.shape[1:]) for one in (dq, dk, dv)), None, None, None


def scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`scale x y` of (batch, n, m) and (batch, m, k), in one pass."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    return out.baddbmm_(x, y, beta=0, alpha=scale)
