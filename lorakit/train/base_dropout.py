"""The frozen base's own dropout while it is trained on a CPU: the same law by masks that cost a quarter (lorakit.core.dropout).

Encoders and GPT-2 drop a tenth of their hidden states and of their attention's probabilities in training. torch draws a double
an entry for that, serially, and its fused attention on a CPU has no dropout at all. Inside `BaseDropout.drawing` the model's
plain nn.Dropout modules run lorakit's, and so does transformers' "sdpa" attention, in this thread.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import kernels
from lorakit.core.attention import dropped_attention
from lorakit.core.dropout import dropped
from lorakit.train.prefix import standing_in

_drawing: ContextVar[bool] = ContextVar("lorakit_drawing", default=False)
_REGISTRY = "transformers.modeling_utils"


class BaseDropout:
    """The dropout modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        plain = [one for one in model.modules() if type(one) is nn.Dropout and "forward" not in one.__dict__]
        self._forwards: dict[nn.Module, Callable[..., Any]] = {one: partial(_forward, one) for one in plain}
        if kernels.fused and _REGISTRY in sys.modules:
            _offer_attention()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """A training step's forward and backward (of which a checkpoint's recompute is part) run inside."""
        token = _drawing.set(kernels.fused)
        try:
            with standing_in(self._forwards if kernels.fused else {}):
                yield
        finally:
            _drawing.reset(token)


def _forward(module: Any, x: Tensor) -> Tensor:
    drops = module.training and 0 < module.p < 1 and not module.inplace
    if drops and _fits(x):
        return dropped(x, module.p)
    return nn.functional.dropout(x, module.p, module.training, module.inplace)


def _fits(x: Tensor) -> bool:
    there = x.device.type in ("cpu", "meta")  # meta: a plan of a step on a CPU
    return there and x.is_floating_point() and not torch.compiler.is_compiling()


def _offer_attention() -> None:
    """Put ours before transformers' sdpa attention, once a process; outside of `drawing` it hands everything on."""
    functions = sys.modules[_REGISTRY].ALL_ATTENTION_FUNCTIONS
    own = functions["sdpa"]
    if getattr(own, "_lk_draws", False):
        return

    @wraps(own)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        rest = {name: one for name, one in kwargs.items() if name not in ("dropout", "scaling", "is_causal")}
        probability = kwargs.get("dropout") or 0.0
        if 0 < probability < 1 and not args and _drawing.get() and _attention_fits(query, key, attention_mask, rest):
            mask = attention_mask
            if mask is None and query.shape[2] > 1 and _is_causal(module, kwargs.get("is_causal")):
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            y = dropped_attention(query, key, value, mask, probability, scale)
            return y.transpose(1, 2), None  # (batch, queries, heads, size), contiguous
        return own(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]

    attention._lk_draws = True  # type: ignore[attr-defined]
    functions["sdpa"] = attention


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _attention_fits(query: Tensor, key: Tensor, mask: Tensor | None, rest: dict[str, Any]) -> bool:
    """Whether it is plain attention: as many key heads as query heads, nothing on the scores but a mask that no one learns."""
    plain = all(rest.get(name) is None for name in ("position_bias", "softcap", "cache", "s_aux"))
    if mask is not None and (mask.requires_grad or mask.dim() != 4 or mask.shape[-1] != key.shape[2]):
        return False
    return plain and _fits(query) and not kernels.autocasting(query) and query.shape[1] == key.shape[1]
