"""Heat maps and lines by matplotlib's object API, in the colours of lorakit.report."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorakit.report.picture import DASHES, GRID, INK, PALETTE, own_style
from lorakit.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DPI = 160
WIDTH = 8.4  # inches
COLOURS = "viridis"  # even in lightness, for colour-blind readers and grey print too
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One heat map. values: rows from the top; a cell that is NaN stays empty. x_ticks, y_ticks: a name a column and row; ()
    counts from 1."""

    title: str
    values: Rows
    x_label: str = ""
    y_label: str = ""
    x_ticks: Sequence[str] = ()
    y_ticks: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Lines: name -> (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: bool = False


def drawn(build: Callable[[], "Figure"], form: str) -> bytes:
    """A figure as a file of `form` ("svg" or "png"), byte for byte the same each time."""
    out = io.BytesIO()
    with own_style():
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        build().savefig(out, format=form, dpi=DPI, metadata=metadata, transparent=form == "svg")
    return out.getvalue()


def heat_maps(panels: Sequence[Sequence[Panel]], *, scale: str, top: float | None, wide: bool = False) -> "Figure":
    """Rows of panels with one colour scale from 0 to `top`; None gives each row one of its own, to its largest value.

    scale: the scale's name. wide: a panel may take the whole width.
    """
    from matplotlib.figure import Figure

    across = max(len(row) for row in panels)
    widest = WIDTH / max(across, 1 if wide else 3)
    heights = [_height(row, widest) for row in panels]
    figure = Figure(figsize=(widest * across + 0.7, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), across, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, places in zip(panels, axes, strict=True):
        own = top if top is not None else max(1e-12, *(np.nanmax(np.asarray(panel.values)) for panel in row))
        for one, panel in zip(places, row, strict=False):
            image = _heat_map(one, panel, own)
        for one in places[len(row) :]:
            one.set_visible(False)
        if top is None:
            _colour_bar(figure, image, list(places[: len(row)]), scale, 1.0)
    if top is not None:
        _colour_bar(figure, image, list(axes.flat), scale, min(1.0, 2.2 / sum(heights)))
    return figure


def _colour_bar(figure: "Figure", image: "AxesImage", axes: Sequence["Axes"], scale: str, shrink: float) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=16, pad=0.015)
    bar.set_label(one_line(scale, 60), color=INK)
    bar.ax.tick_params(colors=INK, length=0, labelsize=8)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # 256 rectangles, else


def _height(row: Sequence[Panel], width: float) -> float:
    """A panel's height in inches: its cells are square, but no panel is a stripe or a tower."""
    ratios = [len(panel.values) / max(1, len(panel.values[0])) for panel in row]
    return 0.75 + (width - 0.7) * min(1.3, max(0.35, *ratios))


def _heat_map(axes: "Axes", panel: Panel, top: float) -> "AxesImage":
    values = np.ma.masked_invalid(np.asarray(panel.values, dtype=np.float64))
    image = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_title(one_line(panel.title, 60), color=INK, fontsize=9, parse_math=False)
    axes.set_xlabel(one_line(panel.x_label), color=INK, fontsize=8.5, parse_math=False)
    axes.set_ylabel(one_line(panel.y_label), color=INK, fontsize=8.5, parse_math=False)
    sides = ((axes.xaxis, panel.x_ticks, values.shape[1]), (axes.yaxis, panel.y_ticks, values.shape[0]))
    for axis, names, count in sides:
        places = _places(count, names)
        axis.set_ticks(places, [one_line(names[at], 18) if names else str(at + 1) for at in places], parse_math=False)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _places(count: int, names: Sequence[str]) -> list[int]:
    """Which cells of a side are named: all of a few, and every word; else about six numbers, round ones."""
    if count <= 5 or (names and not all(name.isdigit() for name in names)):
        return list(range(count))
    step = next(step for step in (2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if count / step <= 7)
    return list(range(0 if names else step - 1, count, step))


def charts(parts: Sequence[Chart]) -> "Figure":
    """Line charts side by side, whose lines of one name have one colour and one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    names = list(dict.fromkeys(name for part in parts for name in part.lines))
    alike = len({part.y_label for part in parts}) == 1
    places = figure.subplots(1, len(parts), squeeze=False, sharey=alike)[0]
    for axes, part in zip(places, parts, strict=True):
        for name, (xs, ys) in part.lines.items():
            at = names.index(name)
            colour, dash = PALETTE[at % len(PALETTE)], DASHES[at // len(PALETTE) % len(DASHES)]
            marker = "o" if len(xs) <= 16 else None
            axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=3, label=name)
        _dress(axes, part)
    handles, labels = places[0].get_legend_handles_labels()
    if len(labels) > 1:
        legend = figure.legend(
            handles,
            [one_line(label, 32).lstrip("_") for label in labels],
            loc="outside lower center",
            ncols=min(len(labels), 7),
            frameon=False,
            labelcolor=INK,
            fontsize=8.5,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _dress(axes: "Axes", part: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(one_line(part.title, 60), color=INK, fontsize=9.5, parse_math=False)
    axes.set_xlabel(one_line(part.x_label), color=INK, parse_math=False)
    axes.set_ylabel(one_line(part.y_label), color=INK, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 4, 5, 8, 10], integer=True))
    if part.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
