"""lorakit analyze"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.analyze.api import analyze
from lorakit.analyze.page import tables_of
from lorakit.cli.show import bar, print_json, print_table
from lorakit.errors import UsageError
from lorakit.run.subject import adapter_folder


def run(
    adapter: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")],
    other: Annotated[str | None, typer.Argument(help="The same of another rank or seed, to compare with.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for what needs its weights.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: ADAPTER-analysis.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit analyze runs/sql runs/sql-seed1 --base smollm2-135m-instruct"""
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


def beside(named: str, folder: Path, what: str) -> Path:
    """Where a result goes that was given no place: beside the adapter. Raises UsageError where that is the hub's cache."""
    if not Path(named).expanduser().exists():
        raise UsageError(f"{named} is no folder here: say where to write with --out.")
    return folder.resolve().with_name(f"{folder.resolve().name}-{what}")
