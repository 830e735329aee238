"""The cross-entropy of a language model's targets without its logits: the hidden states that enter the head are taken
out of the model's own forward, and go through the head a chunk of rows at a time (lorakit.core.cross_entropy).

That is the same only where the model returns what its head gives, which is looked at on each call: a model that scales
or caps its logits (Gemma 2, Granite) runs as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.attach.adapted import plain
from lorakit.core import kernels
from lorakit.core.cross_entropy import CHUNK, head_cross_entropy
from lorakit.core.delta import is_dense

_LATER: "WeakSet[nn.Module]" = WeakSet()  # models that do something to their logits after the head
_PLAIN: "WeakSet[nn.Module]" = WeakSet()  # models that return what their head gives


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, nn.Module] | None:
    """(what enters the head, the head) of one forward; None where the loss must come from the model's logits.

    model: perhaps wrapped (DistributedDataParallel), as it is to be called.
    """
    inner = getattr(model, "module", model)
    head = _head(inner)
    if head is None or inner in _LATER or not kernels.fused:
        return None
    before = None if inner in _PLAIN else _draws(inner)
    with _through(head) as seen:
        logits = model(**inputs).logits
    if len(seen) == 1 and logits is seen[0]:
        _PLAIN.add(inner)
        return seen[0], head
    _LATER.add(inner)
    if before is not None:
        _draw_again(inner, before)  # the forward that counts draws what this one drew: a resumed run must not differ
    return None


def _draws(model: nn.Module) -> list[Tensor]:
    """The states of the generators that a forward pass draws from."""
    device = next(model.parameters()).device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _draw_again(model: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], next(model.parameters()).device)


def summed_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, smoothing: float) -> Tensor:
    """The summed cross-entropy of head(hidden). hidden: (rows, dim); labels: (rows,)."""
    weight, bias = head._parameters["weight"], head._parameters.get("bias")
    site = head.__dict__.get("_lk_site")
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)  # type: ignore[union-attr]
    same = weight.dtype == hidden.dtype or kernels.autocasting(hidden)  # type: ignore[union-attr]
    if frozen and same and (site is None or not site.active):
        return head_cross_entropy(hidden, weight, bias, labels, smoothing)  # type: ignore[arg-type]
    return _adapted_head(hidden, head, labels, smoothing)


def _adapted_head(hidden: Tensor, head: nn.Module, labels: Tensor, smoothing: float) -> Tensor:
    """A head that learns, or that carries an adapter: its chunks are computed anew in backward."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(rows).float(), wanted, reduction="sum", label_smoothing=smoothing)

    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    parts: list[Any] = [checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in chunks]
    return torch.stack(parts).sum() if parts else hidden.sum() * 0.0


def _head(model: nn.Module) -> nn.Module | None:
    """The model's output head where it is a plain linear layer to which nobody listens."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None or plain(type(head)) is not nn.Linear or "forward" in head.__dict__:
        return None
    heard = head._forward_hooks or head._forward_pre_hooks
    weight = head._parameters.get("weight")
    return None if heard or weight is None or not is_dense(weight) else head


@contextmanager
def _through(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the head returns what it is given; yields the list of that."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    head.__dict__["forward"] = forward
    try:
        yield seen
    finally:
        del head.__dict__["forward"]
