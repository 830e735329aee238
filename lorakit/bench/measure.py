"""Running the sides of a row in turns, and what comes of it."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorakit.bench.material import UNMEASURED, Work
from lorakit.bench.sides import Norms, Side, side_of
from lorakit.errors import TrainingError
from lorakit.run.turns import wait


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class SideResult:
    """One side of a row. Times are of a round; `over` is a round's time over lorakit's in the same round.

    steps: optimizer steps in a round. tokens_per_second: real ones, over all rounds. loss: of the newest step, in training;
    final_loss: in evaluation mode on the same examples for every side, None where nothing is learnt.
    gradients: of the step that was looked at. peak_memory: bytes above the loaded model; None = not measured.
    """

    name: str
    seconds: Spread
    steps: float
    step_seconds: float
    tokens_per_second: float
    over: Spread
    loss: float
    final_loss: float | None
    gradients: Norms
    trainable: int
    peak_memory: int | None = None


@dataclass(frozen=True)
class RowResult:
    """A row of the table. tokens, examples: of the measured rounds. padding: PEFT's positions over real tokens."""

    name: str
    about: str
    rounds: int
    examples: int
    tokens: int
    padding: float
    sides: Sequence[SideResult]


def measure(work: Work, progress: Callable[[int, int], None] = lambda done, total: None) -> RowResult:
    """Build the sides of a row, run them in turns and compare them. progress(done, total): rounds."""
    with _memory_told("building the sides"):
        sides = [side_of(name, work) for name in work.kind.sides]
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    steps: dict[str, int] = {}
    norms: dict[str, Norms] = {}
    for turn, numbers in enumerate(work.rounds):
        progress(turn, len(work.rounds))
        for side in sides:
            if turn == UNMEASURED - 1:
                with _memory_told(side.name):
                    norms[side.name] = side.checked_round(numbers)
                steps[side.name] = side.steps
            else:
                seconds = _timed(side, numbers)
                times[side.name] += [seconds] if turn >= UNMEASURED else []
    progress(len(work.rounds), len(work.rounds))
    own = times[sides[0].name]
    counts = {side.name: side.steps - steps[side.name] for side in sides}
    found = [_result(side, times[side.name], own, counts[side.name], norms[side.name], work) for side in sides]
    return _row(work, found)


@contextmanager
def _memory_told(side: str) -> Iterator[None]:
    """Say whose memory did not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{side} ran out of memory ({str(error).splitlines()[0]}). Take a smaller batch or length, or leave its rows out."
        ) from error


def _timed(side: Side, numbers: Sequence[int]) -> float:
    wait()
    begin = time.perf_counter()
    with _memory_told(side.name):
        side.round(numbers)
    wait()
    return time.perf_counter() - begin


def _result(
    side: Side, times: Sequence[float], own: Sequence[float], steps: int, norms: Norms, work: Work
) -> SideResult:
    tokens = sum(work.tokens(numbers) for numbers in work.rounds[UNMEASURED:])
    return SideResult(
        name=side.name,
        seconds=_spread(times),
        steps=steps / len(times),
        step_seconds=sum(times) / steps if steps != len(times) else statistics.median(times),
        tokens_per_second=tokens / sum(times),
        over=_spread([mine / theirs for mine, theirs in zip(times, own, strict=True)]),
        loss=side.loss,
        final_loss=side.final_loss(),
        gradients=norms,
        trainable=side.trainable,
    )


def _row(work: Work, sides: Sequence[SideResult]) -> RowResult:
    measured = work.rounds[UNMEASURED:]
    tokens = sum(work.tokens(numbers) for numbers in measured)
    chunks = [chunk for numbers in measured for chunk in work.chunks(numbers)]
    positions = sum(len(chunk) * max(len(work.rows[n].input_ids) for n in chunk) for chunk in chunks)
    gc.collect()  # the sides' models are large, and the next row builds its own
    return RowResult(
        name=work.kind.name,
        about=work.kind.about,
        rounds=len(measured),
        examples=sum(map(len, measured)),
        tokens=tokens,
        padding=positions / tokens,
        sides=sides,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
