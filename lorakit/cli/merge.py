"""lorakit merge"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import megabytes, print_json
from lorakit.run.export import export_merged
from lorakit.run.subject import open_subject


def run(
    source: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: Annotated[str | None, typer.Option(help="The base model; default: what the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Example: lorakit merge runs/sql --out sql-merged"""
    result = export_merged(open_subject(source, model=model, dtype=dtype, dense=True), out, overwrite=overwrite)
    if as_json:
        print_json(
            {"folder": result.folder, "max_logit_difference": result.max_logit_difference, "bytes": result.bytes}
        )
    else:
        typer.echo(
            f"merged   {result.folder} ({megabytes(result.bytes)}), a plain transformers folder\n"
            f"logits   changed by at most {result.max_logit_difference:.2g} on a probe, merged against unmerged"
        )
