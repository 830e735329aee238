"""Quality against the logarithm of trained parameters: the paper's Figure 2."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorakit.compare.labels import Box, overlap, place
from lorakit.compare.result import BASE, Comparison, Row
from lorakit.report.picture import DASHES, GRID, INK, PALETTE
from lorakit.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (8.4, 5.2)  # inches
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LABEL = 8.5  # points
Point = tuple[Row, int, float]  # a row, its trained parameters, its quality
HALF = 5.0  # pixels from a marker's middle to its edge


def drawable(found: Comparison) -> bool:
    """Whether a method has a quality to be drawn."""
    return bool(_points(found))


def _points(found: Comparison) -> list[Point]:
    known = [(row, row.trained, found.of(row)) for row in found.methods]
    return [(row, count, value) for row, count, value in known if count and value is not None]


def figure_2(found: Comparison) -> "Figure":
    """A point a method and size, its bar the least and the most of the seeds; a line joins the sizes of one entry, a dotted
    line is the base alone. Labels keep clear of each other.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    points = _points(found)
    families = list(dict.fromkeys(row.family for row, _, _ in points))
    for at, family in enumerate(families):
        _family(axes, at, [point for point in points if point[0].family == family])
    levels = _levels(axes, found, points)
    _dress(axes, found, points)
    _label(figure, axes, points, families, levels)
    return figure


def _family(axes: "Axes", at: int, points: Sequence[Point]) -> None:
    colour, marker = PALETTE[at % len(PALETTE)], MARKERS[at % len(MARKERS)]
    ordered = sorted(points, key=lambda point: point[1])
    xs, ys = [count for _, count, _ in ordered], [value for _, _, value in ordered]
    bars = [(row.quality.least, row.quality.most) for row, _, _ in ordered if row.quality is not None]
    down, up = (
        [y - low for y, (low, _) in zip(ys, bars, strict=True)],
        [top - y for y, (_, top) in zip(ys, bars, strict=True)],
    )
    dash = DASHES[at // len(PALETTE) % len(DASHES)]
    axes.errorbar(
        xs, ys, yerr=[down, up], color=colour, marker=marker, markersize=6, linestyle=dash if len(xs) > 1 else "none",
        linewidth=1.4, elinewidth=1.1, capsize=2.5,
    )  # fmt: skip


def _levels(axes: "Axes", found: Comparison, points: Sequence[Point]) -> list[tuple[str, float]]:
    """A dotted line for each row of the base; one that lies so far off that the points would be flattened is told in words."""
    known = [(row.label, found.of(row)) for row in found.rows if row.kind == BASE]
    levels = [(label, value) for label, value in known if value is not None]
    ends = [end for row, _, _ in points if row.quality for end in (row.quality.least, row.quality.most)]
    span = max(max(ends) - min(ends), 1e-9)
    near = [(label, value) for label, value in levels if min(ends) - span <= value <= max(ends) + span]
    for _, value in near:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    far = [f"{label} {value:.4g}" for label, value in levels if (label, value) not in near]
    if far:
        axes.set_title(f"not drawn, far off: {one_line(', '.join(far), 110)}", color=INK, fontsize=LABEL, loc="right",
                       parse_math=False)  # fmt: skip
    return near


def _dress(axes: "Axes", found: Comparison, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    counts = [count for _, count, _ in points]
    low, high = min(counts), max(counts)
    axes.set_xscale("log")
    axes.set_xlim(low / 2.2, high * 2.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.1)
    better = "more is better" if found.higher else "less is better"
    axes.set_xlabel("trained parameters (logarithmic)", color=INK)
    axes.set_ylabel(
        f"{one_line(found.quality.replace('_', ' '))}, {found.middle} of the seeds ({better})",
        color=INK,
        parse_math=False,
    )
    axes.tick_params(which="both", colors=INK, length=0)
    axes.grid(axis="both", color=GRID, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _count(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _label(
    figure: "Figure",
    axes: "Axes",
    points: Sequence[Point],
    families: Sequence[str],
    levels: Sequence[tuple[str, float]],
) -> None:
    """Names at the points, with a thin line where one had to go further off, and at the dotted lines' right ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # the layout has to be settled: places are in pixels
    figure.set_layout_engine("none")
    renderer = canvas.get_renderer()
    frame: Any = axes.get_window_extent(renderer)
    taken = _marks(axes, points)
    texts: list[Any] = []
    placed: list[Box] = []
    for label, value in levels:
        text = _text(axes, label, INK)
        at = axes.transData.transform((axes.get_xlim()[1], value))
        box = text.get_window_extent(renderer)
        spots: list[Box] = [
            (at[0] - box.width - 4 - shift, bottom, at[0] - 4 - shift, bottom + box.height)
            for shift in (0.0, frame.width / 4, frame.width / 2, frame.width * 0.7)
            for bottom in (at[1] + 3, at[1] - 3 - box.height)
        ]
        chosen = min(spots, key=lambda spot: sum(overlap(spot, other) for other in [*taken, *placed]))
        text.set_position(axes.transAxes.inverted().transform(chosen[:2]))
        placed.append(chosen)
    for row, _, _ in points:
        colour = PALETTE[families.index(row.family) % len(PALETTE)]
        texts.append(_text(axes, row.label, colour))
    spots_of = [tuple(axes.transData.transform((count, value))) for _, count, value in points]
    extents = [text.get_window_extent(renderer) for text in texts]
    lines = _joins(axes, points)
    for _, value in levels:
        height = float(axes.transData.transform((1, value))[1])
        lines.append((frame.x0, height - 1.5, frame.x1, height + 1.5))
    sizes = [(box.width, box.height) for box in extents]
    boxes = place(spots_of, sizes, [*taken, *placed, *lines], (frame.x0, frame.y0, frame.x1, frame.y1))
    for text, box, spot in zip(texts, boxes, spots_of, strict=True):
        text.set_position(axes.transAxes.inverted().transform(box[:2]))
        _lead(axes, box, spot, text.get_color())


def _text(axes: "Axes", label: str, colour: str) -> Any:
    return axes.text(
        0, 0, one_line(label, 40), fontsize=LABEL, color=colour, transform=axes.transAxes, parse_math=False,
        verticalalignment="bottom",
    )  # fmt: skip


def _marks(axes: "Axes", points: Sequence[Point]) -> list[Box]:
    """The boxes of the markers and of their bars."""
    boxes: list[Box] = []
    for row, count, value in points:
        x, y = axes.transData.transform((count, value))
        boxes.append((x - HALF, y - HALF, x + HALF, y + HALF))
        if row.quality is not None:
            low, high = (
                float(axes.transData.transform((count, end))[1]) for end in (row.quality.least, row.quality.most)
            )
            low, high = min(low, high), max(low, high)
            boxes.append((x - 3, low, x + 3, high))
    return boxes


def _joins(axes: "Axes", points: Sequence[Point]) -> list[Box]:
    """Small boxes along the lines that join the sizes of a family."""
    boxes: list[Box] = []
    for family in {row.family for row, _, _ in points}:
        own = sorted((count, value) for row, count, value in points if row.family == family)
        spots = axes.transData.transform(own)
        for (x, y), (u, v) in pairwise(spots):
            steps = max(1, int(math.hypot(u - x, v - y) / 6))
            middles = [(x + (u - x) * n / steps, y + (v - y) * n / steps) for n in range(1, steps)]
            boxes += [(a - 2, b - 2, a + 2, b + 2) for a, b in middles]
    return boxes


def _lead(axes: "Axes", box: Box, spot: Any, colour: Any) -> None:
    """A thin line from a label that had to leave its point."""
    near = (min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3]))
    away = ((near[0] - spot[0]) ** 2 + (near[1] - spot[1]) ** 2) ** 0.5
    if away <= 14:
        return
    ends = axes.transAxes.inverted().transform([near, spot])
    axes.plot(ends[:, 0], ends[:, 1], transform=axes.transAxes, color=colour, linewidth=0.6, alpha=0.7, zorder=1.5)
