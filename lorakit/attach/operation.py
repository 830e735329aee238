"""What a method computes at a module besides the module itself: bottleneck adapters, prefixes, prompts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.route import Route


@dataclass(frozen=True)
class Share:
    """How much of a call an adapter has. strength: its weight; route: which rows are its own (slot `slot`), None = all."""

    strength: float
    route: Route | None
    slot: int

    def rows(self, leading: int, rows: int, device: torch.device) -> Tensor | None:
        """The numbers of its rows among `rows` rows of the flattened input (see Route.groups); None = all of them."""
        if self.route is None:
            return None
        found = [own for slot, own in self.route.groups(leading, rows, device) if slot == self.slot]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=device)


class Operation(ABC):
    """The computation, without its tensors. Subclasses are frozen dataclasses; one instance may serve many modules."""

    by_token: ClassVar[bool]
    """Whether each token's output depends on that token alone, and no token is added: what packing, the pruned last block
    and the cache of frozen layers need."""

    @property
    def positions(self) -> int:
        """How many positions of the sequence it takes for tokens of its own."""
        return 0

    @abstractmethod
    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the module returns with the adapter on.

        call: the module's own forward (and the operations inside this one), to be called with the input, changed or not.
        tensors: the adapter's, as they stand on the module now. At strength 0, or for rows that are not its own, the
        output is the module's own, bit for bit.
        """
