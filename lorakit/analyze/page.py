"""An analysis as a page of lorakit.report: the figures, the tables, the pictures with their explanations."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lorakit.analyze.pictures import Drawn
from lorakit.analyze.result import Analysis, ModuleSpectrum
from lorakit.report import Fact, Picture, Report, Table
from lorakit.report.parts import Cell

SHOWN = 12  # modules in the table of those that moved most; analysis.json has all


def report_of(analysis: Analysis, drawn: Sequence[Drawn]) -> Report:
    """The page of an analysis with its pictures."""
    pictures = [Picture(one.title, one.svg, one.text) for one in drawn]
    return Report(
        title=f"The rank study of {_name(analysis.source)}",
        claim=_claim(analysis),
        facts=_facts(analysis),
        tables=tables_of(analysis),
        pictures=pictures,
        warnings=analysis.notes,
        next_steps=[
            ("Write the smaller adapter", f"lorakit compress {analysis.source} --energy 0.99 --out smaller"),
            *(
                []
                if analysis.base
                else [("Hold it against its base", f"lorakit analyze {analysis.source} --base MODEL")]
            ),
        ],
    )


def _name(source: str) -> str:
    """A run's or an adapter's own name, without the way there."""
    path = Path(source)
    return path.parent.name if path.name == "adapter" and path.parent.name else path.name


def _claim(analysis: Analysis) -> str:
    ranks = sum(one.rank for one in analysis.modules)
    kept = sum(one.rank_99 for one in analysis.modules)
    return f"{kept / ranks:.0%} of the ranks hold 99% of each update's energy."


def _facts(analysis: Analysis) -> list[Fact]:
    modules = analysis.modules
    mean: Callable[[Callable[[ModuleSpectrum], float]], float] = lambda of: sum(map(of, modules)) / len(modules)  # noqa: E731
    facts = [
        Fact("Matrices", f"{len(modules):,}", f"{len(analysis.kinds()):,} types"),
        Fact("Rank", f"{mean(lambda one: one.rank):.3g}", f"above rounding {mean(lambda one: one.numerical_rank):.3g}"),
        Fact("Effective rank", f"{mean(lambda one: one.effective_rank):.3g}", "mean over the matrices"),
        Fact("Stable rank", f"{mean(lambda one: one.stable_rank):.3g}", "mean over the matrices"),
        Fact("Rank for 90% of the energy", f"{mean(lambda one: one.rank_90):.3g}", "mean over the matrices"),
        Fact("Rank for 99% of the energy", f"{mean(lambda one: one.rank_99):.3g}", "mean over the matrices"),
    ]
    if analysis.matches:
        shared = sum(match.whole for match in analysis.matches) / len(analysis.matches)
        random = sum(match.random for match in analysis.matches) / len(analysis.matches)
        first = sum(match.first for match in analysis.matches) / len(analysis.matches)
        facts.append(Fact("Shared first direction", f"{first:.3g}", "φ(1, 1) with the second adapter"))
        facts.append(Fact("Shared subspace", f"{shared:.3g}", f"φ of all directions; random {random:.2g}"))
    return facts


def tables_of(analysis: Analysis) -> list[Table]:
    """A row a type of matrix; the modules that moved most; Table 7 by type, where the base is known."""
    kinds = analysis.kinds()
    rows: list[list[Cell]] = [
        [kind, len(group), *(_mean(group, of) for _, of in COLUMNS)] for kind, group in kinds.items()
    ]
    based = any(one.against_base for one in analysis.modules)
    what = "‖dW‖ / ‖W‖" if based else "‖dW‖"
    moved: list[list[Cell]] = [
        [one.path, one.moved, one.norm, one.effective_rank, one.rank_99] for one in analysis.most_moved()[:SHOWN]
    ]
    by_layer = "The mean over the layers of each type of matrix."
    tables = [
        Table("Types of matrices", ["Type", "Layers", *(name for name, _ in COLUMNS)], rows, by_layer),
        Table("What moved most", ["Module", what, "‖dW‖", "Effective rank", "Rank for 99%"], moved, f"By {what}."),
    ]
    return [*tables, _table_7(kinds)] if based else tables


COLUMNS: tuple[tuple[str, Callable[[ModuleSpectrum], float]], ...] = (
    ("‖dW‖", lambda one: one.norm),
    ("Rank", lambda one: one.numerical_rank),
    ("Effective", lambda one: one.effective_rank),
    ("Stable", lambda one: one.stable_rank),
    ("For 90%", lambda one: one.rank_90),
    ("For 99%", lambda one: one.rank_99),
)


def _mean(group: Sequence[ModuleSpectrum], of: Callable[[ModuleSpectrum], float]) -> float:
    mean = sum(of(one) for one in group) / len(group)
    return int(mean) if float(mean).is_integer() else mean


def _table_7(kinds: dict[str, list[ModuleSpectrum]]) -> Table:
    rows: list[list[Cell]] = []
    for kind, group in kinds.items():
        known = [one.against_base for one in group if one.against_base is not None]
        factors = [one.factor for one in known if one.factor is not None]
        if known and factors:
            count = len(known)
            norm = sum(one.norm for one in group if one.against_base is not None) / count
            rows.append(
                [
                    kind,
                    sum(one.weight for one in known) / count,
                    norm,
                    sum(one.projected for one in known) / count,
                    sum(one.own for one in known) / count,
                    sum(one.random for one in known) / count,
                    sum(factors) / len(factors),
                ]
            )
    columns = ["Type", "‖W‖", "‖dW‖", "‖UᵀWV‖, dW's", "W's", "random", "Amplification"]
    return Table(
        "Amplification", columns, rows, "Table 7: W projected on the r directions of dW, of W itself, and random ones."
    )
