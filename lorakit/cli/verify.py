"""lorakit verify"""

from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.show import print_json
from lorakit.models import load
from lorakit.run.subject import adapter_folder
from lorakit.store.verify import verify


def run(
    adapter: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")],
    model: Annotated[str | None, typer.Option(help="Also check that it fits this base.")] = None,
    task: Annotated[str, typer.Option(help="The base's task.")] = "causal-lm",
    as_json: Annotated[bool, typer.Option("--json", help="Print the faults as JSON.")] = False,
) -> None:
    """Example: lorakit verify runs/sql/adapter --model smollm2-135m-instruct"""
    base = None if model is None else load(model, task=task, progress=True).model
    found = verify(adapter_folder(adapter), base)
    if as_json:
        print_json({**asdict(found), "ok": found.ok})
    elif found.ok:
        typer.echo(f"{found.source}: sound")
    else:
        typer.echo(f"{found.source}:\n" + "\n".join(f"  - {fault}" for fault in found.faults))
    if not found.ok:
        raise typer.Exit(1)
