"""A routing plan: which adapter each row of a batch takes. Immutable; every adapted layer of a model shares one."""

from functools import lru_cache

import torch
from torch import Tensor

from lorakit.errors import AdapterError

Group = tuple[int, Tensor]  # (slot, the rows of the flattened input that take it)


class Route:
    """`index[i]` is the slot (a position in the list of active adapters) of row i, or -1 for the base.

    A layer may see the rows multiplied: beams repeat them, a flattened input has a row per token. Each entry then
    stands for `rows // len(index)` neighbouring rows; anything else is an error.
    """

    def __init__(self, index: tuple[int, ...], *, strict: bool = False) -> None:
        self.index, self.strict = index, strict
        self.groups = lru_cache(maxsize=64)(self._groups)

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "strict": self.strict}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["index"], strict=state["strict"])  # type: ignore[misc]

    def _groups(self, rows: int, device: torch.device) -> list[Group]:
        """The rows of each adapter among `rows` rows (the base's left out), on `device`.

        Strict: a group a row of the plan, so that each row's low-rank products have the shapes, and so the bits, that
        they have when the row is alone; else a group an adapter.
        """
        if not self.index or rows % len(self.index):
            raise AdapterError(
                f"lorakit.route was given {len(self.index)} rows, but a layer received {rows}, which is no multiple of "
                "it. Give one adapter name (or None) for each row of the batch, or per='token' with one for each token."
            )
        repeat = rows // len(self.index)
        slots = torch.tensor(self.index).repeat_interleave(repeat)
        if not self.strict:
            used = sorted({slot for slot in self.index if slot >= 0})
            return [(slot, torch.nonzero(slots == slot).flatten().to(device)) for slot in used]
        return [
            (slot, torch.arange(row * repeat, (row + 1) * repeat, device=device))
            for row, slot in enumerate(self.index)
            if slot >= 0
        ]
