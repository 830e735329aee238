"""Which learning rate to try next, from what was tried: a walk uphill from the middle of a grid, within a budget."""

from collections.abc import Mapping, Sequence


def next_rate(grid: Sequence[float], tried: Mapping[float, float | None], budget: int) -> float | None:
    """The next rate of `grid` (ascending) to try; None when the budget is spent or both neighbours of the best are worse.

    tried: rate -> what it gave, higher is better; None = it failed, which counts as too high a rate.
    """
    if len(tried) >= budget:
        return None
    if not tried:
        return grid[len(grid) // 2]
    best = best_rate(tried)
    at = grid.index(min(tried)) if best is None else grid.index(best)
    around = (at - 1,) if best is None else (at + 1, at - 1)
    return next((grid[near] for near in around if 0 <= near < len(grid) and grid[near] not in tried), None)


def best_rate(tried: Mapping[float, float | None]) -> float | None:
    """The rate that gave most, the lower of two that gave the same; None where all failed."""
    known = {rate: value for rate, value in tried.items() if value is not None}
    return min(known, key=lambda rate: (-known[rate], rate)) if known else None


def at_edge(grid: Sequence[float], tried: Mapping[float, float | None]) -> bool:
    """Whether the best rate has an untried neighbour, or none: a better one may lie beyond."""
    best = best_rate(tried)
    if best is None or len(grid) == 1:
        return False
    at = grid.index(best)
    return any(not 0 <= near < len(grid) or grid[near] not in tried for near in (at - 1, at + 1))
