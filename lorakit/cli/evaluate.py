"""lorakit evaluate"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import bar, plural, print_json, print_table
from lorakit.data import DataConfig
from lorakit.errors import UsageError
from lorakit.evaluate import check_metrics
from lorakit.generate import GenerateConfig
from lorakit.run.measure import evaluate_subject, recipe_of_run, write_predictions
from lorakit.run.subject import adapter_folder, open_subject


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
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The most tokens of an answer; default: the run's.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every prediction to this JSONL file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Example: lorakit evaluate runs/sql --data test.jsonl --metrics exact_match"""
    recipe = recipe_of_run(source) if source else None
    settings = recipe.data if recipe else DataConfig()
    where = data or settings.test or settings.eval
    if where is None:
        if source and not adapter_folder(source).is_dir():
            raise UsageError(f"there is no run or adapter at {source}.")
        raise UsageError("no data to measure on: name it with --data.")
    if data:  # the run's limit is of its own sets
        settings = replace(settings, format=format, eval_limit=limit)
    elif limit is not None:
        settings = replace(settings, eval_limit=limit)
    chosen = tuple(metrics.split(",")) if metrics else recipe.evaluate.metrics if recipe else None
    if chosen is not None:
        check_metrics(chosen)
    decoding = recipe.generate if recipe else GenerateConfig()
    if max_new_tokens is not None:
        decoding = replace(decoding, max_new_tokens=max_new_tokens)
    subject = open_subject(source, model=model, task=task)
    with bar("measuring") as update:
        result = evaluate_subject(
            subject,
            where,
            data=settings,
            metrics=chosen,
            seed=recipe.train.seed if recipe else 0,
            config=decoding,
            progress=update,
        )
    if predictions is not None:
        write_predictions(predictions, result.rows)
    if as_json:
        print_json({"data": where, "rows": len(result.rows), "metrics": result.metrics})
    else:
        print_table(
            ["metric", "value"], list(result.metrics.items()), title=f"{where}, {plural(len(result.rows), 'row')}"
        )
