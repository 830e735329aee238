"""Cross-entropy of a frozen output head without keeping logits.

A chunk of rows goes through the head a piece of the vocabulary at a time, each against the greatest logit so far, by which
what came before is corrected (the online softmax of Milakov and Gimelshein 2018, arXiv 1805.02867). The gradient of the
hidden states, `(softmax - target) W`, is summed beside it while a piece's logits and weights lie in a cache; with W frozen
it is all that backward needs. On a CPU nothing of the vocabulary's width is ever there, and nothing is computed twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core import kernels
from lorakit.core.delta import wide
from lorakit.core.gemm import aligned, by_onednn, product
from lorakit.errors import UsageError

CHUNK = 256  # rows; fewer make the products slow, more need memory for nothing
PIECE = 4096  # classes: a CPU's cache holds a piece's logits and weights; elsewhere the vocabulary is one piece


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
        _check(labels, weight.shape[0])
        mean = weight.mean(0, dtype=losses.dtype) if smoothing and gradient is not None else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows, wanted = hidden[start : start + CHUNK], labels[start : start + CHUNK, None]
            count = rows.shape[0]
            if (more := aligned(count) - count) and by_onednn(hidden[:CHUNK], weight, aligned(CHUNK)):
                rows, wanted = (torch.nn.functional.pad(one, (0, 0, 0, more)) for one in (rows, wanted))
            into = None if gradient is None else gradient[start : start + CHUNK]
            losses[start : start + CHUNK] = _row_losses(rows, weight, bias, wanted, smoothing, into, mean)[:count]
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


def _row_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Tensor,
    smoothing: float,
    into: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """The loss of each row of x, (n,). wanted: (n, 1); into: takes the gradients of the first rows, (up to n, dim); mean: the
    weight's over the classes, (dim,), where there is smoothing."""
    dtype = wide(x.dtype)
    top = x.new_full((x.shape[0], 1), torch.finfo(dtype).min, dtype=dtype)  # the greatest logit so far
    sums, hit, spread = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    gradient = None
    for start, stop in _pieces(weight):
        part = weight[start:stop]
        logits = product(x, part).to(dtype)
        if bias is not None:
            logits += bias[start:stop]
        here = wanted - start
        inside = (here >= 0) & (here < stop - start)
        hit = torch.where(inside, logits.gather(1, here.clamp(0, stop - start - 1)), hit)
        if smoothing:
            spread += logits.sum(-1, keepdim=True)
        most = torch.maximum(top, logits.amax(-1, keepdim=True))
        fade, top = (top - most).exp_(), most
        logits.sub_(most).exp_()
        sums.mul_(fade).add_(logits.sum(-1, keepdim=True))
        if into is not None:
            found = product(logits.to(weight.dtype), part.t())
            gradient = found.to(dtype) if gradient is None else gradient.mul_(fade).add_(found)
    if into is not None and gradient is not None:
        gradient.div_(sums).sub_(weight[wanted[:, 0]], alpha=1 - smoothing)
        if mean is not None:
            gradient.sub_(mean, alpha=smoothing)
        into.copy_(gradient[: into.shape[0]])
    # top - hit first: of a row that is sure of its target it is 0, and the loss keeps its digits.
    off = (1 - smoothing) * (top - hit) + smoothing * (top - spread / weight.shape[0])
    return (sums.log() + off)[:, 0]


def _pieces(weight: Tensor) -> list[tuple[int, int]]:
    """Where each piece of the vocabulary begins and ends: about evenly."""
    classes = weight.shape[0]
    if weight.device.type not in ("cpu", "meta"):
        return [(0, classes)]
    size = aligned(-(-classes // -(-classes // PIECE)))
    return [(start, min(start + size, classes)) for start in range(0, classes, size)]


def _check(labels: Tensor, classes: int) -> None:
    if not labels.is_meta and bool(((labels < 0) | (labels >= classes)).any()):
        raise UsageError(f"labels must be from 0 to {classes - 1}; came {int(labels.min())} to {int(labels.max())}.")
