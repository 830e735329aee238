"""lorakit inspect"""

from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.foreign import Alpha, Base, EnableLora, parts_of
from lorakit.cli.inspect_data import inspect_data
from lorakit.cli.show import megabytes, print_json, print_table
from lorakit.errors import UsageError
from lorakit.run.look import is_data
from lorakit.run.subject import adapter_folder
from lorakit.store.inspect import Inspection, inspect


def run(
    adapter: Annotated[
        str, typer.Argument(help="A run's folder, an adapter's folder or file, or a hub id; or data, with --model.")
    ],
    alpha: Alpha = None,
    enable_lora: EnableLora = None,
    base: Base = None,
    model: Annotated[
        str | None, typer.Option(help="Show data as this model would be trained on it: tokens, loss mask, lengths.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of data: causal-lm, seq2seq or sequence-classification.")] = None,
    format_: Annotated[str, typer.Option("--format", help="Of data, as data.format of a recipe.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Of data: cut rows to so many tokens.")] = None,
    show: Annotated[int, typer.Option(help="Of data: how many examples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit inspect runs/sql"""
    if model is not None:
        if alpha is not None or enable_lora is not None or base is not None:
            raise UsageError(
                "--alpha, --enable-lora and --base are of an adapter's files: leave them out with --model."
            )
        inspect_data(adapter, model, task=task, format=format_, max_length=max_length, show=show, as_json=as_json)
        return
    if is_data(adapter):
        raise UsageError(f"{adapter} is data. Say for which model to show it: --model NAME.")
    if task is not None or format_ != "auto" or max_length is not None or show != 3:
        raise UsageError("--task, --format, --max-length and --show are of data: name a model too (--model).")
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
            ("settings", ", ".join(f"{key}={_short(value)}" for key, value in _settings(found).items())),
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


def _settings(found: Inspection) -> dict[str, object]:
    """The settings that tell one adapter from another: of PEFT's many keys a few, of lorakit's own all."""
    own = found.kind.startswith("lorakit")
    return {
        key: value for key, value in found.config.items() if (own or key in SHOWN) and key not in ("method", "parts")
    }


def _short(value: object) -> str:
    """A setting in a table's cell: a long list by its length (--json has it whole)."""
    return f"({len(value)} names)" if isinstance(value, list | dict) and len(value) > 8 else str(value)


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
