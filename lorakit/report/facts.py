"""The headline figures of a run, and its claim in one sentence."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from lorakit.report.metrics import Row, as_number, line_of
from lorakit.report.parts import Fact, Point
from lorakit.report.text import duration, number, percent, size

Summary = Mapping[str, Any]


def facts(rows: Sequence[Row], summary: Summary) -> list[Fact]:
    """What `summary` holds of the figures that a reader asks for first; one that is missing is left out."""
    found = [
        _trained(summary),
        _adapter(summary),
        _fact("Peak memory", figure(summary, "peak_memory_bytes"), size),
        _fact("Time", figure(summary, "seconds"), duration),
        _speed(rows, summary),
        _fact("Best step", figure(summary, "best_step"), _count),
    ]
    return [fact for fact in found if fact is not None]


def loss_claim(rows: Sequence[Row], summary: Summary) -> str:
    """How far the evaluation loss went, and at the price of how many parameters; empty where there is no such loss."""
    losses = [point for point in line_of(rows, "eval_loss") if math.isfinite(point[1])]
    if len(losses) < 2:
        return ""
    first, kept = losses[0], kept_point(losses, summary)
    trained, total = figure(summary, "trainable_parameters"), figure(summary, "total_parameters")
    price = f"Training {percent(trained, total)} of the parameters" if trained is not None and total else "Training"
    return f"{price} took the evaluation loss from {number(first[1])} to {number(kept[1])}."


def kept_point(points: Sequence[Point], summary: Summary) -> Point:
    """The point at the best step, where the summary names one that is among `points`; else the last."""
    best = figure(summary, "best_step")
    return next((point for point in points if point[0] == best), points[-1])


def figure(summary: Summary, key: str) -> float | None:
    """A figure of the summary, where it is there, finite and not negative."""
    value = as_number(summary.get(key))
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def _trained(summary: Summary) -> Fact | None:
    part, whole = figure(summary, "trainable_parameters"), figure(summary, "total_parameters")
    if part is None or not whole:
        return _fact("Trained parameters", part, _count)
    return Fact("Trained parameters", percent(part, whole), f"{_count(part)} of {_count(whole)}")


def _adapter(summary: Summary) -> Fact | None:
    part, whole = figure(summary, "adapter_bytes"), figure(summary, "model_bytes")
    if part is None or not whole:
        return _fact("Adapter on disk", part, size)
    return Fact("Adapter on disk", size(part), f"{percent(part, whole)} of the model's {size(whole)}")


def _speed(rows: Sequence[Row], summary: Summary) -> Fact | None:
    told = figure(summary, "tokens_per_second")
    if told is not None:
        return Fact("Speed", f"{_count(told)} tokens/s")
    seen = [value for _, value in line_of(rows, "tokens_per_second") if math.isfinite(value)]
    return Fact("Speed", f"{_count(median(seen))} tokens/s", "median over the steps") if seen else None


def _fact(label: str, value: float | None, form: Callable[[float], str]) -> Fact | None:
    return None if value is None else Fact(label, form(value))


def _count(value: float) -> str:
    return f"{value:,.0f}"
