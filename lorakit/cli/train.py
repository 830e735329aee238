"""lorakit train"""

from typing import Annotated

import typer

from lorakit.cli.show import Terminal, cell, console, megabytes, print_json
from lorakit.run.train import train


def run(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.lr=1e-4")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Example: lorakit train recipe.yaml --set train.lr=1e-4"""
    with Terminal() as terminal:
        result = train(recipe, overrides=set_ or (), resume=resume, overwrite=overwrite, listener=terminal)
    if as_json:
        print_json({"folder": str(result.folder), "interrupted": result.interrupted, **result.summary})
    if result.interrupted:
        chosen = "".join(f" --set {one}" for one in set_ or ())
        console().print(f"Go on with: lorakit train {recipe}{chosen} --resume")
        raise typer.Exit(1)
    if not as_json:
        summary = result.summary
        lines = [
            f"adapter  {result.folder / 'adapter'} ({megabytes(summary['adapter_bytes'])})",
            f"report   {result.folder / 'report.html'}",
            *(f"{name:8} {cell(value)}" for name, value in summary["after"].items()),
        ]
        typer.echo("\n".join(lines))
