"""lorakit plan"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

import lorakit
from lorakit.attach.method import Method
from lorakit.cli import uncollected
from lorakit.cli.show import plural, print_json, print_table
from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA
from lorakit.plan import FULL, OPTIMIZERS, Plan, plan


def run(
    model: Annotated[str, typer.Argument(help="A shape's name (gpt3-175b), a folder with config.json, or a hub id.")],
    method: Annotated[
        str | None, typer.Option(help="Comma-separated: full, lora, ...; default: LoRA at several ranks and places.")
    ] = None,
    r: Annotated[str | None, typer.Option("--r", help="LoRA's rank, or several: 4,8.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="What LoRA adapts: q,v or q,k,v,o or all-linear or module names; once for each row."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA's dropout.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a forward pass.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="Of the adapter; default: as the weights.")] = None,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = "adamw",
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    task: Annotated[str | None, typer.Option(help="causal-lm, sequence-classification, seq2seq, ...")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
) -> None:
    """Example: lorakit plan gpt3-175b --r 4 --targets q,v"""
    settings = {key: value for key, value in (("alpha", alpha), ("dropout", dropout)) if value is not None}
    with uncollected():
        found = plan(
            model,
            _methods(method, r, targets or [], settings),
            batch=batch,
            length=length,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            optimizer=optimizer,
            checkpointing=checkpointing,
            task=task,
            device=device,
        )
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)


def _methods(
    asked: str | None, ranks: str | None, targets: Sequence[str], settings: dict[str, Any]
) -> list[Method | str] | None:
    """The rows that the options ask for: every rank at every place."""
    shaped = bool(ranks or targets or settings)
    if asked is None and not shaped:
        return None
    names = asked.split(",") if asked else ["lora"]
    if shaped and "lora" not in names:
        raise UsageError(f"--r, --targets, --alpha and --dropout are LoRA's, and --method is {asked}.")
    found: list[Method | str] = []
    for name in names:
        if name == "lora":
            for places in targets or [""]:
                for rank in (ranks or "").split(","):
                    found.append(LoRA(**_number("--r", rank), **_places(places), **settings))
        else:
            found.append(FULL if name == FULL else _other(name))
    return found


def _number(option: str, text: str) -> dict[str, Any]:
    if not text:
        return {}
    if not text.strip().isdecimal():
        raise UsageError(f"{option} expects whole numbers separated by commas, not {text!r}.")
    return {"r": int(text)}


def _places(text: str) -> dict[str, Any]:
    if not text:
        return {}
    names = [name.strip() for name in text.split(",") if name.strip()]
    return {"target_modules": text if names == ["all-linear"] else names}


def _other(name: str) -> Method:
    """A method other than LoRA, with its defaults, by the name that a recipe gives it."""
    public = [getattr(lorakit, word) for word in lorakit.__all__ if word[0].isupper()]
    methods = {
        one.name: one for one in public if isinstance(one, type) and issubclass(one, Method) and one is not Method
    }
    if name not in methods:
        raise UsageError(f"method {name!r} is unknown; expected {FULL}, {', '.join(sorted(methods))}.")
    made: Method = methods[name]()
    return made


def _show(found: Plan) -> None:
    step = f"a step of {plural(found.batch, 'row')} x {found.length:,} tokens, {found.dtype}, {found.optimizer}"
    step += ", gradient checkpointing" if found.checkpointing else ""
    columns = ["method", "trained", "of", "one for", "file", "100 models", "FLOPs over full's"]
    rows = [
        (
            row.method,
            row.trainable,
            row.total,
            f"{row.ratio:,.0f}",
            size(row.checkpoint_bytes),
            size(row.hundred_bytes),
            row.flops_ratio,
        )
        for row in found.rows
    ]
    print_table(columns, rows, title=f"{found.model}: {found.parameters:,} parameters, {found.task}")
    columns = ["method", "weights", "gradients", "optimizer", "activations", "peak", "fits on"]
    held = [
        (
            row.method,
            *(size(getattr(row.memory, key)) for key in ("weights", "gradients", "optimizer", "activations", "peak")),
            str(row.fits),
        )
        for row in found.rows
        if row.memory is not None
    ]
    if held:
        print_table(columns, held, title=f"memory of {step}")
    if found.paper:
        figures = [(one.what, _figure(one.what, one.printed), _figure(one.what, one.planned)) for one in found.paper]
        print_table(["the LoRA paper's figures", "printed", "planned"], figures)
        typer.echo("planned training memory there: weights and optimizer state; activations come on top")
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)


def _figure(what: str, value: float) -> str:
    return size(value) if what.endswith("bytes") else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in the largest unit of a thousand that leaves a number above 1."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.3g} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 1e3:,.1f} kB"
