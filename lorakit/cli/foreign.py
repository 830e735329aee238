"""The options with which a command reads another program's adapter file."""

from pathlib import Path
from typing import Annotated

import typer

Alpha = Annotated[float | None, typer.Option(help="For files that hold none (loralib).")]
EnableLora = Annotated[str | None, typer.Option(help="Adapted parts of loralib's fused layers: 1,0,1 for q and v.")]
Base = Annotated[Path | None, typer.Option(help="The model's folder, where names or heads must be known.")]


def parts_of(text: str | None) -> list[bool] | None:
    """1,0,1 as booleans."""
    if text is None:
        return None
    parts = [one.strip() for one in text.split(",")]
    if not all(one in ("0", "1") for one in parts):
        raise typer.BadParameter(f"{text!r}: expected 1 or 0 for each part, as in 1,0,1", param_hint="--enable-lora")
    return [one == "1" for one in parts]
