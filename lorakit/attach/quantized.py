"""Weights that bitsandbytes or torchao hold quantised: what stands in such a parameter, without importing either.

bitsandbytes packs two 4-bit values a byte into (n, 1) and keeps the shape beside it; torchao's tensor subclasses keep
the shape and store something else. An adapter needs the layer's widths and a type to compute in, and no more: the base
is frozen and computes its own product (QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 3).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PACKAGES = {"bitsandbytes", "torchao"}


def is_quantized(tensor: Tensor | None) -> bool:
    """Whether a parameter's class is one of bitsandbytes' or torchao's (Params4bit, Int8Params, Int8Tensor, ...)."""
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    return any(cls.__module__.partition(".")[0] in PACKAGES for cls in type(tensor).__mro__)


def dense_shape(tensor: Tensor) -> torch.Size:
    """The shape of the matrix that a parameter stands for."""
    state = _state_4bit(tensor)
    return tensor.shape if state is None else torch.Size(state.shape)


def dense_dtype(tensor: Tensor) -> torch.dtype:
    """The type that a parameter's values had: what an adapter beside it is made in. float32 where nothing says it."""
    state = _state_4bit(tensor)
    dtype: torch.dtype = tensor.dtype if state is None else state.dtype
    return dtype if dtype.is_floating_point else torch.float32


def stored_bytes(tensor: Tensor) -> int:
    """The memory that a parameter's values take, scales included."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    own = tensor.numel() * tensor.element_size()
    state = _state_4bit(tensor)
    if state is not None:
        scales = [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
        return own + sum(stored_bytes(scale) for scale in scales)
    rows = getattr(tensor, "SCB", None) if is_quantized(tensor) else None
    return own if rows is None else own + stored_bytes(rows)


def _state_4bit(tensor: Tensor) -> Any:
    """bitsandbytes' QuantState of a packed 4-bit parameter; None for all else (one not yet quantised too)."""
    return getattr(tensor, "quant_state", None) if is_quantized(tensor) else None
