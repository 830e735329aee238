"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B learns faster than A, by a ratio of about 16.

As in the authors' code (and PEFT's), vectors learn at B's rate: biases, and DoRA's lengths of a matrix's rows.
"""

from typing import ClassVar

from torch import Tensor

from lorakit.attach.method import Pair
from lorakit.methods.variant import Variant


class LoRAPlus(Variant):
    """ratio: B's learning rate over A's. An embedding's factor that starts at zero, At, is the one that learns faster."""

    paper: ClassVar[str] = "Hayou et al. 2024, arXiv 2402.12354"

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def learning_rates(self, pair: Pair, embedding: bool) -> dict[str, float]:
        rates = {"A" if embedding else "Bt": self.ratio, "bias": self.ratio}
        return rates if pair.A.dim() > 2 else rates | {"magnitude": self.ratio}

    def replaced_rate(self, tensor: Tensor) -> float:
        return self.ratio if tensor.dim() == 1 else 1.0
