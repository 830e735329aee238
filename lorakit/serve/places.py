"""Which adapters have their rows in the layers' stacks, and where: the device's tier. Called between forwards alone.

An adapter takes the same rows in every layer, as many as its own greatest rank. Rows of adapters that no request runs
on stay until their place is needed. The lowest place is taken first, and those that run move together (`settle`): pairs
that stand side by side are multiplied where they stand (see lorakit.core.batched.Grid).
"""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.core.batched import FEW, Span, Stack, Tables
from lorakit.core.delta import is_dense
from lorakit.serve.rows import Row, Rows

HISTORIES = 4096  # layouts that were, kept until so many are
FIRST = 32  # rows that a stack begins with; it doubles up to the limit


@dataclass
class Placed:
    """One adapter's place. paths: the layers that hold its rows."""

    start: int
    end: int
    paths: tuple[str, ...]
    used: int = 0


@dataclass
class Places:
    """See the module. stacks: path -> stack, shared with the model's layers; leaf: path -> layer; limit: rows of a stack."""

    stacks: dict[str, Stack | Tables]
    leaf: Callable[[str], nn.Module]
    dtype: torch.dtype
    limit: int
    placed: dict[int, Placed] = field(default_factory=dict)
    running: dict[str, frozenset[int]] = field(default_factory=dict)
    """Thread -> the adapters of its batch: their rows stay where they are, whoever asks for a place."""
    copies: int = 0
    hits: int = 0
    evictions: int = 0
    moves: int = 0
    _clock: int = 0
    _keys: dict[object, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def ensure(self, adapter: int, rows: Rows, active: Collection[int]) -> bool:
        """Give an adapter its place, if need be in that of others which neither run nor are in `active`. False: none now."""
        self._clock += 1
        place = self.placed.get(adapter)
        if place is not None:
            self.hits += 1
            place.used = self._clock
            return True
        start = self._free(rows.rank, frozenset(active).union(*list(self.running.values())))
        if start is None:
            return False
        self._bound_histories()
        end = start + rows.rank
        self._clear(start, end)
        for path, row in rows.layers.items():
            self._write(path, adapter, row, start)
        self.placed[adapter] = Placed(start, end, tuple(rows.layers), self._clock)
        self.copies += 1
        return True

    def drop(self, adapter: int) -> None:
        """Take an adapter out of the stacks (no forward may run that uses it)."""
        for path in self.placed.pop(adapter).paths:
            stack = self.stacks[path]
            del stack.spans[adapter]
            stack.gains.pop(adapter, None)
            if isinstance(stack, Stack):
                stack.shifts.pop(adapter, None)
            else:
                del stack.pairs[adapter]
            stack.key = self._key((stack.key, adapter))

    def settle(self) -> None:
        """Move adapters that run down into rows that none of them has, so that they stand side by side."""
        running = {adapter for held in list(self.running.values()) for adapter in held if adapter in self.placed}
        while running:
            last = max(running, key=lambda adapter: self.placed[adapter].start)
            place = self.placed[last]
            others = [(self.placed[key].start, self.placed[key].end) for key in running - {last}]
            start = _gap(others, place.end - place.start, place.start)
            if start is None or start == place.start:  # the same: of an adapter without rows
                return
            self._move(last, start)

    def _move(self, adapter: int, start: int) -> None:
        """To rows below its own, of adapters that do not run."""
        self._bound_histories()
        place = self.placed[adapter]
        end = start + place.end - place.start
        self._clear(start, end)
        for path in place.paths:
            stack = self.stacks[path]
            old = stack.spans[adapter]
            new = stack.spans[adapter] = Span(start, old.rank, old.scale)
            if isinstance(stack, Stack):
                stack.A[start : new.end].copy_(stack.A[old.start : old.end])
                stack.Bt[start : new.end].copy_(stack.Bt[old.start : old.end])
            stack.key = self._key((stack.key, adapter, new))
        place.start, place.end = start, end
        self.moves += 1

    def _clear(self, start: int, end: int) -> None:
        for other in [key for key, one in self.placed.items() if one.start < end and start < one.end]:
            self.evictions += 1
            self.drop(other)

    def _free(self, rank: int, active: Collection[int]) -> int | None:
        """The lowest start with `rank` rows to take: free ones first, then those of the longest unused."""
        taken = [(one.start, one.end) for one in self.placed.values()]
        free = _gap(taken, rank, min(FEW, self.limit))
        if free is None:
            running = [(one.start, one.end) for key, one in self.placed.items() if key in active]
            if sum(end - start for start, end in running) + rank > FEW:
                free = _gap(taken, rank, self.limit)  # gathered in any case: nothing needs to make room
            if free is None:
                idle = sorted((one.used, key) for key, one in self.placed.items() if key not in active)
                free = self._oldest(idle, rank, running)
        return free

    def _oldest(self, idle: list[tuple[int, int]], rank: int, running: list[tuple[int, int]]) -> int | None:
        """The lowest gap that comes free when the longest unused go, as few of them as will do."""
        kept = {key: (self.placed[key].start, self.placed[key].end) for _, key in idle}
        for _, key in idle:
            del kept[key]
            start = _gap([*running, *kept.values()], rank, self.limit)
            if start is not None:
                return start
        return None

    def _write(self, path: str, adapter: int, row: Row, start: int) -> None:
        stack = self.stacks.get(path)
        leaf = self.leaf(path)
        weight = leaf._parameters["weight"]
        device = self._device(weight)
        if stack is None:
            stack = self.stacks[path] = self._fresh(leaf, row, weight, device)
        span = Span(start, row.rank, row.scale)
        if isinstance(stack, Stack):
            self._grow(stack, start + row.rank)
            stack.A[start : span.end].copy_(row.A)
            stack.Bt[start : span.end].copy_(row.Bt)
            if row.shift is not None:
                stack.shifts[adapter] = row.shift.to(device, stack.Bt.dtype)
        else:
            stack.pairs[adapter] = (row.A.to(device), row.Bt.to(device))
        if row.gain is not None:
            stack.gains[adapter] = row.gain.to(device)
        stack.spans[adapter] = span
        stack.key = self._key((stack.key, adapter, span))

    def _fresh(self, leaf: nn.Module, row: Row, weight: Tensor | None, device: torch.device) -> Stack | Tables:
        if isinstance(leaf, nn.Embedding):
            return Tables(key=self._key("empty"))
        dtype = weight.dtype if weight is not None and is_dense(weight) else self.dtype
        A, Bt = (torch.zeros(0, factor.shape[1], dtype=dtype, device=device) for factor in (row.A, row.Bt))
        return Stack(A, Bt, {}, self._key("empty"))

    def _grow(self, stack: Stack, rows: int) -> None:
        size = len(stack.A)
        if rows <= size:
            return
        size = min(self.limit, max(rows, FIRST, 2 * size))
        # zeros, not just any memory: a mask's 0 times a NaN would be one
        A, Bt = stack.A.new_zeros(size, stack.A.shape[1]), stack.Bt.new_zeros(size, stack.Bt.shape[1])
        A[: len(stack.A)], Bt[: len(stack.Bt)] = stack.A, stack.Bt
        stack.replace(A, Bt)

    def _device(self, weight: Tensor | None) -> torch.device:
        return torch.device("cpu") if weight is None else weight.device

    def _key(self, history: object) -> int:
        """A number for a layout, the same for layers whose spans came and went alike."""
        if history not in self._keys:
            self._keys[history] = next(self._numbers)
        return self._keys[history]

    def _bound_histories(self) -> None:
        """Number the layouts as they are now, where many were: what came and went takes no memory for ever."""
        if len(self._keys) <= HISTORIES:
            return
        self._keys.clear()
        for stack in self.stacks.values():
            stack.key = self._key(tuple(sorted(stack.spans.items(), key=lambda item: item[0])))


def _gap(taken: list[tuple[int, int]], rank: int, limit: int) -> int | None:
    """The lowest start of `rank` rows below `limit` that touch none of `taken`."""
    start = 0
    for low, high in sorted(taken):
        if low - start >= rank:
            break
        start = max(start, high)
    return start if start + rank <= limit else None
