"""AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918, section 4): no adapters in the lower blocks (the paper's adapter-D)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.errors import TargetError, UsageError
from lorakit.methods.adapter import BottleneckAdapter
from lorakit.methods.projections import Projections


@dataclass(frozen=True)
class AdapterDrop(BottleneckAdapter):
    """Pfeiffer's bottlenecks in all blocks but the lower `drop`, which have none, in training and at inference.

    Those blocks then cost nothing at inference, and nothing is propagated back through them; their states are the base's for
    every task (section 4.1, "specialized"; the paper's "robust" form, which draws another number for each training step, is
    not offered). Hu et al. (2021) count adapter-D with none dropped.
    """

    name: ClassVar[str] = "adapter-drop"

    drop: int = 0
    """How many of the lowest blocks have no adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.drop, bool) or not isinstance(self.drop, int) or self.drop < 0:
            raise UsageError(f"drop must be a whole number of blocks, 0 or more, not {self.drop!r}.")

    def sites(self, places: Projections) -> Sequence[str]:
        return (places.mlp,)

    def blocks(self, places: Sequence[Projections]) -> Sequence[Projections]:
        if self.drop >= len(places):
            raise TargetError(
                f"drop={self.drop} leaves none of the model's {len(places)} blocks an adapter: at most {len(places) - 1}."
            )
        return places[self.drop :]
