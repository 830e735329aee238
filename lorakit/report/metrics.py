"""Reading metrics.jsonl, one JSON object a line, one line a step or an evaluation."""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.report.parts import Point

Row = Mapping[str, Any]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line that was cut off (the run was killed while it wrote) is left out.

    NaN and Infinity are read as such. Raises DataError for a file that cannot be read and for any other line that is
    no JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"expected the metrics of a run, the system answered {error.strerror}. Name a run's folder.",
            source=str(path),
        ) from error
    filled = [(at, line) for at, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for at, line in filled:
        try:
            rows.append(_row(line))
        except ValueError as error:
            if at == filled[-1][0]:
                break
            raise DataError(
                f"expected one JSON object, got {line[:60]!r} ({error}). Mend or remove this line.",
                source=str(path),
                line=at,
            ) from error
    return rows


def _row(line: bytes) -> dict[str, Any]:
    """The object on one line. Raises ValueError (of which JSON's and Unicode's errors are kinds)."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}")
    return row


def as_number(value: object) -> float | None:
    """`value` where it is a number (NaN and infinities are), else None."""
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real too
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond any float
        return math.inf


def line_of(rows: Sequence[Row], key: str) -> list[Point]:
    """`key` over "step", in order of step. A step that occurs twice (a run that was resumed) counts as last written."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = as_number(row.get("step")), as_number(row.get(key))
        if step is not None and math.isfinite(step) and value is not None:
            points[step] = value
    return sorted(points.items())
