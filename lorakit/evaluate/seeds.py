"""What several seeds of one run come to, as GLUE's results are reported: each at its best epoch, then their median."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, UsageError
from lorakit.evaluate.registry import METRICS


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run: its step and value."""

    step: int
    value: float


@dataclass(frozen=True)
class SeedSummary:
    """The best values of several runs. spread: their standard deviation (of a sample), None for one run alone."""

    metric: str
    values: tuple[float, ...]
    median: float
    mean: float
    spread: float | None
    steps: tuple[int, ...]


def best_epoch(rows: Iterable[Mapping[str, Any]], metric: str) -> Best:
    """The evaluation with the best value of `metric` among the rows of a run's metrics.jsonl; of equal ones the first.

    metric: a metric's name, or loss. Raises UsageError for an unknown one, DataError where no row has it.
    """
    if metric != "loss" and metric not in METRICS:
        raise UsageError(f"metric {metric!r} is unknown; expected loss or one of: {', '.join(METRICS)}.")
    key, sign = f"eval_{metric}", 1 if metric != "loss" and METRICS[metric].higher_is_better else -1
    told = [Best(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    found = [one for one in told if math.isfinite(one.value)]
    if not found:
        raise DataError(
            f"no evaluation of it has a finite {metric}: evaluate during training (data.eval), or name another metric"
        )
    return max(found, key=lambda one: (sign * one.value, -one.step))


def over_seeds(runs: Sequence[str | Path], metric: str) -> SeedSummary:
    """The best epochs of several runs' folders, one a seed, and their median. Raises UsageError, DataError."""
    if not runs:
        raise UsageError("expected the folders of at least one run, came none.")
    best = [best_epoch(_rows(Path(run).expanduser() / "metrics.jsonl"), metric) for run in runs]
    values = tuple(one.value for one in best)
    spread = statistics.stdev(values) if len(values) > 1 else None
    steps = tuple(one.step for one in best)
    return SeedSummary(metric, values, statistics.median(values), statistics.fmean(values), spread, steps)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"it is no run's record of metrics ({error})", source=str(path)) from error
