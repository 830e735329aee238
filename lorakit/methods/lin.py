"""Lin's adapters (Lin et al. 2020, arXiv 2004.03829, section 2): a LayerNorm and a bottleneck on each block (adapter-L)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.adapter import BottleneckAdapter
from lorakit.methods.projections import Projections


@dataclass(frozen=True)
class LinAdapter(BottleneckAdapter):
    """`H + f(norm(H) Wd^T + bd) Wu^T + bu` with H a block's output, behind its feed-forward part and residual sum.

    2 d r + r + d numbers a block, and 2 d of its LayerNorm (Hu et al. 2021, section 5.1).
    """

    name: ClassVar[str] = "lin"
    eps: ClassVar[float | None] = 1e-5

    def sites(self, places: Projections) -> Sequence[str]:
        return (places.block,)
