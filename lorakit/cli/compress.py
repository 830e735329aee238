"""lorakit compress"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from lorakit.analyze.compress import CompressReport, compress
from lorakit.cli.analyze import beside
from lorakit.cli.show import bar, megabytes, print_json, print_table
from lorakit.data import DataConfig
from lorakit.generate import GenerateConfig
from lorakit.run.measure import evaluate_subject, recipe_of_run
from lorakit.run.subject import adapter_folder, open_subject


def run(
    adapter: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")],
    energy: Annotated[float | None, typer.Option(help="The share of each layer's energy to keep: 0.99")] = None,
    rank: Annotated[int | None, typer.Option(help="One rank for all layers.")] = None,
    bytes: Annotated[int | None, typer.Option(help="The size of the file, shared out over the layers.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: ADAPTER-compressed.")] = None,
    data: Annotated[str | None, typer.Option(help="Measure before and after on this data.")] = None,
    model: Annotated[str | None, typer.Option(help="With --data, the base; default: what the adapter names.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --data, on so many rows.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Example: lorakit compress runs/sql --energy 0.99"""
    if data is None and (model is not None or limit is not None):
        raise typer.BadParameter("--model and --limit go with --data")
    folder = adapter_folder(adapter)
    target = out or beside(adapter, folder, "compressed")
    report = compress(folder, target, energy=energy, rank=rank, bytes=bytes, overwrite=overwrite)
    measured = {} if data is None else _measured(adapter, target, data, model, limit)
    if as_json:
        print_json({**asdict(report), "metrics": measured})
    else:
        _show(report, measured)


def _measured(
    adapter: str, target: Path, data: str, model: str | None, limit: int | None
) -> dict[str, tuple[float, float]]:
    """metric -> (of the adapter, of the compressed one) on a data set, read and answered as the run says."""
    recipe = recipe_of_run(adapter)
    settings = replace(recipe.data if recipe else DataConfig(), eval_limit=limit)
    found = []
    for source in (adapter, target):
        subject = open_subject(source, model=model)
        with bar("measuring before" if source == adapter else "measuring after") as update:
            result = evaluate_subject(
                subject,
                data,
                data=settings,
                metrics=recipe.evaluate.metrics if recipe else None,
                seed=recipe.train.seed if recipe else 0,
                config=recipe.generate if recipe else GenerateConfig(),
                progress=update,
            )
        found.append(result.metrics)
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def _show(report: CompressReport, measured: dict[str, tuple[float, float]]) -> None:
    rows = [(one.path, one.rank, one.kept, one.energy, one.error) for one in report.layers]
    print_table(["module", "rank", "kept", "energy kept", "relative error"], rows)
    if measured:
        changes = [(name, before, after, after - before) for name, (before, after) in measured.items()]
        print_table(["metric", "before", "after", "change"], changes)
    share = report.bytes_after / report.bytes_before
    typer.echo(
        f"size     {megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)} ({share:.0%}), "
        f"{report.parameters_before:,} -> {report.parameters_after:,} parameters\n"
        f"loss     {report.verdict}: ‖dW' − dW‖ / ‖dW‖ = {report.error:.2g} over all layers, "
        f"{max(one.error for one in report.layers):.2g} in the worst\n"
        f"written  {report.target}"
    )
