"""Linear layers: nn.Linear and Hugging Face's Conv1D, which stores its weight (in, out)."""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kinds.base import Call, LeafKind
from lorakit.attach.site import LowRank, Site
from lorakit.core.autograd import LowRankLinear
from lorakit.core.delta import add_low_rank_, delta_weight, low_rank


class LinearKind(LeafKind):
    """nn.Linear: weight (out, in)."""

    transposed = False

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        return leaf.in_features, leaf.out_features  # type: ignore[return-value]  # a packed (quantised) weight has other sides

    def factor_shapes(self, leaf: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        d_in, d_out = self.shape(leaf)
        return (r, d_in), (r, d_out)

    def row_width(self, x: Tensor) -> int:
        return 1

    def product(self, leaf: nn.Module, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        return low_rank(x, A, Bt)

    def plain_product(self, leaf: nn.Module, x: Tensor) -> Tensor:
        weight: Tensor = leaf.weight  # type: ignore[assignment]
        return nn.functional.linear(x, self.as_matrix(weight).to(x.dtype))

    def weight_delta(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return delta_weight(A, Bt, scale, dtype=dtype)

    def with_rows(
        self, leaf: nn.Module, y: Tensor, x: Tensor, indices: Tensor, rows: Tensor, strength: float | None
    ) -> Tensor:
        """The head that shares an embedding's weight: the rows' logits are other ones."""
        own = nn.functional.linear(x, rows.to(x.dtype)).to(y.dtype)  # (..., n)
        bias: Tensor | None = leaf.bias  # type: ignore[assignment]
        if bias is not None:
            own = own + bias[indices].to(y.dtype)
        if strength is not None:
            base: Tensor = leaf._parameters["weight"][indices]  # type: ignore[index]
            own = y[..., indices] + strength * nn.functional.linear(x, (rows - base).to(x.dtype)).to(y.dtype)
        return y.index_copy(-1, indices, own)

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if site.route is None and len(site.active) == 1 and not torch.compiler.is_compiling():
            slot = site.active[0]
            low = slot.low
            if low is not None and low.plain and slot.rows is None:
                if not torch.is_grad_enabled() and not (low.dropout and leaf.training):
                    y: Tensor = call(x, *args, **kwargs)
                    own = site.inner is None and type(leaf)._lk_stock  # type: ignore[attr-defined]  # y is no one else's
                    if own and y.is_contiguous() and y.dtype == x.dtype and y.device == x.device:
                        return add_low_rank_(y, x, *low.factors(leaf), low.scale)
                    return self.applied(leaf, site, slot, y, x, y)
                if self._fusable(leaf, site, x, low):
                    A, Bt = low.factors(leaf)
                    fused: Tensor = LowRankLinear.apply(  # type: ignore[no-untyped-call]
                        x,
                        leaf.weight,
                        leaf.bias,
                        A.to(x.dtype),
                        Bt.to(x.dtype),
                        low.scale,
                        self.transposed,
                        site.mark,
                        site.epoch,
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

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def along_weight(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector[None, :]

    def weight_delta(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (A.to(dtype).t() @ Bt.to(dtype)).mul_(scale)


class RowKind(LinearKind):
    """A layer that treats each row alone and takes no low-rank update, only replaced parameters (LayerNorm)."""

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        raise TypeError("a normalisation layer has no low-rank update")
