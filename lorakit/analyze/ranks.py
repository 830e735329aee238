"""How many directions each layer keeps: by a share of the energy, one number for all, or a budget of bytes."""

import heapq
from collections.abc import Sequence

from torch import Tensor

from lorakit.analyze.spectrum import numerical_rank, rank_for
from lorakit.errors import UsageError


def by_energy(values: Sequence[Tensor], share: float) -> list[int]:
    """The smallest rank of each layer that keeps `share` of its own energy."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(f"energy={share!r}: expected the share of ‖dW‖² to keep, over 0 and at most 1, as in 0.99.")
    return [rank_for(one, share) for one in values]


def by_rank(stored: Sequence[int], rank: int) -> list[int]:
    """`rank` in every layer that has more."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank={rank!r}: expected a whole number of at least 1.")
    if rank > max(stored):
        raise UsageError(
            f"rank={rank}: the adapter's highest rank is {max(stored)}, and compressing never raises one. Choose a lower one."
        )
    return [min(rank, one) for one in stored]


def by_bytes(values: Sequence[Tensor], costs: Sequence[int], budget: int, least: int) -> list[int]:
    """The ranks that keep most of the adapter's energy, the sum over layers of s^2, within a budget.

    values: of each layer, falling; costs: bytes of one of its directions; budget: bytes for all directions; least: bytes of
    all else, for the message. Each layer keeps one; then the direction with the most energy a byte comes next, as long as one
    fits (greedy: a layer's own come in falling order, so that this is optimal but for the last few that do not fit).
    """
    needed = sum(costs)
    if needed > budget:
        raise UsageError(
            f"bytes={budget + least:,} are too few: with one direction a layer the file has {needed + least:,} bytes. "
            "Allow more, or train fewer modules."
        )
    ranks, left = [1] * len(values), budget - needed
    useful = [numerical_rank(one) for one in values]
    waiting = [
        (-(float(one[1]) ** 2) / costs[at], at) for at, one in enumerate(values) if useful[at] > 1 and one.numel() > 1
    ]
    heapq.heapify(waiting)
    while waiting:
        _, at = heapq.heappop(waiting)
        if costs[at] > left:
            continue
        left -= costs[at]
        ranks[at] += 1
        if ranks[at] < useful[at]:
            heapq.heappush(waiting, (-(float(values[at][ranks[at]]) ** 2) / costs[at], at))
    return ranks
