"""lorakit convert"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import plural, print_json
from lorakit.store.convert import convert


def run(
    source: Annotated[str, typer.Argument(help="An adapter's folder, file or hub id, of any known kind.")],
    target: Annotated[Path, typer.Argument(help="The folder (peft, vllm) or file to write.")],
    to: Annotated[str, typer.Option(help="peft, loralib, diffusers, kohya, vllm or gguf.")] = "peft",
    alpha: Annotated[float | None, typer.Option(help="For files that hold none (loralib).")] = None,
    enable_lora: Annotated[
        str | None, typer.Option(help="Adapted parts of loralib's fused layers: 1,0,1 for q and v.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The model's folder, where names or heads must be known.")] = None,
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
        enable_lora=_parts(enable_lora),
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


def _parts(text: str | None) -> list[bool] | None:
    """1,0,1 as booleans."""
    if text is None:
        return None
    parts = [one.strip() for one in text.split(",")]
    if not all(one in ("0", "1") for one in parts):
        raise typer.BadParameter(f"{text!r}: expected 1 or 0 for each part, as in 1,0,1", param_hint="--enable-lora")
    return [one == "1" for one in parts]
