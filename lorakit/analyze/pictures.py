"""Which pictures an analysis makes, and the two sentences that explain each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorakit.analyze.compare import KINDS, Grid
from lorakit.analyze.draw import Chart, Panel, charts, drawn, heat_maps
from lorakit.analyze.result import Analysis, ModuleSpectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHI = "φ(A, B, i, j) = ‖U_A[:, :i]ᵀ U_B[:, :j]‖²_F / min(i, j), U the right-singular vectors (section 7.2, appendix G)"
NAMES = ("spectrum", "modules", "layers", "adapters", "adapters-by-layer", "weight", "amplification")
Build = Callable[[], "Figure"]


@dataclass(frozen=True)
class Drawn:
    """A picture in both forms. name: of its files; text: what it shows, and by which definition."""

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes


def pictures_of(analysis: Analysis) -> list[Drawn]:
    """Every picture that there is something for, in the order of the report."""
    made = [
        _spectrum(analysis),
        _modules(analysis),
        _layers(analysis),
        _adapters(analysis),
        _adapters_by_layer(analysis),
        _weight(analysis),
        _amplification(analysis),
    ]
    return [_draw(*one) for one in made if one is not None]


Plan = tuple[str, str, str, Build]  # name, title, text, how to draw


def _draw(name: str, title: str, text: str, build: Build) -> Drawn:
    return Drawn(name, title, text, drawn(build, "png"), drawn(build, "svg"))


def _spectrum(analysis: Analysis) -> Plan | None:
    kinds = _trained(analysis)
    if not kinds:
        return None
    values = Chart("Singular values over the largest", "direction", "s_i / s_1", _lines(kinds, _falling), log=True)
    shares = Chart("Energy kept by the best rank-k part", "rank k", "share of ‖dW‖²", _lines(kinds, _energy))
    text = (
        "Singular values of dW = (alpha / r) B A and the share of its energy, (s_1² + ... + s_k²) / ‖dW‖²_F, that the best "
        "approximation of rank k keeps: the mean over the layers of each type of matrix (section 7.2 "
        "asks which rank an update needs). Where the right-hand line reaches its top early, a smaller rank holds the "
        "same update, and lorakit compress writes it."
    )
    return "spectrum", "How many directions the update uses", text, lambda: charts([values, shares])


def _trained(analysis: Analysis) -> dict[str, list[ModuleSpectrum]]:
    """The modules whose update is not zero, by type."""
    kinds = {kind: [one for one in group if one.numerical_rank] for kind, group in analysis.kinds().items()}
    return {kind: group for kind, group in kinds.items() if group}


def _falling(one: ModuleSpectrum) -> Sequence[float]:
    return [value / one.values[0] for value in one.values[: one.numerical_rank]]


def _energy(one: ModuleSpectrum) -> Sequence[float]:
    return one.energy


def _lines(
    kinds: dict[str, list[ModuleSpectrum]], of: Callable[[ModuleSpectrum], Sequence[float]]
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """The mean over the modules of each type, of those that go so far."""
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for kind, group in kinds.items():
        each = [of(one) for one in group]
        columns = [[one[at] for one in each if at < len(one)] for at in range(max(map(len, each)))]
        lines[kind] = list(range(1, len(columns) + 1)), [sum(column) / len(column) for column in columns]
    return lines


def _modules(analysis: Analysis) -> Plan | None:
    kinds = _trained(analysis)
    based = any(one.against_base for one in analysis.modules)
    rows, layers = list(kinds), _layer_numbers(kinds)
    if not rows or len(layers) < 2:
        return None
    what = "‖dW‖_F / ‖W‖_F" if based else "‖dW‖_F"
    alike = {one.path for one in analysis.alike()}
    shown = _table(kinds, layers, lambda one: one.moved if one.path in alike else None)
    moved = Panel(f"How far each matrix moved: {what}", shown, "layer", "", layers, rows)
    used = Panel("Effective rank", _table(kinds, layers, _effective), "layer", "", layers, rows)
    text = (
        f"Above {what} of each matrix, below its effective rank exp(−Σ p ln p) with p = s_i / Σ s (Roy, Vetterli 2007), from 1 "
        "to r. Bright cells above are where training put the change, which is the paper's question of section 7.1; bright ones "
        "below need their rank."
    )
    title = "Which matrices moved, and how many directions each needs"
    return "modules", title, text, lambda: heat_maps([[moved], [used]], scale="", top=None, wide=True)


def _effective(one: ModuleSpectrum) -> float:
    return one.effective_rank


def _layer_numbers(kinds: dict[str, list[ModuleSpectrum]]) -> list[str]:
    numbers = {one.layer for group in kinds.values() for one in group if one.layer is not None}
    return [str(number) for number in sorted(numbers)]


def _table(
    kinds: dict[str, list[ModuleSpectrum]], layers: Sequence[str], of: Callable[[ModuleSpectrum], float | None]
) -> list[list[float]]:
    """A row a type, a column a layer; the mean where a layer has several, NaN where none."""
    table = []
    for group in kinds.values():
        row = []
        for layer in layers:
            found = [of(one) for one in group if str(one.layer) == layer]
            known = [value for value in found if value is not None]
            row.append(sum(known) / len(known) if known else math.nan)
        table.append(row)
    return table


def _layers(analysis: Analysis) -> Plan | None:
    grids = analysis.grids_of("layers")[:KINDS]
    if not grids:
        return None
    panels = [_layer_panel(grid, grid.kind, grid.phi) for grid in grids]
    narrow = _narrowest(grids)
    panels.append(_layer_panel(narrow, "random", narrow.control))
    top = max(value for panel in panels for row in panel.values for value in row if math.isfinite(value))
    text = (
        "φ(k, k) between the updates of every two layers, k the smallest of their ranks but at most 8, without the diagonal, "
        "where it is 1. Bright where two layers read the same directions of their input; the last panel is what Gaussian "
        f"matrices give. {PHI}."
    )
    title = "Do the layers share their directions?"
    return "layers", title, text, lambda: heat_maps(_wrap(panels), scale="φ(k, k)", top=max(0.05, top))


def _layer_panel(grid: Grid, title: str, values: Tensor) -> Panel:
    names = [str(layer) for layer in grid.layers]
    return Panel(title, values.clone().fill_diagonal_(math.nan).tolist(), "layer", "layer", names, names)


def _narrowest(grids: Sequence[Grid]) -> Grid:
    """The grid whose control is the highest: that of the narrowest matrices."""
    return max(grids, key=lambda grid: float(grid.control.mean()))


def _wrap(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Rows of at most four panels."""
    across = len(panels) if len(panels) <= 4 else 3 if len(panels) in (5, 6) else 4
    return [list(panels[start : start + across]) for start in range(0, len(panels), across)]


def _figure(analysis: Analysis) -> str:
    """Which pair of the paper's figures two adapters make."""
    others = {one.path: one.rank for one in analysis.other_modules}
    alike = all(others.get(one.path, one.rank) == one.rank for one in analysis.modules)
    return "seeds" if alike else "ranks"


def _adapters(analysis: Analysis) -> Plan | None:
    grids = analysis.grids_of("mean")[:KINDS]
    if not grids:
        return None
    panels = [_pair_panel(grid, grid.kind, grid.phi) for grid in grids]
    narrow = _narrowest(grids)
    panels.append(_pair_panel(narrow, "random", narrow.control))
    figure, told = ("3", "ranks") if _figure(analysis) == "ranks" else ("4", "seeds")
    text = (
        f"As the paper's Figure {figure} (two {told}), the mean over the layers: the cell (i, j) is the share of the first i "
        "directions of the one adapter that lies in the first j of the other, in the last panel for Gaussian matrices. Bright at "
        f"the top left and dark elsewhere: both found the same few directions, and the rest is noise. {PHI}."
    )
    return (
        "adapters",
        "Do the two adapters find the same directions?",
        text,
        lambda: heat_maps(_wrap(panels), scale="φ", top=1.0),
    )


def _pair_panel(grid: Grid, title: str, values: Tensor) -> Panel:
    return Panel(title, values.tolist(), "j, second adapter", "i, first adapter")


def _adapters_by_layer(analysis: Analysis) -> Plan | None:
    kinds: dict[str, list[Grid]] = {}
    for grid in analysis.grids_of("adapters"):
        kinds.setdefault(grid.kind, []).append(grid)
    rows = [
        [_pair_panel(grid, f"{kind}, layer {grid.layer}", grid.phi) for grid in group]
        for kind, group in kinds.items()
        if len(group) > 1
    ]
    if not rows:
        return None
    figure = "6" if _figure(analysis) == "ranks" else "7"
    text = (
        f"As the paper's Figure {figure}: the picture above for some layers alone, from the first to the last. Where they look "
        f"unlike, the mean is true of some layers only. {PHI}."
    )
    return "adapters-by-layer", "The same, layer by layer", text, lambda: heat_maps(rows, scale="φ", top=1.0)


def _weight(analysis: Analysis) -> Plan | None:
    grids = analysis.grids_of("weight")
    if not grids:
        return None
    panels = [
        panel
        for grid in grids
        for panel in (
            Panel(f"{grid.kind}, layer {grid.layer}", grid.phi.tolist(), "j, of W", "i, of dW"),
            Panel("random", grid.control.tolist(), "j, of W", "i, random"),
        )
    ]
    across = 4 if len(grids) > 2 else 2
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    top = max(0.2, *(float(grid.phi.max()) for grid in grids))
    text = (
        "As the paper's Figure 8, for the middle layer: the share of the update's first i directions that lies in the j "
        "strongest directions of the weight W, beside the same for random ones. Dark on the left: the update does not repeat "
        f"what W does most; brighter than random further right: it takes up what W has but does not stress. {PHI}."
    )
    return "weight", "Does the update follow the weight?", text, lambda: heat_maps(rows, scale="φ", top=top, wide=True)


def _amplification(analysis: Analysis) -> Plan | None:
    kinds = {kind: [one for one in group if one.against_base] for kind, group in _trained(analysis).items()}
    kinds = {kind: group for kind, group in kinds.items() if group and len(_layer_numbers({kind: group})) > 1}
    if not kinds:
        return None
    layers = _layer_numbers(kinds)
    xs = [float(layer) for layer in layers]
    factor, random = (
        Chart(
            title,
            "layer",
            "",
            {kind: (xs, row) for kind, row in zip(kinds, _table(kinds, layers, of), strict=True)},
            log=True,
        )
        for title, of in (
            ("‖dW‖ / ‖Uᵀ W V‖, U and V of dW", _factor),
            ("‖dW‖ / ‖Uᵀ W V‖, U and V random", _random_factor),
        )
    )
    text = (
        "The amplification factor of section 7.3 (Table 7), ‖dW‖_F / ‖Uᵀ W V‖_F with U, V the singular vectors of dW: how many "
        "times stronger the update is in its own directions than W is there (21.5 in the paper at r = 4, about 2 at r = 64). On "
        "the right U and V are random: a line below its random one says that the directions are W's own, more than by chance."
    )
    return "amplification", "How much does the update amplify?", text, lambda: charts([factor, random])


def _factor(one: ModuleSpectrum) -> float | None:
    return one.against_base.factor if one.against_base else None


def _random_factor(one: ModuleSpectrum) -> float | None:
    return one.against_base.random_factor if one.against_base else None
