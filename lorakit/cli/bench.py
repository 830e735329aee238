"""lorakit bench"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.bench.config import ROWS, BenchConfig
from lorakit.bench.latency import PAPER, Latency, LatencyBench, Setting, bench_latency
from lorakit.bench.measure import RowResult, SideResult, Spread
from lorakit.bench.shapes import SHAPES
from lorakit.bench.train import BenchReport, bench_train
from lorakit.cli.show import Terminal, plural, print_json, print_table
from lorakit.errors import UsageError
from lorakit.run.folder import finite
from lorakit.store.files import write_json

DEFAULT = BenchConfig()
INFERENCE = LatencyBench()


def train(
    model: Annotated[
        str,
        typer.Option(help=f"A packaged name, folder, hub id, or a shape: {', '.join(SHAPES)}."),
    ] = DEFAULT.model,
    rows: Annotated[str | None, typer.Option(help=f"Which rows, by comma: {', '.join(ROWS)}.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm or sequence-classification.")] = None,
    batch: Annotated[int, typer.Option(help="Examples in an optimizer step.")] = DEFAULT.batch,
    batch_tokens: Annotated[int | None, typer.Option(help="Most tokens of a batch in the row free.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a drawn example.")] = DEFAULT.length,
    rounds: Annotated[int, typer.Option(help="Measured turns of each side.")] = DEFAULT.rounds,
    masked: Annotated[float, typer.Option(help="Part of the tokens without loss in masked rows.")] = DEFAULT.masked,
    data: Annotated[str | None, typer.Option(help="A data set, for the rows of real lengths.")] = None,
    format_: Annotated[str, typer.Option("--format", help="Its format, as data.format of a recipe.")] = DEFAULT.format,
    limit: Annotated[int | None, typer.Option(help="Use only so many of its examples.")] = DEFAULT.limit,
    layers: Annotated[str | None, typer.Option(help="Adapt only these in every row: upper-third, or 8,9,10.")] = None,
    r: Annotated[int, typer.Option(help="Rank of the adapters.")] = DEFAULT.r,
    dropout: Annotated[float, typer.Option(help="Of the row dropout.")] = DEFAULT.dropout,
    lr: Annotated[float, typer.Option(help="Learning rate; full fine-tuning takes a tenth.")] = DEFAULT.lr,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = DEFAULT.dtype,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the machine's accelerator by itself.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, examples and orders.")] = DEFAULT.seed,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = DEFAULT.memory,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of lorakit's recipe: train.lr=1e-4")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Example: lorakit bench train --model smollm2-135m --rows equal,masked"""
    config = BenchConfig(
        model=model, rows=None if rows is None else _names(rows), task=task, batch=batch, batch_tokens=batch_tokens,
        length=length, rounds=rounds, masked=masked, data=data, format=format_, limit=limit, layers=layers, r=r,
        dropout=dropout, lr=lr, dtype=dtype, device=device, seed=seed, memory=memory, overrides=tuple(set_ or ()),
    )  # fmt: skip
    with Terminal() as terminal:
        report = bench_train(config, terminal)
    if out is not None:
        write_json(out, finite(report.to_json()))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


SETTINGS = ",".join(INFERENCE.settings)


def latency(
    model: Annotated[str, typer.Option(help="A shape with random weights, or a decoder's name.")] = INFERENCE.model,
    settings: Annotated[
        str, typer.Option(help="BATCHxLENGTH@PARAMETERS by comma; +N decodes N tokens one by one.")
    ] = SETTINGS,
    paper: Annotated[bool, typer.Option("--paper", help=f"The paper's own settings: {', '.join(PAPER)}.")] = False,
    trials: Annotated[int, typer.Option(help="Measured turns of each side.")] = INFERENCE.trials,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = INFERENCE.dtype,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the machine's accelerator by itself.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, inputs and orders.")] = INFERENCE.seed,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Example: lorakit bench latency --trials 30 --out latency.json"""
    if paper and settings != SETTINGS:
        raise UsageError("--paper names the settings: leave --settings out.")
    chosen = PAPER if paper else _names(settings)
    config = LatencyBench(model=model, settings=chosen, trials=trials, dtype=dtype, device=device, seed=seed)
    with Terminal() as terminal:
        report = bench_latency(config, terminal)
    if out is not None:
        write_json(out, finite(report.to_json()))
    if as_json:
        print_json(report.to_json())
        return
    typer.echo(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    typer.echo(f"{config.model}, {plural(report.parameters, 'parameter')}, {plural(trials, 'trial')}, in turns")
    columns = ["batch x length", "side", "r", "trained", "ms", "±", "over full", "±", "median over full"]
    print_table(columns, [_timed(one.setting, side) for one in report.results for side in one.sides])


def _timed(setting: Setting, side: Latency) -> list[Any]:
    ratios = [f"{value:.3f}" for value in (side.ratio_mean, side.ratio_spread, side.ratio_median)]
    return [str(setting), side.side, side.r, side.trained, side.mean * 1e3, side.spread * 1e3, *ratios]


COMMANDS = {
    "train": ("Measure training: lorakit, PEFT, full fine-tuning and the frozen base's floor in turns.", train),
    "latency": ("Measure inference: full fine-tuning, LoRA merged and unmerged, and adapters in turns.", latency),
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _print(report: BenchReport) -> None:
    typer.echo(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    typer.echo(f"{report.config.model}, {report.task}, {plural(report.parameters, 'parameter')}")
    columns = [
        "row", "side", "ms a step", "tokens/s", "time over lorakit's", "peak MiB over model", "loss", "final loss",
        "gradient norm", "least of a tensor",
    ]  # fmt: skip
    print_table(columns, [_cells(row, side) for row in report.rows for side in row.sides])
    for row in report.rows:
        typer.echo(
            f"{row.name}: {row.about}; {plural(row.rounds, 'round')}, {row.padding:.2f} positions a token (PEFT)"
        )


def _cells(row: RowResult, side: SideResult) -> list[Any]:
    return [
        row.name,
        side.name,
        side.step_seconds * 1e3,
        round(side.tokens_per_second),
        _spread(side.over),
        None if side.peak_memory is None else round(side.peak_memory / 2**20),
        side.loss,
        side.final_loss,
        side.gradients.total,
        side.gradients.smallest,
    ]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.least:.2f}..{spread.most:.2f})"
