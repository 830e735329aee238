"""Pfeiffer's adapters (Pfeiffer et al. 2021, arXiv 2005.00247, section 3.2.1): one bottleneck a block (the paper's adapter-P)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.adapter import BottleneckAdapter
from lorakit.methods.projections import Projections


@dataclass(frozen=True)
class PfeifferAdapter(BottleneckAdapter):
    """A bottleneck on the output projection of each feed-forward part, before the residual sum: half of Houlsby's."""

    name: ClassVar[str] = "pfeiffer"

    def sites(self, places: Projections) -> Sequence[str]:
        return (places.mlp,)
