"""What a comparison's figures say, in sentences: sweeps of sizes, rates at the edge of what was tried, failures."""

from collections.abc import Sequence
from itertools import pairwise

from lorakit.compare.arms import Arm
from lorakit.compare.result import Comparison, Row
from lorakit.compare.search import at_edge


def findings(found: Comparison, arms: Sequence[Arm]) -> list[str]:
    """Every sentence that there is a reason for."""
    sweeps = [_sweep(found, family, rows) for family, rows in found.families().items()]
    edges = [_edge(row, arm) for row, arm in zip(found.methods, arms, strict=True)]
    broken = [f"{row.label}: {row.status}. {row.failed[0].reason}" for row in found.rows if row.failed]
    missing = [f"{row.label}: {note}" for row in found.rows for note in row.notes]
    return [*broken, *(one for one in [*sweeps, *edges] if one is not None), *missing]


def _sweep(found: Comparison, family: str, rows: Sequence[Row]) -> str | None:
    """Whether quality is monotonic in the size that is swept; the paper's Figure 2 has prefixes lose it."""
    known = [(row.swept, value) for row in rows if (value := found.of(row)) is not None]
    points = sorted((swept[1], value) for swept, value in known if swept is not None)
    if len(points) < 2 or len({size for size, _ in points}) < len(points):
        return None
    name = next(swept[0] for swept, _ in known if swept is not None).rpartition(".")[2]
    listed = ", ".join(f"{value:.4g} at {size:g}" for size, value in points)
    sign = 1 if found.higher else -1
    worse = [(a, b) for (a, x), (b, y) in pairwise(points) if sign * y < sign * x]
    if not worse:
        verdict = "monotonic: no larger size is worse"
    elif len(worse) == len(points) - 1:
        verdict = "monotonic, downwards: every larger size is worse"
    else:
        verdict = "not monotonic: worse " + " and ".join(f"from {a:g} to {b:g}" for a, b in worse)
    return f"{family}: {found.quality} against {name} is {listed}; {verdict}."


def _edge(row: Row, arm: Arm) -> str | None:
    tried = {float(rate): value for rate, value in row.tried.items()}
    if not at_edge(arm.rates, tried) or row.lr is None:
        return None
    return (
        f"{row.label}: the best learning rate, {row.lr:g}, is at the edge of those tried "
        f"({', '.join(f'{rate:g}' for rate in sorted(tried))}); a better one may lie beyond. Give it more `lrs` or budget."
    )
