"""lorakit sweep"""

from typing import Annotated

import typer

from lorakit.cli.show import Terminal, print_json, print_table
from lorakit.errors import UsageError
from lorakit.sweep.api import AT_ONCE, sweep
from lorakit.sweep.members import parse_vary
from lorakit.sweep.result import CSV


def run(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file: what all members share.")],
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", help="A key and its values: --vary method.r=1,2,4,8 (again for another)"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, each a member: 0,1")] = None,
    out: Annotated[str | None, typer.Option(help="The sweep's folder; default: the recipe's output.")] = None,
    at_once: Annotated[int, typer.Option(help="The most adapters in one pass: bounds its memory.")] = AT_ONCE,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.epochs=1")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other runs in the members' folders.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit sweep recipe.yaml --vary method.r=1,2,4,8 --vary train.lr=1e-4,3e-4 --seeds 0,1 --out runs/ranks"""
    with Terminal() as terminal:
        found = sweep(
            recipe,
            vary=parse_vary(vary or ()),
            seeds=None if seeds is None else seeds_of(seeds),
            output=out,
            overrides=set_ or (),
            at_once=at_once,
            overwrite=overwrite,
            listener=terminal,
        )
    if as_json:
        print_json(found.as_dict())
        return
    print_table(found.columns(), found.rows())
    typer.echo(f"table   {found.folder / CSV}")


def seeds_of(text: str) -> list[int]:
    """[0, 1] from "0,1"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds: expected whole numbers such as 0,1, got {text!r}.") from error
