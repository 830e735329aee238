"""What an analysis found, as plain values, and how it is written down."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.analyze.against import Amplification
from lorakit.analyze.compare import Grid, Match
from lorakit.errors import OutputError
from lorakit.store.files import Write, json_bytes, write_together

JSON, PAGE = "analysis.json", "report.html"


@dataclass(frozen=True)
class ModuleSpectrum:
    """One update. values: its singular values, falling; energy: by rank (see lorakit.analyze.spectrum, also for the ranks);
    rank: of the factors; numerical_rank: how many values stand above rounding; norm: ||dW||_F; shape: (out, in)."""

    path: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    scaling: float
    values: tuple[float, ...]
    energy: tuple[float, ...]
    norm: float
    numerical_rank: int
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int
    against_base: Amplification | None = None

    @property
    def moved(self) -> float:
        """How far the matrix moved: ||dW|| / ||W|| where the base is known, else ||dW||."""
        return self.norm if self.against_base is None else self.against_base.moved


@dataclass(frozen=True)
class Analysis:
    """The spectra of an adapter's updates, and its subspaces beside another's, the base's and each other's.

    other, base: as named, None where there was none. matches: modules of both adapters. notes: what is not in the figures.
    """

    source: str
    other: str | None
    base: str | None
    modules: tuple[ModuleSpectrum, ...]
    other_modules: tuple[ModuleSpectrum, ...]
    matches: tuple[Match, ...]
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]

    def alike(self) -> list[ModuleSpectrum]:
        """The modules whose `moved` can be compared: those held against the base, where any is."""
        return [one for one in self.modules if one.against_base is not None] or list(self.modules)

    def most_moved(self) -> list[ModuleSpectrum]:
        """The modules, the one that moved most first."""
        return sorted(self.alike(), key=lambda one: one.moved, reverse=True)

    def kinds(self) -> dict[str, list[ModuleSpectrum]]:
        """The modules by their type of matrix."""
        groups: dict[str, list[ModuleSpectrum]] = defaultdict(list)
        for one in self.modules:
            groups[one.kind].append(one)
        return dict(groups)

    def grids_of(self, what: str) -> list[Grid]:
        """The similarities of one sort (see `Grid`)."""
        return [grid for grid in self.grids if grid.what == what]

    def as_dict(self) -> dict[str, Any]:
        """All of it as texts, numbers, lists and mappings, for JSON."""
        whole = {key: getattr(self, key) for key in ("source", "other", "base", "notes")}
        for key in ("modules", "other_modules", "matches"):
            whole[key] = [asdict(one) for one in getattr(self, key)]
        whole["grids"] = [_grid(grid) for grid in self.grids]
        return whole

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the report (report.html, one file that needs no other), analysis.json and each picture as PNG and SVG.

        Raises OutputError where the folder holds something already, unless `overwrite`, or cannot be written.
        """
        from lorakit.analyze.page import report_of
        from lorakit.analyze.pictures import NAMES, pictures_of
        from lorakit.report.page import render

        target = Path(folder).expanduser()
        if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
            raise OutputError(f"{target} is there already. Choose another place, or say overwrite (--overwrite).")
        drawn = pictures_of(self)
        content = {f"{one.name}.{form}": data for one in drawn for form, data in (("png", one.png), ("svg", one.svg))}
        content |= {JSON: json_bytes(self.as_dict(), JSON), PAGE: render(report_of(self, drawn)).encode()}
        write_together({target / name: _writer(data) for name, data in content.items()})
        for stale in {f"{name}.{form}" for name in NAMES for form in ("png", "svg")} - set(content):
            (target / stale).unlink(
                missing_ok=True
            )  # a picture of what stood there before would be taken for one of this
        return target


def _writer(data: bytes) -> Write:
    return partial(_fill, data=data)


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _grid(grid: Grid) -> Mapping[str, Any]:
    return {
        "what": grid.what,
        "kind": grid.kind,
        "layer": grid.layer,
        "layers": list(grid.layers),
        "phi": rounded(grid.phi),
        "control": rounded(grid.control),
    }


def rounded(grid: Tensor) -> Sequence[Sequence[float]]:
    """Rows of numbers to six places, as a file holds them."""
    return [[round(value, 6) for value in row] for row in grid.tolist()]
