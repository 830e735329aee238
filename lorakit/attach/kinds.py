"""The kinds of layer that take a low-rank update, registered by qualified class name so that nothing is imported.

A kind knows the shapes of its leaf, how its forward adds the update, and how the update looks in the weight's own layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.site import LowRank, Site, this_thread
from lorakit.core.autograd import LowRankLinear
from lorakit.core.delta import add_low_rank_, delta_weight, guarded, low_rank, low_rank_lookup

Call = Callable[..., Any]


class LeafKind(ABC):
    """How one kind of layer takes a low-rank update. Stateless: one instance serves every leaf of its kind."""

    a_name = "lora_A"
    b_name = "lora_Bt"
    zero = "B"  # the factor that starts at zero, so that a fresh adapter changes nothing

    @abstractmethod
    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        """(in, out): the widths between which the update maps; for an embedding (vocabulary, dim)."""

    @abstractmethod
    def delta(self, x: Tensor, A: Tensor, Bt: Tensor, scale: float | Tensor, dropout: float) -> Tensor:
        """The update's product with the input, with gradients. dropout: probability, 0 outside training."""

    @abstractmethod
    def weight_delta(self, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """The update in the layout of the leaf's weight, in `dtype`."""

    @abstractmethod
    def row_width(self) -> int:
        """How many trailing dimensions of the input belong to one row (1: features; 0: an id is a row)."""

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The leaf's forward with its active adapters. call: the leaf's own forward."""
        if site.route is not None:
            return self._routed(leaf, site, call, x)
        y: Tensor = call(x, *args, **kwargs)
        for slot in site.active:
            if slot.low is not None:
                y = self._add(leaf, site, y, x, slot.low)
        return y

    def _delta(self, leaf: nn.Module, site: Site, x: Tensor, low: LowRank) -> Tensor:
        A, Bt = getattr(leaf, low.a), getattr(leaf, low.b)
        if torch.compiler.is_compiling():
            return self.delta(x, A, Bt, low.scale_tensor, low.dropout if leaf.training else 0.0)
        delta = self.delta(x, A, Bt, low.scale, low.dropout if leaf.training else 0.0)
        return guarded(delta, site.mark, site.epoch) if delta.requires_grad else delta

    def _add(self, leaf: nn.Module, site: Site, y: Tensor, x: Tensor, low: LowRank) -> Tensor:
        return y + self._delta(leaf, site, x.to(y.device), low).to(y.dtype)

    def _routed(self, leaf: nn.Module, site: Site, call: Call, x: Tensor) -> Tensor:
        """Rows take different adapters: the base once for all, then each adapter's update on its own rows."""
        flat = x.reshape(-1, *x.shape[x.dim() - self.row_width() :])
        route = site.route
        leading = x.shape[0] if x.dim() > self.row_width() else 1
        groups = route.groups(leading, flat.shape[0], x.device) if route is not None else []
        y: Tensor = self._only(site, -1, call, x)
        out = y.reshape(-1, y.shape[-1])
        for slot, rows in groups:
            part = flat[rows]
            if site.active[slot].replaced:
                out = out.index_copy(0, rows, self._only(site, slot, call, part).to(out.dtype))
            low = site.active[slot].low
            if low is not None:
                out = out.index_add(0, rows, self._delta(leaf, site, part, low).to(out.dtype))
        return out.view(y.shape)

    def _only(self, site: Site, slot: int, call: Call, x: Tensor) -> Tensor:
        """Rows through the leaf's own forward with one adapter's bias or weight, or the base's (slot -1)."""
        thread = this_thread()
        site.only[thread] = slot
        try:
            return call(x)  # type: ignore[no-any-return]
        finally:
            del site.only[thread]


class LinearKind(LeafKind):
    """nn.Linear: weight (out, in)."""

    transposed = False

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        out_features, in_features = leaf._parameters["weight"].shape  # type: ignore[union-attr]
        return in_features, out_features

    def row_width(self) -> int:
        return 1

    def delta(self, x: Tensor, A: Tensor, Bt: Tensor, scale: float | Tensor, dropout: float) -> Tensor:
        return low_rank(nn.functional.dropout(x, dropout) if dropout else x, A, Bt, scale)

    def weight_delta(self, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return delta_weight(A, Bt, scale, dtype=dtype)

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if site.route is None and len(site.active) == 1 and not torch.compiler.is_compiling():
            low = site.active[0].low
            if low is not None and not torch.is_grad_enabled() and not (low.dropout and leaf.training):
                y: Tensor = call(x, *args, **kwargs)
                own = site.inner is None and type(leaf)._lk_stock  # type: ignore[attr-defined]  # y is no one else's
                if own and y.is_contiguous() and y.dtype == x.dtype and y.device == x.device:
                    return add_low_rank_(y, x, getattr(leaf, low.a), getattr(leaf, low.b), low.scale)
                return self._add(leaf, site, y, x, low)
            if low is not None and self._fusable(leaf, site, x, low):
                A, Bt = getattr(leaf, low.a).to(x.dtype), getattr(leaf, low.b).to(x.dtype)
                fused: Tensor = LowRankLinear.apply(  # type: ignore[no-untyped-call]
                    x, leaf.weight, leaf.bias, A, Bt, low.scale, self.transposed, site.mark, site.epoch
                )
                return fused
        return super().forward(leaf, site, call, x, *args, **kwargs)

    def _fusable(self, leaf: nn.Module, site: Site, x: Tensor, low: LowRank) -> bool:
        """The fused function computes the stock product itself: only for a plain, dense, frozen weight of x's type."""
        weight = leaf.weight
        return (
            type(weight) in (nn.Parameter, Tensor)
            and not weight.requires_grad
            and weight.dtype == x.dtype
            and weight.device == x.device
            and site.inner is None
            and not (low.dropout and leaf.training)
            and not torch.is_autocast_enabled(x.device.type)
            and type(leaf)._lk_stock  # type: ignore[attr-defined]
        )


class Conv1DKind(LinearKind):
    """Hugging Face's Conv1D (GPT-2): a linear layer whose weight is stored (in, out)."""

    transposed = True

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        in_features, out_features = leaf._parameters["weight"].shape  # type: ignore[union-attr]
        return in_features, out_features

    def weight_delta(self, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (A.to(dtype).t() @ Bt.to(dtype)).mul_(scale)


class EmbeddingKind(LeafKind):
    """nn.Embedding: weight (vocab, dim); the update of row i is `scale * At[i] Bt`, and At starts at zero (loralib)."""

    a_name = "lora_At"
    zero = "A"

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        vocab, dim = leaf._parameters["weight"].shape  # type: ignore[union-attr]
        return vocab, dim

    def row_width(self) -> int:
        return 0

    def delta(self, x: Tensor, A: Tensor, Bt: Tensor, scale: float | Tensor, dropout: float) -> Tensor:
        return low_rank_lookup(x, A, Bt.to(A.dtype), scale)

    def weight_delta(self, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (A.to(dtype) @ Bt.to(dtype)).mul_(scale)

    def _delta(self, leaf: nn.Module, site: Site, x: Tensor, low: LowRank) -> Tensor:
        delta = super()._delta(leaf, site, x, low)
        scale = getattr(leaf, "embed_scale", None)  # scaled word embeddings (BART, Gemma) multiply what they look up
        if scale is None:
            return delta
        return delta * (scale.to(delta.dtype) if isinstance(scale, Tensor) else scale)


class RowKind(LinearKind):
    """A layer that treats each row alone and takes no low-rank update, only replaced parameters (LayerNorm)."""

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        raise TypeError("a normalisation layer has no low-rank update")


_LINEAR, _CONV1D, _EMBEDDING, _ROWS = LinearKind(), Conv1DKind(), EmbeddingKind(), RowKind()

KINDS: dict[str, LeafKind] = {
    "torch.nn.modules.linear.Linear": _LINEAR,
    "transformers.pytorch_utils.Conv1D": _CONV1D,
    "torch.nn.modules.sparse.Embedding": _EMBEDDING,
}
# Their weight is read by the parent, which never calls their forward: an update there would be ignored without a word.
NEVER_CALLED = {"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"}
ROW_WISE = {"torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.normalization.RMSNorm"}


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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


def is_stock(cls: type[nn.Module]) -> bool:
    """Whether `cls` computes just what its registered class computes (its forward is not overridden)."""
    registered = next((base for base in cls.__mro__ if qualified(base) in KINDS), None)
    return registered is not None and cls.forward is registered.__dict__.get("forward")
