"""Residual adapters (Rebuffi et al. 2017, arXiv 1705.08045, in series; 2018, arXiv 1803.10082, section 3, in parallel)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.method import Draft, Insert, Method
from lorakit.errors import UsageError
from lorakit.methods.adapter import Fresh, Residual, check_width, weight_of
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.projections import check_projections, find_projections

KINDS = ("parallel", "series")


@dataclass(frozen=True)
class Linear(Residual):
    """`a x` (parallel) or `a y` (series), a: (out, in) whole, or `up down` with down (r, in) and up (out, r)."""

    parallel: bool

    def delta(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        h = x.to(y.dtype) if self.parallel else y
        for name in ("down_weight", "up_weight", "weight"):
            if name in tensors:
                h = nn.functional.linear(h, tensors[name].to(h.dtype))
        return h


@dataclass(frozen=True)
class ResidualAdapter(Method):
    """A linear map beside (`W x + a x`) or behind (`y + a y`, y = W x) each attention's and feed-forward part's output
    projection.

    Rebuffi's are 1 x 1 convolutions beside or behind a residual network's filters; on the tokens of a transformer that is a
    matrix, for each filter bank an output projection, and there is no batch norm that would be trained too. d_in d_out
    numbers each (parallel), d_out^2 (series), or r (d_in + d_out), 2 r d_out with `r`, as the 2018 paper compresses them
    (section 3.3).
    """

    name: ClassVar[str] = "residual-adapter"
    learning_rate: ClassVar[float] = 3.0e-4

    kind: str = "parallel"
    """parallel (the 2018 paper's, and its better one) or series (the 2017 paper's)."""
    r: int | None = None
    """Rank of the map; None = a whole matrix, as in the papers."""
    attention: str | Sequence[str] | None = None
    """Names of the attentions' output projections, one in each block; None = the model family's own."""
    mlp: str | Sequence[str] | None = None
    """Names of the feed-forward parts' output projections, likewise."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise UsageError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if self.r is not None:
            check_width(self.r)
        check_projections(self.attention, self.mlp)
        check_kept(self.modules_to_save)

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        fresh, draft = Fresh(dtype, generator), Draft()
        operation = Linear(self.kind == "parallel")
        for place in find_projections(model, self.attention, self.mlp):
            for path in (place.attention, place.mlp):
                weight, d_in, d_out = weight_of(model, path)
                tensors = self._tensors(fresh, weight, d_in if operation.parallel else d_out, d_out)
                draft.inserts[path] = {"adapter": Insert(operation, tensors)}
        return keep(draft, model, self.modules_to_save)

    def _tensors(self, fresh: Fresh, weight: Tensor, d_in: int, d_out: int) -> dict[str, Tensor]:
        """The map, zero to begin with."""
        if self.r is None:
            return {"weight": fresh.full(weight, d_out, d_in)}
        return {
            "down_weight": fresh.normal(weight, self.r, d_in, std=d_in**-0.5),
            "up_weight": fresh.full(weight, d_out, self.r),
        }
