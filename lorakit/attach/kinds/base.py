"""What every kind of adapted layer does: the base's output, and on top of it what each active adapter adds."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kinds.mixed import mixed, refuse_gradients
from lorakit.attach.site import LowRank, Site, Slot, this_thread
from lorakit.core.batched import Steps
from lorakit.core.delta import guarded, output_norms, wide
from lorakit.errors import AdapterError

Call = Callable[..., Any]


class LeafKind(ABC):
    """How one kind of layer takes a low-rank update. Stateless: one instance serves every leaf of its kind."""

    a_name = "lora_A"
    b_name = "lora_Bt"
    mixes = False  # whether stacks of several adapters' pairs are computed here (see lorakit.core.batched)
    zero = "B"  # the factor that starts at zero, so that a fresh adapter changes nothing

    @abstractmethod
    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        """(in, out): the widths between which the update maps; for an embedding (vocabulary, dim)."""

    @abstractmethod
    def factor_shapes(self, leaf: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The shapes of A and Bt at rank r. Raises TargetError where the leaf has no update of that rank."""

    @abstractmethod
    def product(self, leaf: nn.Module, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        """The update's product with the input, not scaled, with gradients."""

    @abstractmethod
    def plain_product(self, leaf: nn.Module, x: Tensor) -> Tensor:
        """The base weight's product with the input, without bias."""

    @abstractmethod
    def weight_delta(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """The update in the layout of the leaf's weight, in `dtype`."""

    @abstractmethod
    def row_width(self, x: Tensor) -> int:
        """How many trailing dimensions of the input belong to one row (1: features; 0: an id is a row)."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight of this kind's layout as an (out, in) view."""
        return weight

    def along_weight(self, vector: Tensor, weight: Tensor) -> Tensor:
        """A vector with a number an output, (out,), as a view that multiplies the weight."""
        return vector[:, None]

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """A vector with a number an output, (out,), as a view that multiplies the layer's output y."""
        return vector

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The leaf's forward with its active adapters. call: the leaf's own forward."""
        if site.route is not None:
            if args or kwargs:
                raise AdapterError(
                    f"{site.path} ({type(leaf).__name__}) is given more than its input, which cannot be cut into the rows of "
                    "different adapters (OPT's positions, which are made of the whole mask). Run one adapter at a time with "
                    "lorakit.use, or leave this module out of the adapter."
                )
            return self._routed(leaf, site, call, x)
        base: Tensor = call(x, *args, **kwargs)
        y = base
        for slot in site.active:
            y = self.applied(leaf, site, slot, y, x, base)
        return y

    def applied(self, leaf: nn.Module, site: Site, slot: Slot, y: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """y with what one adapter adds to it. base: the layer's output on x before any adapter's update."""
        if slot.low is not None:
            y = y + self.update(leaf, site, x.to(y.device), base, slot.low).to(y.dtype)
        if slot.rows is not None and slot.indices is not None:
            whole = slot.strength == 1.0 and (site.route is not None or len(site.active) == 1)
            strength = None if whole else slot.strength
            y = self.with_rows(leaf, y, x, getattr(leaf, slot.indices), getattr(leaf, slot.rows), strength)
        return y

    def update(self, leaf: nn.Module, site: Site, x: Tensor, base: Tensor, low: LowRank) -> Tensor:
        """What a pair adds to the layer's output, with its guard against a switch under checkpointing."""
        compiling = torch.compiler.is_compiling()
        A, Bt = low.factors(leaf)
        dropping = bool(low.dropout) and leaf.training
        dropped = self.dropped(x, low.dropout) if dropping else x
        delta = self.product(leaf, dropped, A, Bt)
        scale: float | Tensor = low.scale_tensor if compiling else low.scale
        if low.bias is not None:
            delta = delta + self.along_outputs(getattr(leaf, low.bias).to(delta.dtype), delta)
        delta = delta * (scale.to(delta.dtype) if isinstance(scale, Tensor) else scale)
        if low.magnitude is not None:
            plain = self.plain_product(leaf, dropped) if dropping else self._without_bias(leaf, base)
            gain = self.along_outputs(self.gain(leaf, A, Bt, low).to(delta.dtype), delta)
            delta = (gain - 1) * low.strength * plain.to(delta.dtype) + gain * delta
        return guarded(delta, site.mark, site.epoch) if delta.requires_grad and not compiling else delta

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        return nn.functional.dropout(x, dropout)

    def gain(self, leaf: nn.Module, A: Tensor, Bt: Tensor, low: LowRank) -> Tensor:
        """DoRA's `m / ||W + s B A||`, (out,), the norm a constant for gradients (section 4.3)."""
        with torch.no_grad():
            norms = self.norms(leaf, A, Bt, low.scale / low.strength if low.strength else 0.0)
        magnitude: Tensor = getattr(leaf, low.magnitude or "")
        return magnitude / norms.to(magnitude.dtype)  # rounded alike: a fresh adapter's gain is then exactly 1

    def norms(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
        """The length of each output's row of `W + scale * B A`, (out,)."""
        weight = leaf._parameters["weight"]
        return output_norms(self.as_matrix(weight), A, Bt, scale)  # type: ignore[arg-type]

    def with_rows(
        self, leaf: nn.Module, y: Tensor, x: Tensor, indices: Tensor, rows: Tensor, strength: float | None
    ) -> Tensor:
        """y where an embedding's rows `indices` are `rows` (see lorakit.attach.method.TokenRows).

        strength: None = they take the base's place; else what they add is weighed, beside other adapters.
        """
        raise TypeError(f"{type(leaf).__name__} has no rows of tokens")

    def add_mixed(self, leaf: nn.Module, y: Tensor, x: Tensor, stack: Any, steps: Steps) -> None:
        """Add to y (tokens, ...), in place, what each token's adapter adds. stack: this kind's, a Stack or Tables."""
        raise TypeError(f"{type(leaf).__name__} takes no stack of adapters")

    def merged_weight(self, leaf: nn.Module, slots: tuple[Slot, ...], weight: Tensor) -> Tensor:
        """The weight with the active adapters' updates, added in float32. weight: the base's, or what replaces it."""
        dtype = wide(weight.dtype)
        total = weight.detach().to(dtype, copy=True)
        for slot in slots:
            if slot.low is not None:
                total += self._weight_update(leaf, slot.low, weight.detach(), dtype)
            if slot.rows is not None and slot.indices is not None:
                indices, rows = getattr(leaf, slot.indices), getattr(leaf, slot.rows).detach().to(dtype)
                if slot.strength == 1.0 and len(slots) == 1:
                    total[indices] = rows
                else:
                    total[indices] += slot.strength * (rows - weight.detach()[indices].to(dtype))
        return total

    def merged_bias(self, leaf: nn.Module, slots: tuple[Slot, ...], bias: Tensor) -> Tensor:
        """The bias with the active adapters' own biases (lora_bias), added in float32."""
        dtype = wide(bias.dtype)
        total = bias.detach().to(dtype, copy=True)
        for slot in slots:
            if slot.low is not None and slot.low.bias is not None:
                own = getattr(leaf, slot.low.bias).detach().to(dtype) * slot.low.scale
                if slot.low.magnitude is not None:
                    A, Bt = (factor.detach().to(dtype) for factor in slot.low.factors(leaf))
                    own = own * self.gain(leaf, A, Bt, slot.low).detach().to(dtype)
                total += own
        return total

    def _weight_update(self, leaf: nn.Module, low: LowRank, weight: Tensor, dtype: torch.dtype) -> Tensor:
        A, Bt = (factor.detach() for factor in low.factors(leaf))
        delta = self.weight_delta(leaf, A, Bt, low.scale, dtype)
        if low.magnitude is None:
            return delta
        gain = self.gain(leaf, A.to(dtype), Bt.to(dtype), low).detach().to(dtype)
        gain = self.along_weight(gain, weight)
        return (gain - 1) * low.strength * weight.to(dtype) + gain * delta

    def _without_bias(self, leaf: nn.Module, base: Tensor) -> Tensor:
        bias = getattr(leaf, "bias", None)
        return base if bias is None else base - self.along_outputs(bias, base).to(base.dtype)

    # -- rows of one batch that take different adapters --------------------------------------------------------------

    def _routed(self, leaf: nn.Module, site: Site, call: Call, x: Tensor) -> Tensor:
        """Rows take different adapters: the base once for all, then each adapter's update on its own rows."""
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                refuse_gradients(site)
            else:
                out = mixed(self, leaf, site, call, x)
                if out is not None:
                    return out
        lead = x.dim() - self.row_width(x)
        flat = x.reshape(-1, *x.shape[lead:])
        route = site.route
        leading = x.shape[0] if lead else 1
        groups = route.groups(leading, flat.shape[0], x.device) if route is not None else []
        y: Tensor = self._only(site, -1, call, x)
        out = y.reshape(flat.shape[0], *y.shape[lead:])
        for slot, rows in groups:
            part, active = flat[rows], site.active[slot]
            own = out[rows]
            base = self._only(site, slot, call, part).to(out.dtype) if active.own else own
            out = out.index_copy(0, rows, self._rows_alone(leaf, site, slot, base, part))
        return out.view(y.shape)

    def _rows_alone(self, leaf: nn.Module, site: Site, slot: int, base: Tensor, part: Tensor) -> Tensor:
        """Rows with one adapter, `base` being their output with its parameters but without its updates."""
        thread = this_thread()
        site.only[thread] = slot
        try:
            return self.applied(leaf, site, site.active[slot], base, part, base)
        finally:
            del site.only[thread]

    def _only(self, site: Site, slot: int, call: Call, x: Tensor) -> Tensor:
        """Rows through the leaf's own forward with one adapter's bias or weight, or the base's (slot -1)."""
        thread = this_thread()
        site.only[thread] = slot
        try:
            return call(x)  # type: ignore[no-any-return]
        finally:
            del site.only[thread]
