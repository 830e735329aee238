"""What a published change to LoRA can change: the scaling, the start, what stands beside the pair, the learning rates.

Each has a file of its own here (rslora, dora, pissa, olora, lora_plus) and cites its paper; lorakit.LoRA composes those
that its fields ask for.
"""

from abc import ABC
from typing import ClassVar

from torch import Tensor, nn

from lorakit.attach.kinds import LeafKind
from lorakit.attach.method import Pair


class Variant(ABC):
    """One change to LoRA; a method that is not overridden leaves LoRA as it is. Stateless but for its settings."""

    paper: ClassVar[str]
    """Authors, year, arXiv number."""

    def scaling(self, alpha: float, r: int, scaling: float) -> float:
        """The factor before B A. scaling: LoRA's own, alpha / r."""
        return scaling

    def check(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> None:  # noqa: B027
        """Raise UsageError where the layer does not take this variant, fresh or from a file."""

    def start(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> Pair:
        """The pair with this variant's initial values, where `check` has let the layer through."""
        return pair

    def learning_rates(self, pair: Pair, embedding: bool) -> dict[str, float]:
        """Field of the pair -> factor on its learning rate."""
        return {}

    def replaced_rate(self, tensor: Tensor) -> float:
        """The factor on the learning rate of a parameter of the base that is trained in full (a bias, a head's weight)."""
        return 1.0


def dense_weight(leaf: nn.Module, kind: LeafKind) -> Tensor:
    """The leaf's weight as an (out, in) matrix in float32, for an initialisation that looks at it."""
    weight = leaf._parameters["weight"]
    return kind.as_matrix(weight.detach()).float()  # type: ignore[union-attr]
