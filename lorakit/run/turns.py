"""Timing what a model does plain, with an adapter, and with it merged: in turns, so that what disturbs the machine meets all.

Each side is the model itself in another state. The plain side has no adapter attached at all, and so not even the cost of
one that is off.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.attach.api import add, detach
from lorakit.attach.host import Record
from lorakit.attach.merge import merge, unmerge


@dataclass(frozen=True)
class Side:
    """A state of a model. enter: bring it about; leave: take it back."""

    name: str
    enter: Callable[[], Any]
    leave: Callable[[], Any]


def plain_side(name: str) -> Side:
    """The model as it is."""
    return Side(name, lambda: None, lambda: None)


def adapted_side(name: str, model: nn.Module, record: Record) -> Side:
    """The model with a detached adapter's record attached again."""
    return Side(name, lambda: add(model, record), lambda: detach(model, record.name))


def merged_side(name: str, model: nn.Module, record: Record) -> Side:
    """The model with the adapter merged into it."""

    def enter() -> None:
        add(model, record)
        try:
            merge(model)
        except BaseException:
            detach(model, record.name)
            raise

    def leave() -> None:
        unmerge(model)
        detach(model, record.name)

    return Side(name, enter, leave)


def in_turns(
    sides: Sequence[Side],
    work: Callable[[], Any],
    trials: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Side -> seconds of `work` in each trial. Every trial takes all sides once, in an order of its own.

    Before each measured call one is made that is not: a state that was just brought about finds its caches cold.
    progress(done, total): trials.
    """
    draw = random.Random(seed)
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for trial in range(trials + 1):  # the first is not counted
        for side in draw.sample(list(sides), len(sides)):
            side.enter()
            try:
                work()
                seconds = _timed(work)
            finally:
                side.leave()
            if trial:
                times[side.name].append(seconds)
        progress(trial, trials)
    return times


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, without pauses of the garbage collector."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        wait()
        begin = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begin
    finally:
        if collecting:
            gc.enable()


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
