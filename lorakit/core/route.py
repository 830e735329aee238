"""A routing plan: which adapter each row of a batch takes. Immutable; every adapted layer of a model shares one."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorakit.core.batched import Plan, Segment, Stack, Tables, row_plan
from lorakit.errors import AdapterError

Group = tuple[int, Tensor]  # (slot, the rows of the flattened input that take it)
KEPT = 64  # steps, and plans of one, that are kept


class Route:
    """`index[i]` is the slot (a position in the list of active adapters) of row i, or -1 for the base.

    A layer may see the rows multiplied: beams repeat them, a flattened input has a row per token. Each entry then
    stands for `rows // len(index)` neighbouring rows; anything else is an error. tokens: the entries are tokens' rather
    than rows', so that the leading dimension of an input says nothing.
    """

    idle = False  # whether all rows take the base

    def __init__(self, index: tuple[int, ...], *, strict: bool = False, tokens: bool = False) -> None:
        self.index, self.strict, self.tokens = index, strict, tokens
        self._kept = lru_cache(maxsize=KEPT)(self._groups)
        self._plans = lru_cache(maxsize=KEPT)(self._planned)
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


class Step:
    """Which adapters the rows of a served model's forwards take. Immutable; kept, for the next step is mostly the same.

    packed: of tokens that are packed in one row; head: of those that reach the head in the same step, None where all do.
    rows: an adapter a row of an ordinary batch, in place of both. All None: the base.
    """

    def __init__(
        self,
        packed: tuple[Segment, ...] | None = None,
        head: tuple[Segment, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        strict: bool = False,
    ) -> None:
        self.rows, self.strict = rows, strict
        self.packed = None if packed is None else Plan(packed, strict=strict)
        self.head = self.packed if head is None else Plan(head, strict=strict)
        self._plans: dict[int, Plan] = {}

    def plan(self, leading: int, rows: int, *, head: bool) -> Plan | None:
        """The plan for a layer's input of `rows` rows (tokens), `leading` being its first dimension; None = all the base.

        head: whether the layer is the model's head.
        """
        if self.rows is not None:
            return self._spread(self.rows, leading, rows)
        plan = self.head if head else self.packed
        if plan is None or plan.total == rows:
            return plan
        raise AdapterError(
            f"a step of {plan.total} tokens reached a layer as {rows} rows. It computes something for all of them at "
            "once, which no request's own adapter can change: leave the layer out of the adapters that are served."
        )

    def _spread(self, index: tuple[int, ...], leading: int, rows: int) -> Plan:
        if leading % len(index):
            raise AdapterError(f"a batch of {len(index)} requests reached a layer as {leading} rows.")
        found = self._plans.get(rows)
        if found is None:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            found = self._plans[rows] = row_plan(index, rows, strict=self.strict)
        return found


class Live(Route):
    """The route of a model that is served: its step is replaced between forwards, its stacks are a bank's."""

    def __init__(self) -> None:
        super().__init__(())
        self.stacks: dict[str, Stack | Tables] = {}
        self.serving = True
        self._take(BASE)
        self.head_path: str | None = None
        self._steps = lru_cache(maxsize=KEPT)(Step)

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]  # a copy of a served model is a copy of its base
        self.serving = False

    def plain(self) -> None:
        """The next forwards are the base's."""
        self._take(BASE)

    def pack(self, packed: Sequence[Segment], head: Sequence[Segment] | None, *, strict: bool = False) -> None:
        """The next forward is a step of tokens packed in one row, in these segments; head: of those that reach the head."""
        self._take(self._steps(tuple(packed), None if head is None else tuple(head), None, strict))

    def spread(self, rows: tuple[int, ...], *, strict: bool = False) -> None:
        """The next forwards are ordinary batches, whose rows (or equal multiples of them) take these adapters."""
        self._take(BASE if all(adapter < 0 for adapter in rows) else self._steps(None, None, rows, strict))

    def _take(self, step: Step) -> None:
        self.step, self.idle = step, step is BASE

    def of(self, path: str, leading: int, rows: int) -> Plan | None:
        """The plan for a layer's input, as Step.plan gives it."""
        return self.step.plan(leading, rows, head=path == self.head_path)


BASE = Step()
