"""lorakit train"""

import shlex
from typing import Annotated

import typer

from lorakit.cli.show import Terminal, cell, console, megabytes, print_json
from lorakit.run.train import RunResult, train


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
        chosen = "".join(f" --set {shlex.quote(one)}" for one in set_ or ())
        console().print(f"Go on with: lorakit train {shlex.quote(recipe)}{chosen} --resume", soft_wrap=True)
        raise typer.Exit(1)
    if not as_json:
        typer.echo("\n".join(_lines(result)))


def _lines(result: RunResult) -> list[str]:
    summary = result.summary
    facts = {
        "adapter": f"{result.folder / 'adapter'} ({megabytes(summary['adapter_bytes'])})",
        "report": str(result.folder / "report.html"),
    }
    for name, value in summary["after"].items():
        before = summary["before"].get(name)
        facts[name] = cell(value) + (f" (base: {cell(before)})" if before is not None else "")
    width = max(map(len, facts))
    return [f"{name:{width}}  {text}" for name, text in facts.items()]
