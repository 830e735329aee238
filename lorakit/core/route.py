"""A routing plan: which adapter each row of a batch takes. Immutable; every adapted layer of a model shares one."""

from functools import lru_cache

import torch
from torch import Tensor

from lorakit.errors import AdapterError

Group = tuple[int, Tensor]  # (slot, the rows of the flattened input that take it)


class Route:
    """`index[i]` is the slot (a position in the list of active adapters) of row i, or -1 for the base.

    A layer may see the rows multiplied: beams repeat them, a flattened input has a row per token. Each entry then
    stands for `rows // len(index)` neighbouring rows; anything else is an error. tokens: the entries are tokens' rather
    than rows', so that the leading dimension of an input says nothing.
    """

    def __init__(self, index: tuple[int, ...], *, strict: bool = False, tokens: bool = False) -> None:
        self.index, self.strict, self.tokens = index, strict, tokens
        self._kept = lru_cache(maxsize=64)(self._groups)

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "strict": self.strict, "tokens": self.tokens}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["index"], strict=state["strict"], tokens=state["tokens"])  # type: ignore[misc]

    def groups(self, leading: int, rows: int, device: torch.device) -> list[Group]:
        """The rows of each adapter among `rows` rows (the base's left out), on `device`.

        leading: the input's first dimension, of which the rows of a batch must be a divisor: an input without the
        batch's dimension is shared by all rows, and none of its rows is any one adapter's. Strict: a group a row of the
        plan, so that each row's low-rank products have the shapes, and so the bits, that they have when the row is
        alone; else a group an adapter.
        """
        received = rows if self.tokens else leading
        if not self.index or received % len(self.index):
            raise AdapterError(
                f"lorakit.route was given {len(self.index)} rows, but a layer received {received}, which is no multiple of "
                "it. Give one adapter name (or None) for each row of the batch, or per='token' with one for each token. "
                "A layer that computes one thing for all rows (position embeddings, DeBERTa's relative positions) cannot "
                "take a row's adapter: run one adapter at a time with lorakit.use."
            )
        if torch.compiler.is_compiling():  # it would warn of a cache that it traces through
            return self._groups(rows, device)
        with torch.inference_mode(False):  # kept, and met again where gradients are recorded
            return self._kept(rows, device)

    def _groups(self, rows: int, device: torch.device) -> list[Group]:
        repeat = rows // len(self.index)
        on = [(slot, [row]) for row, slot in enumerate(self.index) if slot >= 0]
        if not self.strict:
            slots = sorted({slot for slot, _ in on})
            on = [(slot, [row for row, other in enumerate(self.index) if other == slot]) for slot in slots]
        within = torch.arange(repeat, device=device)
        return [
            (slot, (torch.tensor(chosen, device=device)[:, None] * repeat + within).flatten()) for slot, chosen in on
        ]
