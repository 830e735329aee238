"""What every adaptation method is to the rest of lorakit: a configuration that drafts tensors for a model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass
class Pair:
    """A low-rank pair at one leaf: A (r, in) and Bt (r, out), or At (vocab, r) and Bt (r, dim) for an embedding."""

    A: Tensor
    Bt: Tensor
    scale: float
    dropout: float = 0.0
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def factor(self, strength: float) -> Tensor:
        """`scale * strength` as a 0-dim CPU tensor, kept: making one costs more than all else in a switch."""
        if strength not in self._factors:
            self._factors[strength] = torch.tensor(self.scale * strength, dtype=torch.float64, device="cpu")
        return self._factors[strength]


@dataclass
class Draft:
    """What a method adds to a model; nothing of the model has been changed yet.

    pairs: leaf path -> low-rank pair. replaced: module path -> {parameter name: the adapter's own tensor}.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Method(ABC):
    """An adaptation method: frozen configuration, drafts for any model. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @abstractmethod
    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        """Fresh tensors for `model`, which stays untouched.

        dtype: of the new tensors; None = that of the weight they stand beside. generator: a CPU generator for the
        initial values; None = torch's global one. Raises TargetError where the model has no place for the method.
        """
