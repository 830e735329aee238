"""A routing plan: which adapter each row of a batch takes. Immutable; every adapted layer of a model shares one."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorakit.core.batched import Plan, Stack, Tables, row_plan
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
        self._plans = lru_cache(maxsize=64)(self._planned)
        self.stacks: dict[str, Any] = {}  # path -> what lorakit.attach.kinds.mixed keeps of a leaf

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
        self._check(leading, rows)
        if torch.compiler.is_compiling():  # it would warn of a cache that it traces through
            return self._groups(rows, device)
        with torch.inference_mode(False):  # kept, and met again where gradients are recorded
            return self._kept(rows, device)

    def plan(self, leading: int, rows: int) -> Plan:
        """The same as a plan over stacks of pairs, for a layer that records no gradients."""
        self._check(leading, rows)
        return self._plans(rows)

    def _planned(self, rows: int) -> Plan:
        return row_plan(self.index, rows, strict=self.strict)

    def _check(self, leading: int, rows: int) -> None:
        received = rows if self.tokens else leading
        if not self.index or received % len(self.index):
            raise AdapterError(
                f"lorakit.route was given {len(self.index)} rows, but a layer received {received}, which is no multiple of "
                "it. Give one adapter name (or None) for each row of the batch, or per='token' with one for each token. "
                "A layer that computes one thing for all rows (position embeddings, DeBERTa's relative positions) cannot "
                "take a row's adapter: run one adapter at a time with lorakit.use."
            )

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


class Live(Route):
    """The route of a model that is served: its plan is replaced between forwards, its stacks are a bank's.

    packed: the plan of a step whose tokens are packed in one row; head: of the tokens that reach the layer `head_path` in
    the same step, None where all do. rows: an adapter a row of an ordinary batch, in place of both. All None: the base.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.stacks: dict[str, Stack | Tables] = {}
        self.serving = True
        self.packed: Plan | None = None
        self.head: Plan | None = None
        self.head_path: str | None = None
        self.rows: tuple[int, ...] | None = None
        self._spread: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]  # a copy of a served model is a copy of its base
        self.serving = False

    def pack(self, plan: Plan | None, head: Plan | None) -> None:
        """The next forward is a packed step."""
        self.packed, self.head, self.rows = plan, head, None

    def spread(self, rows: tuple[int, ...] | None, *, strict: bool = False) -> None:
        """The next forwards are ordinary batches, whose rows (or equal multiples of them) take these adapters."""
        if rows is not None and all(adapter < 0 for adapter in rows):
            rows = None
        if rows != self.rows or strict != self.strict:
            self._spread.clear()
        self.packed = self.head = None
        self.rows, self.strict = rows, strict

    def of(self, path: str, leading: int, rows: int) -> Plan | None:
        """The plan for a layer's input of `rows` rows (tokens), `leading` being its first dimension; None = all the base."""
        if self.rows is not None:
            if leading % len(self.rows):
                raise AdapterError(f"a batch of {len(self.rows)} requests reached a layer as {leading} rows.")
            found = self._spread.get(rows)
            if found is None:
                found = self._spread[rows] = row_plan(self.rows, rows, strict=self.strict)
            return found
        plan = self.head if path == self.head_path and self.head is not None else self.packed
        if plan is None or plan.total == rows:
            return plan
        raise AdapterError(
            f"a step of {plan.total} tokens reached a layer as {rows} rows. It computes something for all of them at "
            "once, which no request's own adapter can change: leave the layer out of the adapters that are served."
        )
