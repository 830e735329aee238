"""nn.Embedding: weight (vocab, dim); the update of row i is `scale * At[i] Bt`, and At starts at zero (loralib)."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kinds.base import Call, LeafKind
from lorakit.attach.site import Site, Slot
from lorakit.core.batched import Steps
from lorakit.core.delta import low_rank_lookup
from lorakit.errors import TargetError


class EmbeddingKind(LeafKind):
    """See the module. padding_idx, max_norm and a factor on what is looked up (Gemma, BART) act as in the merged layer."""

    a_name = "lora_At"
    mixes = True
    zero = "A"

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        vocab, dim = leaf._parameters["weight"].shape  # type: ignore[union-attr]
        return vocab, dim

    def factor_shapes(self, leaf: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        vocab, dim = self.shape(leaf)
        if len(signature(type(leaf).forward).parameters) > 2:  # self, ids
            raise TargetError(
                f"{type(leaf).__name__} is given more than ids, and makes out of them which rows it looks up (positions): a "
                "low-rank update cannot follow. Leave it out of target_modules, or train it whole (modules_to_save)."
            )
        return (vocab, r), (r, dim)

    def row_width(self, x: Tensor) -> int:
        return 0

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def along_weight(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector[None, :]

    def norms(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
        return super().norms(leaf, A.t(), Bt, scale)

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        return x  # of whole numbers

    def product(self, leaf: nn.Module, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        return self._scaled(leaf, low_rank_lookup(x, A, Bt, leaf.padding_idx))  # type: ignore[arg-type]

    def plain_product(self, leaf: nn.Module, x: Tensor) -> Tensor:
        return self._scaled(leaf, nn.functional.embedding(x, leaf.weight, leaf.padding_idx))  # type: ignore[arg-type]

    def weight_delta(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (A.to(dtype) @ Bt.to(dtype)).mul_(scale)

    def with_rows(
        self, leaf: nn.Module, y: Tensor, x: Tensor, indices: Tensor, rows: Tensor, strength: float | None
    ) -> Tensor:
        place = torch.searchsorted(indices, x).clamp_max(indices.numel() - 1)  # where the row would stand
        hit = (indices[place] == x)[..., None]
        own = self._scaled(leaf, rows.to(y.dtype)[place])
        if strength is not None:
            base = self._scaled(leaf, leaf._parameters["weight"].to(y.dtype)[x])  # type: ignore[union-attr]
            own = y + strength * (own - base)
        return torch.where(hit, own, y)

    def add_mixed(self, leaf: nn.Module, y: Tensor, x: Tensor, stack: Any, steps: Steps) -> None:
        for start, end, adapter in steps.runs:
            if adapter in stack.gains:
                y[start:end] *= stack.gains[adapter].to(y.dtype)
            delta = self.product(leaf, x[start:end], *stack.pairs[adapter]) * stack.spans[adapter].scale
            y[start:end] += delta.to(y.dtype)

    def forward(self, leaf: nn.Module, site: Site, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """With max_norm the base is looked up as it is, and the sum is shortened, as the merged layer would."""
        if leaf.max_norm is None:
            return super().forward(leaf, site, call, x, *args, **kwargs)
        y = super().forward(leaf, site, lambda ids: self.plain_product(leaf, ids), x, *args, **kwargs)
        kind: Any = leaf.norm_type
        length = torch.linalg.vector_norm(y.detach(), ord=kind, dim=-1, keepdim=True)
        limit: Any = leaf.max_norm
        return y * torch.where(length > limit, limit / (length + 1e-7), torch.ones_like(length))

    def applied(self, leaf: nn.Module, site: Site, slot: Slot, y: Tensor, x: Tensor, base: Tensor) -> Tensor:
        return super().applied(leaf, site, slot, y, x.to(y.device), base)

    @staticmethod
    def _scaled(leaf: nn.Module, rows: Tensor) -> Tensor:
        scale = getattr(leaf, "embed_scale", None)  # scaled word embeddings multiply what they look up
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
