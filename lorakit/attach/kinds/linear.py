"""Linear layers: nn.Linear and Hugging Face's Conv1D, which stores its weight (in, out)."""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kinds.base import Call, LeafKind
from lorakit.attach.site import LowRank, Site
from lorakit.core import kernels
from lorakit.core.autograd import LowRankLinear
from lorakit.core.batched import Steps, add_batched_
from lorakit.core.delta import add_low_rank_, delta_weight, low_rank
from lorakit.core.grouped import Layer, Pair, grouped_linear, stretches
from lorakit.core.siblings import Member, low_rank_siblings


class LinearKind(LeafKind):
    """nn.Linear: weight (out, in)."""

    transposed = False
    mixes = True

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

    def add_mixed(self, leaf: nn.Module, y: Tensor, x: Tensor, stack: Any, steps: Steps) -> None:
        add_batched_(y, x, stack, steps, leaf.bias)  # type: ignore[arg-type]

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low = self.only_pair(site)
        if low is None or torch.compiler.is_compiling():
            return super().forward(leaf, site, call, x, *args, **kwargs)
        dropping = bool(low.dropout) and leaf.training
        if (
            torch.is_grad_enabled() or dropping
        ):  # a reentrant checkpoint's first pass must draw what its recompute draws
            if kernels.fused and self.fusable(leaf, site, x):
                return self._recorded(leaf, site, x, low)
            return super().forward(leaf, site, call, x, *args, **kwargs)
        y: Tensor = call(x, *args, **kwargs)
        own = site.inner is None and type(leaf)._lk_stock  # type: ignore[attr-defined]  # y is no one else's
        if own and y.is_contiguous() and y.dtype == x.dtype and y.device == x.device:
            return add_low_rank_(y, x, *low.factors(leaf), low.scale)
        return self.applied(leaf, site, site.active[0], y, x, y)

    @staticmethod
    def only_pair(site: Site) -> LowRank | None:
        """The leaf's pair where it is the only thing that is on, and nothing but A and Bt."""
        if site.route is not None or len(site.active) != 1:
            return None
        slot = site.active[0]
        return slot.low if slot.low is not None and slot.low.plain and slot.rows is None else None

    def _recorded(self, leaf: nn.Module, site: Site, x: Tensor, low: LowRank) -> Tensor:
        """In one autograd node, with the layers that share the input where there are any."""
        dropout = self.dropout(leaf)
        group = site.group
        if group is not None and group.whole:
            y = group.taken(leaf, x)
            if y is not None:
                return y  # type: ignore[no-any-return]
            members = [
                (one, self.member(one, x.dtype)) for one, other in group.members if self._joins(one, other, x, low)
            ]
            ours = any(one is leaf for one, _ in members)  # a shallow copy of a leaf shares its site, and is no member
            if ours and len(members) > 1 and group.whole:
                return group.computed(leaf, x, members, dropout)  # type: ignore[no-any-return]
        own = self.member(leaf, x.dtype)
        if dropout:
            return low_rank_siblings(x, [own], dropout, site.mark, site.epoch)[0]
        return LowRankLinear.apply(x, *own, site.mark, site.epoch)  # type: ignore[no-any-return,no-untyped-call]

    def _joins(self, leaf: nn.Module, site: Site, x: Tensor, low: LowRank) -> bool:
        """Whether a layer of the group takes part in a call on x."""
        own = self.only_pair(site)
        return own is not None and own.dropout == low.dropout and self.fusable(leaf, site, x)

    def member(self, leaf: nn.Module, dtype: torch.dtype) -> Member:
        """The leaf as an autograd function takes it, with its one active pair in `dtype`.

        In evaluation a fresh adapter changes no bit of the output; in training the base's product may round otherwise.
        """
        site: Site = leaf._lk_site  # type: ignore[assignment]
        low: LowRank = site.active[0].low  # type: ignore[assignment]
        A, Bt = low.factors(leaf)
        weight: Tensor = leaf.weight  # type: ignore[assignment]
        exact = not leaf.training
        return Member(weight, leaf.bias, A.to(dtype), Bt.to(dtype), low.scale, self.transposed, exact)  # type: ignore[arg-type]

    def dropout(self, leaf: nn.Module) -> float:
        """The probability with which the leaf's one active pair drops an input now."""
        site: Site = leaf._lk_site  # type: ignore[assignment]
        low: LowRank = site.active[0].low  # type: ignore[assignment]
        return low.dropout if leaf.training else 0.0

    # -- rows of one batch that take different adapters, in training --------------------------------------------------

    def _routed(self, leaf: nn.Module, site: Site, call: Call, x: Tensor) -> Tensor:
        found = self._stretches(leaf, site, x)
        if found is None:
            return super()._routed(leaf, site, call, x)
        spans, layer = found
        group = site.group
        if group is not None and group.whole:
            y = group.taken(leaf, x)
            if y is not None:
                return y  # type: ignore[no-any-return]
            own = {id(one): self._stretches(one, other, x) for one, other in group.members if other.route is site.route}
            here = [(one, own[id(one)]) for one, _ in group.members if own.get(id(one)) is not None]
            if group.whole and len(here) > 1 and any(one is leaf for one, _ in here):
                layers = [part[1] for _, part in here if part is not None]
                outputs = grouped_linear(x, spans, layers, site.mark, site.epoch)
                return group.keep(leaf, x, [one for one, _ in here], outputs)  # type: ignore[no-any-return]
        return grouped_linear(x, spans, [layer], site.mark, site.epoch)[0]

    def _stretches(self, leaf: nn.Module, site: Site, x: Tensor) -> tuple[list[tuple[int, int]], Layer] | None:
        """(tokens of each adapter, the leaf with its pairs) where its rows are neighbours and all is one fused product."""
        route = site.route
        if not (kernels.fused and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        if route is None or route.strict or route.tokens or x.dim() < 2 or not self.fusable(leaf, site, x):
            return None
        found, rows = stretches(route.index), len(route.index)
        bias: Tensor | None = leaf._parameters.get("bias")
        if found is None or not rows or x.shape[0] % rows or (bias is not None and bias.requires_grad):
            return None
        pairs: list[Pair | None] = []
        for slot, _, _ in found:
            active, low = site.active[slot], site.active[slot].low
            if active.own or active.rows is not None or (low is not None and not low.plain):
                return None
            if low is not None and low.dropout and leaf.training:
                return None
            A, Bt = (None, None) if low is None else low.factors(leaf)
            pairs.append(None if low is None else Pair(A.to(x.dtype), Bt.to(x.dtype), low.scale))  # type: ignore[union-attr]
        repeat = x.numel() // x.shape[-1] // rows
        weight: Tensor = leaf.weight  # type: ignore[assignment]
        layer = Layer(weight, bias, self.transposed, tuple(pairs), exact=not leaf.training)
        return [(a * repeat, b * repeat) for _, a, b in found], layer

    def fusable(self, leaf: nn.Module, site: Site, x: Tensor) -> bool:
        """The fused functions compute the stock product themselves: only for a plain, dense, frozen weight of x's type."""
        weight = leaf.weight
        return (
            type(weight) in (nn.Parameter, Tensor)
            and not weight.requires_grad
            and weight.dtype == x.dtype
            and weight.device == x.device
            and site.inner is None
            and not kernels.autocasting(x)
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

    mixes = False

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        raise TypeError("a normalisation layer has no low-rank update")
