"""Root-mean-square normalisation with a frozen weight as one autograd node (Zhang and Sennrich 2019, arXiv 1910.07467).

`y = w x r`, `r = (mean(x^2) + eps)^(-1/2)` a row; with g = w dy: `dx = r g - x r^3 (g . x) / n`. transformers writes it in six
elementwise steps, whose graph keeps and passes over the activations a dozen times; here it is six passes, and x alone is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RootMeanSquareNorm(torch.autograd.Function):
    """x: (..., n); weight: (n,), which gets no gradient; eps: added to the mean square. Returns (..., n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The steps that transformers takes, for its very bits (a vector norm would save a pass and round otherwise).
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (x * r).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        dx = dy * weight
        pull = torch.linalg.vecdot(dx, x).unsqueeze_(-1).mul_(r).mul_(r).mul_(r).div_(-x.shape[-1])  # (..., 1)
        return dx.mul_(r).addcmul_(x, pull), None, None
