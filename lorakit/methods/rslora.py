"""Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): `alpha / sqrt(r)` in place of `alpha / r`, so that the size
of the update does not fall with the rank."""

import math
from typing import ClassVar

from lorakit.methods.variant import Variant


class RsLoRA(Variant):
    """See the module; section 3 of the paper."""

    paper: ClassVar[str] = "Kalajdzievski 2023, arXiv 2312.03732"

    def scaling(self, alpha: float, r: int, scaling: float) -> float:
        return alpha / math.sqrt(r)
