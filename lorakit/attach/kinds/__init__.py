"""The kinds of layer that take a low-rank update, registered by qualified class name so that nothing is imported.

A kind knows the shapes of its leaf, how its forward adds the update, and how the update looks in the weight's own layout.
"""

from functools import lru_cache

from torch import nn

from lorakit.attach.kinds.base import LeafKind
from lorakit.attach.kinds.conv import ConvKind
from lorakit.attach.kinds.embedding import EmbeddingKind
from lorakit.attach.kinds.linear import Conv1DKind, LinearKind, RowKind

__all__ = [
    "ATTENTION", "KINDS", "Conv1DKind", "ConvKind", "EmbeddingKind", "LeafKind", "LinearKind",
    "is_attention", "is_never_called", "is_stock", "low_rank_kind", "qualified", "row_kind",
]  # fmt: skip

KINDS: dict[str, LeafKind] = {
    "torch.nn.modules.linear.Linear": LinearKind(),
    "transformers.pytorch_utils.Conv1D": Conv1DKind(),
    "torch.nn.modules.sparse.Embedding": EmbeddingKind(),
    "torch.nn.modules.conv.Conv1d": ConvKind(1),
    "torch.nn.modules.conv.Conv2d": ConvKind(2),
    "torch.nn.modules.conv.Conv3d": ConvKind(3),
}
# Their weight is read by the parent, which never calls their forward: an update there would be ignored without a word.
NEVER_CALLED = {"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"}
ROW_WISE = {"torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.normalization.RMSNorm"}
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"  # reads its projections itself: raw parameters
_ROWS = RowKind()


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@lru_cache(maxsize=1024)  # a load asks for each layer, several times
def _nearest(cls: type) -> str | None:
    """The first registered class among `cls` and its bases."""
    for base in cls.__mro__:
        name = qualified(base)
        if name in KINDS or name in NEVER_CALLED or name in ROW_WISE:
            return name
    return None


def low_rank_kind(cls: type) -> LeafKind | None:
    """The kind under which layers of class `cls` take a low-rank update; None where they take none."""
    name = _nearest(cls)
    return KINDS.get(name) if name is not None else None


def row_kind(cls: type) -> LeafKind | None:
    """The kind under which rows of one batch may take different adapters in a layer of class `cls`; None if they can't."""
    kind = low_rank_kind(cls)
    return _ROWS if kind is None and _nearest(cls) in ROW_WISE else kind


def is_never_called(cls: type) -> bool:
    """Whether the parent of a layer of class `cls` reads its weight without calling it."""
    return _nearest(cls) in NEVER_CALLED


@lru_cache(maxsize=1024)
def is_attention(cls: type) -> bool:
    """Whether `cls` is PyTorch's attention layer, whose projections take their updates as raw parameters."""
    return any(qualified(base) == ATTENTION for base in cls.__mro__)


def is_stock(cls: type[nn.Module]) -> bool:
    """Whether `cls` computes just what its registered class computes (its forward is not overridden)."""
    registered = next((base for base in cls.__mro__ if qualified(base) in KINDS), None)
    return registered is not None and cls.forward is registered.__dict__.get("forward")
