"""lorakit inspect DATA --model M: what training would see of a data set."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich.console import Console
from rich.text import Text

from lorakit.cli.show import bar, print_json, print_table
from lorakit.run.look import Look, Shown, Stretch, look


def inspect_data(
    source: str, model: str, *, task: str | None, format: str, max_length: int | None, show: int, as_json: bool
) -> None:
    """Print the data's figures, then `show` examples."""
    with bar("encoding") as progress:
        found = look(source, model, task=task, format=format, max_length=max_length, show=show, progress=progress)
    if as_json:
        print_json(asdict(found))
        return
    print_table(["", found.source], _facts(found))
    for example in found.examples:
        typer.echo(_title(example))
        _print(example.stretches)


def _facts(found: Look) -> list[tuple[str, object]]:
    least, median, most_of, most = found.lengths
    facts: list[tuple[str, object]] = [
        ("format", found.format),
        ("task", found.task),
        ("rows", found.rows),
        ("tokens", found.tokens),
    ]
    if found.loss_tokens is not None:
        facts.append(("with loss", f"{found.loss_tokens:,} ({found.loss_share:.1%})"))
    facts.append(("tokens of a row", f"{least:,} to {most:,}, median {median:g}, 95% up to {most_of:,}"))
    if found.limit is not None:
        facts.append((f"longer than {found.limit:,}", found.over))
    if found.labels:
        facts.append(("labels", ", ".join(found.labels)))
    return facts


def _title(example: Shown) -> str:
    parts = [f"line {example.line}: {example.tokens:,} tokens"]
    if example.label is None:
        parts.append(f"{example.loss_tokens:,} with loss")
    else:
        parts.append(f"label {example.label}")
    if example.cut:
        parts.append(f"{example.cut:,} cut")
    return "\n" + ", ".join(parts)


def _print(stretches: Sequence[Stretch]) -> None:
    """Tokens with loss in green, the others dim; on a pipe, which has no colours, in double brackets."""
    out = Console(highlight=False, markup=False, soft_wrap=True)
    if sys.stdout.isatty() and not out.no_color:
        out.print(Text.assemble(*((one.text, "bold green" if one.loss else "dim") for one in stretches)))
    else:
        typer.echo("".join(f"[[{one.text}]]" if one.loss else one.text for one in stretches))
