"""A curve as a picture: drawn by matplotlib through its object API, so that no global state of it is touched."""

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import UsageError
from lorakit.report.parts import Curve, Point
from lorakit.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours (2008), told apart by colour-blind readers; all mid-tones, legible on white and on black.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
DASHES = ("-", "--", "-.", ":")  # four against six colours: twelve lines that differ, in grey print too
INK, GRID = "#767b82", "#c9ccd1"

SIZE = (5.0, 3.0)  # inches: 360 by 216 units of a picture whose smallest text is 9 units high
MOST_POINTS = 600  # a line has no more corners than a screen has columns for it
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorakit",
    "font.size": 9.5,
    "axes.unicode_minus": True,
}
_drawing = threading.Lock()


def draw(curve: Curve, form: str, *, titled: bool, dpi: float = 100) -> bytes:
    """`curve` as a file of `form` ("svg" or "png"), byte for byte the same each time.

    titled: whether the title stands in the picture (a page has it in words above). dpi: pixels an inch, for png.
    Raises UsageError where the curve has no finite point.
    """
    series = curve.drawable()
    if not series:
        raise UsageError(
            f"curve {curve.title!r}: expected at least one point with finite x and y, none came. Leave the curve out."
        )
    out = io.BytesIO()
    with own_style():
        figure = _figure(curve, series, titled)
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(out, format=form, dpi=dpi, metadata=metadata, transparent=form == "svg")
    return out.getvalue()


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's own are; both theirs and the warning filters come back.

    Both are a process's own, not a thread's: hence the lock.
    """
    import matplotlib.style

    with _drawing, matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A script that the measuring font lacks costs a few units of layout; the reader's browser has the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        yield


def _figure(curve: Curve, series: dict[str, list[Point]], titled: bool) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    lines = [_line(axes, at, points, name in curve.smooth) for at, (name, points) in enumerate(series.items())]
    for x, _ in curve.marks:
        axes.axvline(x, color=INK, linewidth=0.9, linestyle=":")
    _dress(axes, curve, [x for points in series.values() for x, _ in points])
    if titled:
        axes.set_title(one_line(curve.title), color=INK, parse_math=False)
    named = list(zip(series, lines, strict=True)) if len(series) > 1 else []  # one line alone is named by its axis
    if named or curve.marks:
        _legend(axes, curve, named)
    return figure


def _line(axes: "Axes", at: int, points: Sequence[Point], smooth: bool) -> "Line2D":
    colour, dash = PALETTE[at % len(PALETTE)], DASHES[at % len(DASHES)]
    xs, ys = np.asarray(points, dtype=np.float64).T
    mean = running_mean(ys) if smooth else ys
    if smooth:
        axes.plot(*thin(xs, ys), color=colour, linewidth=0.7, alpha=0.35)
    marker = "o" if len(xs) <= 30 and not smooth else None
    return axes.plot(*thin(xs, mean), color=colour, linewidth=1.7, linestyle=dash, marker=marker, markersize=3.2)[0]


def _dress(axes: "Axes", curve: Curve, xs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axes.set_xlabel(one_line(curve.x_label), color=INK, parse_math=False)
    axes.set_ylabel(one_line(curve.y_label), color=INK, parse_math=False)
    whole = all(float(x).is_integer() for x in xs)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.get_offset_text().set_color(INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.margins(x=0.02)


def _legend(axes: "Axes", curve: Curve, named: Sequence[tuple[str, "Line2D"]]) -> None:
    from matplotlib.lines import Line2D

    marks = [(name, Line2D([], [], color=INK, linewidth=0.9, linestyle=":")) for _, name in curve.marks]
    names, lines = zip(*named, *marks, strict=True)
    # matplotlib hides a line whose name starts with an underscore.
    labels = [one_line(name, 32).lstrip("_") for name in names]
    legend = axes.legend(lines, labels, frameon=False, labelcolor=INK, fontsize=9, handlelength=1.8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def running_mean(ys: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean over a centred window of a fifteenth of the points (at least 3), of which the part that exists counts
    at both ends. ys: (n,) -> (n,)"""
    half = max(1, len(ys) // 30)
    window = np.ones(2 * half + 1)
    inside = slice(half, half + len(ys))
    return np.asarray(np.convolve(ys, window)[inside] / np.convolve(np.ones(len(ys)), window)[inside])


def thin(
    xs: np.ndarray[Any, np.dtype[np.float64]], ys: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """At most MOST_POINTS of the points: the lowest and the highest of each run of neighbours, so that no spike is
    lost. xs, ys: (n,)"""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    runs = np.array_split(np.arange(len(xs)), MOST_POINTS // 2)
    kept = sorted({int(run[pick]) for run in runs for pick in (np.argmin(ys[run]), np.argmax(ys[run]))})
    return xs[kept], ys[kept]
