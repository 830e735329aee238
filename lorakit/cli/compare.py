"""lorakit compare"""

from typing import Annotated

import typer

from lorakit.cli.show import Terminal, print_json, print_table
from lorakit.compare.api import compare
from lorakit.compare.table import tables_of
from lorakit.errors import LorakitError


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe with a section `compare`.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set compare.seeds=[0]")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make the runs that failed again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit compare recipes/compare-sst2.yaml"""
    try:
        with Terminal() as terminal:
            found = compare(recipe, overrides=set_ or (), retry_failed=retry_failed, listener=terminal)
    except KeyboardInterrupt as error:
        raise LorakitError("interrupted. What is finished is kept: the same command goes on from there.") from error
    if as_json:
        print_json(found.as_dict())
        return
    for table in tables_of(found):
        print_table(list(table.columns), [list(row) for row in table.rows], title=table.title)
    for note in found.notes:
        typer.echo(f"note     {note}")
    typer.echo(f"report   {found.folder / 'report.html'}")
