"""Houlsby's adapters (Houlsby et al. 2019, arXiv 1902.00751, section 2.1): two bottlenecks a block (the paper's adapter-H)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.adapter import BottleneckAdapter
from lorakit.methods.projections import Projections


@dataclass(frozen=True)
class HoulsbyAdapter(BottleneckAdapter):
    """A bottleneck on the output projection of each attention and of each feed-forward part, before the residual sum.

    L (2 d r + r + d) numbers with L twice the number of blocks (Hu et al. 2021, section 5.1). The adapter sees the
    output before its dropout; Houlsby's own code puts it behind, which differs in training only. The base's
    LayerNorms, which Houlsby trains too, stay frozen, as in Hu et al.
    """

    name: ClassVar[str] = "houlsby"

    def sites(self, places: Projections) -> Sequence[str]:
        return (places.attention, places.mlp)
