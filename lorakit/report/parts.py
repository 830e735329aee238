"""What a report is made of: plain values, each part of which may be missing.

Report ── facts     headline figures (Fact)
       ├─ curves    pictures of lines over steps (Curve)
       ├─ pictures  other pictures, explained (Picture)
       ├─ tables    (Table)
       ├─ samples   one prompt, before and after (Sample)
       └─ title, claim, warnings, next_steps, recipe_yaml
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.errors import UsageError

Point = tuple[float, float]
Cell = str | int | float | None

# Beyond this a plotting library's own arithmetic overflows; no loss or metric that means anything is so large.
LARGEST_DRAWN = 1e38


class Fact(NamedTuple):
    """One headline figure: what it is, how much, and (small, below) what that is measured against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One picture: named lines over a common x axis. Points that are not finite are left out when it is drawn."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]  # name -> points (x, y), in the order in which they are joined
    smooth: Sequence[str] = ()  # the series drawn faintly, with their running mean over them
    marks: Sequence[tuple[float, str]] = ()  # an x and its name: a vertical dotted line

    def drawable(self) -> dict[str, list[Point]]:
        """The series with their finite points alone; a series with none is left out."""
        kept = {name: [point for point in points if _finite(point)] for name, points in self.series.items()}
        return {name: points for name, points in kept.items() if points}


@dataclass(frozen=True)
class Picture:
    """A picture drawn elsewhere, by matplotlib as SVG, and what a reader sees in it."""

    title: str
    svg: bytes
    text: str


@dataclass(frozen=True)
class Table:
    """A table of words and numbers. Raises UsageError for a row that has not one cell a column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for at, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise UsageError(
                    f"table {self.title!r}: expected {len(self.columns)} cells a row, one for each of "
                    f"{', '.join(self.columns)}; row {at} has {len(row)}. Give None for a cell that is empty."
                )


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model made of it. None: this side was not run; an empty string: it said nothing."""

    prompt: str
    reference: str | None = None
    before: str | None = None  # the base model's answer
    after: str | None = None  # the adapted model's answer
    note: str = ""
    before_correct: bool | None = None  # None: not judged
    after_correct: bool | None = None


@dataclass(frozen=True)
class Report:
    """A page. Only the title must be there; a part that is empty leaves no trace on the page."""

    title: str
    claim: str = ""  # the one sentence that a reader should leave with
    facts: Sequence[tuple[str, str] | Fact] = ()  # (label, value) or Fact(label, value, note)
    curves: Sequence[Curve] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    next_steps: Sequence[tuple[str, str]] = ()  # (what for, the command)
    recipe_yaml: str | None = None  # the resolved recipe
    warnings: Sequence[str] = ()


def _finite(values: Iterable[float]) -> bool:
    return all(math.isfinite(value) and abs(value) <= LARGEST_DRAWN for value in values)
