"""Where the labels of points go so that none covers another, a point or a line."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
Spot = tuple[float, float]

_ANGLES = (0, 90, 270, 180, 45, 315, 135, 225, 22, 338, 158, 202, 67, 113, 247, 293)
_RINGS = (7, 12, 18, 26, 36, 48, 62, 80, 100, 125, 155)
"""Distances from the point, in pixels, near ones first."""


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def place(points: Sequence[Spot], sizes: Sequence[Spot], taken: Sequence[Box], frame: Box) -> list[Box]:
    """A box for each point's label, (width, height) large, within `frame`.

    taken: boxes that labels keep clear of. The nearest free place of each is taken, the most crowded points first; where
    there is none, the one that covers least.
    """
    order = sorted(range(len(points)), key=lambda at: -_crowd(points[at], points))
    found: dict[int, Box] = {}
    for at in order:
        spots = [_box(points[at], sizes[at], ring, angle) for ring in _RINGS for angle in _ANGLES]
        inside = [box for box in spots if _inside(box, frame)] or spots
        others = [*taken, *found.values()]
        found[at] = min(inside, key=lambda box: sum(overlap(box, other) for other in others))  # the first of the least
    return [found[at] for at in range(len(points))]


def _crowd(point: Spot, points: Sequence[Spot]) -> float:
    return sum(1 / (20 + math.dist(point, other)) for other in points)


def _box(point: Spot, size: Spot, ring: float, angle: float) -> Box:
    """The box whose edge, in direction `angle`, is `ring` pixels from the point."""
    x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    width, height = size
    left = point[0] + ring * x + (x - 1) * width / 2
    bottom = point[1] + ring * y + (y - 1) * height / 2
    return left, bottom, left + width, bottom + height


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
