"""lorakit inspect"""

from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.foreign import Alpha, Base, EnableLora, parts_of
from lorakit.cli.show import megabytes, print_json, print_table
from lorakit.run.subject import adapter_folder
from lorakit.store.inspect import inspect


def run(
    adapter: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or file, or a hub id.")],
    alpha: Alpha = None,
    enable_lora: EnableLora = None,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit inspect runs/sql"""
    found = inspect(adapter_folder(adapter), alpha=alpha, enable_lora=parts_of(enable_lora), base=base)
    if as_json:
        print_json(asdict(found))
    else:
        facts = [
            ("kind", found.kind),
            ("base", found.base),
            ("identity", found.identity),
            ("parameters", found.parameters),
            ("tensors file", megabytes(found.bytes)),
            (
                "trained in full",
                _short(list(found.replaced)) if len(found.replaced) > 8 else ", ".join(found.replaced) or None,
            ),
            ("settings", ", ".join(f"{key}={_short(value)}" for key, value in found.config.items() if key in SHOWN)),
        ]
        print_table(["", found.source], facts)
        rows = [
            (one.path, one.rank, f"{one.shape[0]} -> {one.shape[1]}", one.scaling, one.dtype, one.norm)
            for one in sorted(found.modules, key=lambda one: _natural(one.path))
        ]
        if rows:
            print_table(["module", "rank", "widths", "scaling", "dtype", "norm of dW"], rows)
    if found.faults:
        typer.echo("faults:\n" + "\n".join(f"  - {fault}" for fault in found.faults), err=True)
        raise typer.Exit(1)


SHOWN = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "bias",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)


def _short(value: object) -> str:
    """A setting in a table's cell: a long list by its length (--json has it whole)."""
    return f"({len(value)} names)" if isinstance(value, list | dict) and len(value) > 8 else str(value)


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
