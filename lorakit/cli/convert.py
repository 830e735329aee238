"""lorakit convert"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.foreign import Alpha, Base, EnableLora, parts_of
from lorakit.cli.show import plural, print_json
from lorakit.store.convert import convert


def run(
    source: Annotated[str, typer.Argument(help="An adapter's folder, file or hub id, of any known kind.")],
    target: Annotated[Path, typer.Argument(help="The folder (peft, vllm) or file to write.")],
    to: Annotated[str, typer.Option(help="peft, loralib, diffusers, kohya, vllm or gguf.")] = "peft",
    alpha: Alpha = None,
    enable_lora: EnableLora = None,
    base: Base = None,
    component: Annotated[str | None, typer.Option(help="The part of a pipeline: unet, text_encoder, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Example: lorakit convert pytorch_lora_weights.safetensors my.safetensors --to kohya"""
    report = convert(
        source,
        target,
        to,
        alpha=alpha,
        enable_lora=parts_of(enable_lora),
        base=base,
        component=component,
        overwrite=overwrite,
    )
    if as_json:
        print_json(asdict(report))
        return
    of = f" of {', '.join(report.components)}" if report.components else ""
    typer.echo(
        f"read     {report.source}, {report.kind}: {plural(report.modules, 'module')}{of}, {report.parameters:,} parameters"
    )
    for file in report.files:
        typer.echo(f"written  {file}")
    for note in report.notes:
        typer.echo(f"note     {note}")
