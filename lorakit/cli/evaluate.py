"""lorakit evaluate"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import bar, print_json, print_table
from lorakit.errors import UsageError
from lorakit.run.measure import data_of_run, evaluate_subject, write_predictions
from lorakit.run.subject import open_subject


def run(
    source: Annotated[str | None, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; without a source it is measured alone.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What to measure on; default: the run's own test or eval set.")
    ] = None,
    format: Annotated[str, typer.Option(help="The data's format.")] = "auto",
    task: Annotated[str | None, typer.Option(help="causal-lm, seq2seq or sequence-classification.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated: bleu,rougeL")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure on so many rows.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every prediction to this JSONL file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Example: lorakit evaluate runs/sql --data test.jsonl --metrics exact_match"""
    settings, decoding = data_of_run(Path(source) if source else Path())
    where = data or settings.test or settings.eval
    if where is None:
        raise UsageError("no data to measure on: name it with --data.")
    subject = open_subject(source, model=model, task=task)
    with bar("measuring") as update:
        result = evaluate_subject(
            subject,
            where,
            format=format if data else settings.format,
            metrics=metrics.split(",") if metrics else None,
            limit=limit,
            config=decoding,
            progress=update,
        )
    if predictions is not None:
        write_predictions(predictions, result.rows)
    if as_json:
        print_json({"data": where, "rows": len(result.rows), "metrics": result.metrics})
    else:
        print_table(["metric", "value"], list(result.metrics.items()), title=f"{where}, {len(result.rows)} rows")
