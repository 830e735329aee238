"""The result of a comparison: a row for the base in each guise, and for each method at each size."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.compare.outcome import DONE, FAILED, Outcome

BASE, METHOD = "base", "method"


@dataclass(frozen=True)
class Figure:
    """A figure over the seeds. spread: the standard deviation (n - 1); None for a single seed."""

    mean: float
    median: float
    spread: float | None
    least: float
    most: float
    seeds: int


def figure_of(values: Sequence[float | None]) -> Figure | None:
    """The figure of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Figure(statistics.fmean(known), statistics.median(known), spread, min(known), max(known), len(known))


@dataclass(frozen=True)
class Row:
    """kind: base or method. family, size, swept: as of its arm. lr: the chosen rate; tried: rate -> what it gave on the rows set
    aside. peak_memory: bytes above the loaded base, at the peak of training. latency: one of latency.Added.as_dict() a batch
    size. notes: what could not be measured.
    """

    label: str
    kind: str
    family: str
    size: str | None = None
    swept: tuple[str, float] | None = None
    lr: float | None = None
    tried: dict[str, float | None] = field(default_factory=dict)
    runs: Sequence[Outcome] = ()
    peak_memory: int | None = None
    latency: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def done(self) -> list[Outcome]:
        return [run for run in self.runs if run.status == DONE]

    @property
    def failed(self) -> list[Outcome]:
        return [run for run in self.runs if run.status == FAILED]

    @property
    def quality(self) -> Figure | None:
        return figure_of([run.quality for run in self.done])

    @property
    def perplexity(self) -> Figure | None:
        return figure_of([run.perplexity for run in self.done])

    @property
    def trained(self) -> int | None:
        return next((run.trained for run in self.done if run.trained is not None), None)

    @property
    def adapter_bytes(self) -> int | None:
        return next((run.adapter_bytes for run in self.done if run.adapter_bytes is not None), None)

    @property
    def positions(self) -> int | None:
        return next((run.positions for run in self.done if run.positions is not None), None)

    @property
    def step_seconds(self) -> float | None:
        known = [run.step_seconds for run in self.done if run.step_seconds is not None]
        return statistics.median(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("trained", "adapter_bytes", "positions", "step_seconds")}
        figures = {name: getattr(self, name) for name in ("quality", "perplexity")}
        told = {name: None if one is None else asdict(one) for name, one in figures.items()}
        return {**asdict(self), **found, **told, "status": self.status}

    @property
    def status(self) -> str:
        """done; failed, where no run gave a figure; or how many did."""
        if not self.failed:
            return DONE
        return FAILED if not self.done else f"{len(self.failed)} of {len(self.runs)} failed"


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared. quality: the metric's name; higher: whether more of it is better; middle: mean or median.

    base_parameters: of the model. perplexity_before: of the base on the general text. notes: what a reader has to know.
    """

    folder: Path
    model: str
    data: str
    task: str
    quality: str
    higher: bool
    middle: str
    base_parameters: int
    rows: Sequence[Row]
    perplexity_before: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def of(self, row: Row) -> float | None:
        """The row's quality, in the middle of its seeds."""
        found = row.quality
        return None if found is None else found.median if self.middle == "median" else found.mean

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if row.kind == METHOD]

    @property
    def best(self) -> Row | None:
        """The method (at a size) of the best quality; the one with fewer parameters of two that are equal."""
        known = [(row, self.of(row)) for row in self.methods]
        sign = 1 if self.higher else -1
        ranked = [(-sign * value, row.trained or 0, at) for at, (row, value) in enumerate(known) if value is not None]
        return known[min(ranked)[2]][0] if ranked else None

    def families(self) -> dict[str, list[Row]]:
        """Methods by entry, their sizes in order."""
        found: dict[str, list[Row]] = {}
        for row in self.methods:
            found.setdefault(row.family, []).append(row)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        rest = {name: getattr(self, name) for name in _PLAIN}
        return {**rest, "folder": str(self.folder), "notes": list(self.notes), "rows": [r.as_dict() for r in self.rows]}


_PLAIN = (
    "model", "data", "task", "quality", "higher", "middle", "base_parameters", "perplexity_before", "machine",
)  # fmt: skip
