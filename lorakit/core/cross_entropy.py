"""Cross-entropy of a frozen output head without keeping logits.

Rows go through the head a chunk at a time in one reused buffer; the gradient of the hidden states is computed with the
loss, while the chunk's logits are there, so nothing of the vocabulary's width outlives its chunk and nothing is computed
twice. With W frozen that gradient, `(softmax - target) W`, is all that backward needs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core import kernels
from lorakit.core.delta import wide

CHUNK = 256  # rows; fewer make the products slow, more need memory for nothing


def head_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float) -> Tensor:
    """The summed cross-entropy of `hidden W^T + bias`. hidden: (rows, dim); weight: (classes, dim), frozen; labels: (rows,).

    smoothing: the share of the target's probability that is spread over all classes. A second derivative is refused.
    Under autocast the products are in its type, as those of a linear layer are, and the loss in float32 as ever.
    """
    if kernels.autocasting(hidden):
        dtype, device = torch.get_autocast_dtype(hidden.device.type), hidden.device.type
        with torch.autocast(device, enabled=False):
            return HeadCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), bias, labels, smoothing)  # type: ignore[no-any-return,no-untyped-call]
    return HeadCrossEntropy.apply(hidden, weight, bias, labels, smoothing)  # type: ignore[no-any-return,no-untyped-call]


class HeadCrossEntropy(torch.autograd.Function):
    """See the module and head_cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float
    ) -> Tensor:
        need = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if need else None
        classes = weight.shape[0]
        buffer = hidden.new_empty(min(CHUNK, hidden.shape[0]), classes)
        total = hidden.new_zeros((), dtype=wide(hidden.dtype))
        for start in range(0, hidden.shape[0], CHUNK):
            rows = hidden[start : start + CHUNK]
            wanted = labels[start : start + CHUNK, None]
            logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
            values = logits.to(total.dtype)  # the buffer itself, but for half precision
            if bias is not None:
                values += bias
            values -= values.amax(-1, keepdim=True)
            hit = values.gather(1, wanted)
            spread = values.mean(-1).sum() if smoothing else 0.0
            sums = values.exp_().sum(-1, keepdim=True)  # one pass of exp serves the loss and the softmax
            total += (sums.log() - (1 - smoothing) * hit).sum() - smoothing * spread
            if gradient is not None:
                # softmax - (1 - smoothing) onehot - smoothing / classes, in place
                values /= sums
                if smoothing:
                    values -= smoothing / classes
                values.scatter_add_(1, wanted, torch.full_like(hit, smoothing - 1))
                torch.mm(values.to(weight.dtype), weight, out=gradient[start : start + CHUNK])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None
