"""Cross-entropy of a frozen output head without keeping logits.

Rows go through the head a chunk at a time in one reused buffer; the gradient of the hidden states is computed with the
loss, while the chunk's logits are there, so nothing of the vocabulary's width outlives its chunk and nothing is computed
twice. With W frozen that gradient, `(softmax - target) W`, is all that backward needs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core import kernels
from lorakit.core.delta import wide
from lorakit.core.gemm import aligned, by_onednn, product

CHUNK = 256  # rows; fewer make the products slow, more need memory for nothing
FEWEST = 128  # rows that oneDNN is given at once at the least
KEPT = 2**25  # bytes; a larger tensor's memory goes back to the system with it (glibc), and comes page by page


def head_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float) -> Tensor:
    """The summed cross-entropy of `hidden W^T + bias`: grouped_cross_entropy of one stretch, ()."""
    return grouped_cross_entropy(hidden, weight, bias, labels, (len(labels),), smoothing)[0]


def grouped_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, counts: Sequence[int], smoothing: float
) -> Tensor:
    """The summed cross-entropy of each stretch of rows of `hidden W^T + bias`, (stretches,), in one walk through the head.

    hidden: (rows, dim); weight: (classes, dim), frozen; labels: (rows,); counts: rows of each stretch, in order. smoothing:
    the share of the target's probability that is spread over all classes. A second derivative is refused. Under autocast
    the products are in its type, as those of a linear layer are, and the loss in float32 as ever.
    """
    if kernels.autocasting(hidden):
        dtype, device = torch.get_autocast_dtype(hidden.device.type), hidden.device.type
        with torch.autocast(device, enabled=False):
            return grouped_cross_entropy(hidden.to(dtype), weight.to(dtype), bias, labels, counts, smoothing)
    return GroupedCrossEntropy.apply(hidden, weight, bias, labels, tuple(counts), smoothing)  # type: ignore[no-any-return,no-untyped-call]


class GroupedCrossEntropy(torch.autograd.Function):
    """See grouped_cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counts: tuple[int, ...],
        smoothing: float,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_zeros(hidden.shape[0], dtype=wide(hidden.dtype))  # a row each
        own = by_onednn(hidden[:CHUNK], weight, CHUNK)  # it takes its memory itself
        step = min(CHUNK, _rows_kept(weight)) if own else CHUNK
        buffer = hidden.new_empty(0 if own else min(step, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows, wanted = hidden[start : start + step], labels[start : start + step, None]
            if own:
                more = aligned(rows.shape[0]) - rows.shape[0]
                logits = product(torch.nn.functional.pad(rows, (0, 0, 0, more)), weight)[: rows.shape[0]]
            else:
                logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
            values = logits.to(losses.dtype)  # the buffer itself, but for half precision
            if bias is not None:
                values += bias
            losses[start : start + step] = _row_losses(values, wanted, smoothing)
            if gradient is not None:
                gradient[start : start + step] = product(values.to(weight.dtype), weight.t())
            del logits, values  # a chunk's are gone before the next one's come
        ctx.save_for_backward(gradient)
        ctx.counts = counts
        return torch.stack([part.sum() for part in torch.split(losses, list(counts))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        counts = torch.tensor(ctx.counts, device=grad.device)
        weights = grad.to(gradient.dtype).repeat_interleave(counts, output_size=gradient.shape[0])
        return gradient * weights[:, None], None, None, None, None, None


def _rows_kept(weight: Tensor) -> int:
    """Of how many rows the logits stay within KEPT, but at least FEWEST."""
    return max(FEWEST, KEPT // (weight.shape[0] * weight.element_size()) // 16 * 16)


def _row_losses(values: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """The loss of each row of logits, which are overwritten by their gradient. values: (rows, classes); wanted: (rows, 1)."""
    values -= values.amax(-1, keepdim=True)
    hit = values.gather(1, wanted)
    spread = values.mean(-1, keepdim=True) if smoothing else torch.zeros_like(hit)
    sums = values.exp_().sum(-1, keepdim=True)  # one pass of exp serves the loss and the softmax
    values /= sums
    if smoothing:
        values -= smoothing / values.shape[1]
    values.scatter_add_(1, wanted, torch.full_like(hit, smoothing - 1))
    return (sums.log() - (1 - smoothing) * hit - smoothing * spread)[:, 0]
