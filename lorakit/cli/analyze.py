"""lorakit analyze"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.advise.budget import EXAMPLES, STEPS, advise_budget
from lorakit.advise.ranks import ENERGY, advise_ranks
from lorakit.analyze.api import analyze
from lorakit.analyze.page import tables_of
from lorakit.cli.show import Terminal, bar, print_json, print_table
from lorakit.cli.sweep import seeds_of
from lorakit.errors import UsageError
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import adapter_folder
from lorakit.sweep.api import sweep


def run(
    adapter: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")],
    other: Annotated[str | None, typer.Argument(help="The same of another rank or seed, to compare with.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for what needs its weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: ADAPTER-analysis.")] = None,
    advise: Annotated[
        bool,
        typer.Option("--advise", help="Tell the smallest rank of each layer, or (--budget) which matrices to adapt."),
    ] = False,
    energy: Annotated[float, typer.Option(help="With --advise: the share of each update's energy to keep.")] = ENERGY,
    budget: Annotated[
        int | None,
        typer.Option(help="With --advise: so many parameters; ADAPTER is then a recipe, on whose data it is measured."),
    ] = None,
    steps: Annotated[int, typer.Option(help="With --budget: the most steps of each candidate's training.")] = STEPS,
    examples: Annotated[int, typer.Option(help="With --budget: the most training examples.")] = EXAMPLES,
    seeds: Annotated[str, typer.Option(help="With --budget: seeds of each candidate, 0,1")] = "0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit analyze runs/sql runs/sql-seed1 --base smollm2-135m-instruct"""
    if budget is not None and not advise:
        raise UsageError("--budget asks for advice: say --advise too.")
    if advise:
        if other is not None or base is not None:
            raise UsageError("--advise looks at one adapter alone: leave out the second one and --base.")
        if budget is None:
            _ranks(adapter, energy, as_json)
        else:
            how = {"steps": steps, "examples": examples, "seeds": seeds_of(seeds), "overwrite": overwrite}
            _budget(adapter, budget, out, as_json, how)
        return
    folder = adapter_folder(adapter)
    target = out or beside(adapter, folder, "analysis")
    with bar("analysing", quiet=as_json or base is None) as update:
        found = analyze(folder, None if other is None else adapter_folder(other), base=base, progress=update)
    written = found.save(target, overwrite=overwrite)
    if as_json:
        print_json({"folder": str(written), **found.as_dict()})
        return
    for table in tables_of(found):
        print_table(list(table.columns), [list(row) for row in table.rows], title=table.title)
    if found.matches:
        rows = [(one.path, one.rank, one.other_rank, one.first, one.whole, one.random) for one in found.matches]
        columns = ["module", "rank", "other's", "φ of the first", "φ of all", "random"]
        print_table(columns, rows, title="Shared directions")
    for note in found.notes:
        typer.echo(f"note     {note}")
    typer.echo(f"report   {written / 'report.html'}")


def _ranks(adapter: str, energy: float, as_json: bool) -> None:
    """`--advise`: a table, and lines for a recipe."""
    found = advise_ranks(adapter_folder(adapter), energy)
    if as_json:
        print_json(found.as_dict())
        return
    rows = [(one.path, one.rank, one.advised, one.kept, "all of it" if one.full else "") for one in found.layers]
    columns = ["module", "rank", "advised", "energy kept", "used"]
    print_table(columns, rows, title=f"The smallest rank that keeps {energy:.6g} of each update's energy")
    typer.echo(f"parameters  {found.parameters_before:,} -> {found.parameters_after:,}")
    if all(one.full for one in found.layers):
        typer.echo(
            "note        every layer uses all of its rank: a higher one may serve it better. Train one, and ask again."
        )
    typer.echo(f"\n{found.yaml()}", nl=False)


def _budget(recipe: str, budget: int, out: Path | None, as_json: bool, how: dict[str, Any]) -> None:
    """`--advise --budget N RECIPE`: a short sweep, its table, and lines for the recipe."""
    target = out or Path(f"{load_recipe(recipe).output}-budget-{budget}")
    with Terminal() as terminal:
        found = advise_budget(recipe, budget, sweep=sweep, output=target, listener=terminal, **how)
    if as_json:
        print_json(found.as_dict())
        return
    rows = [
        ("+".join(one.candidate.targets), one.candidate.rank, one.candidate.parameters, one.score, one.spread, one.loss)
        for one in found.rows
    ]
    columns = ["matrices", "rank", "parameters", found.score, "spread", "eval loss"]
    print_table(columns, rows, title=f"What {budget:,} parameters do best, the best first")
    for text in (*found.left_out, *(f"{name}: its training broke off" for name in found.failed)):
        typer.echo(f"left out  {text}")
    typer.echo(f"runs      {found.folder}\n\n{found.yaml()}", nl=False)


def beside(named: str, folder: Path, what: str) -> Path:
    """Where a result goes that was given no place: beside the adapter. Raises UsageError where that is the hub's cache."""
    if not Path(named).expanduser().exists():
        raise UsageError(f"{named} is no folder here: say where to write with --out.")
    return folder.resolve().with_name(f"{folder.resolve().name}-{what}")
