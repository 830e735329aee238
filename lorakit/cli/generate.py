"""lorakit generate"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.show import bar, print_json
from lorakit.errors import UsageError
from lorakit.generate import GenerateConfig
from lorakit.run.measure import answer, recipe_of_run, write_predictions
from lorakit.run.subject import open_subject


def run(
    source: Annotated[str | None, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; without a source it answers alone.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts (text, JSONL, CSV ...).")] = None,
    format: Annotated[str, typer.Option(help="The file's format.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the answers to this JSONL file.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens to write.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of a beam search; 1 is none.")] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --sample; 0 = all.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="With beams; above 0 favours longer texts.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="Write no run of so many tokens twice.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be given several times.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts answered at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --sample.")] = None,
    limit: Annotated[int | None, typer.Option(help="Answer so many prompts of the file.")] = None,
    adapter_column: Annotated[
        str | None, typer.Option(help="The file's column that names each row's adapter; with --adapters.")
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="The folder of adapters (a server's registry).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompts and answers as JSON.")] = False,
) -> None:
    """How to decode is what the run's recipe says, else greedy; options here come first.

    Example: lorakit generate runs/sql --prompt 'How many albums are there?'
    """
    if bool(prompt) == bool(prompts):
        raise UsageError("name either --prompt (one or several) or --prompts FILE.")
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": sample,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "length_penalty": length_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "batch_size": batch_size,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    recipe = recipe_of_run(source) if source else None
    base = recipe.generate if recipe else GenerateConfig()
    config = replace(base, **{name: value for name, value in given.items() if value is not None})
    rows: list[dict[str, Any]]
    if adapter_column is not None or adapters is not None:
        if adapter_column is None or adapters is None or prompts is None or model is None or source is not None:
            raise UsageError("rows that name their adapters take --adapter-column, --adapters, --prompts and --model.")
        if batch_size is not None:
            raise UsageError("--batch-size does not go with --adapter-column: requests share batches as they come.")
        rows = _by_column(model, adapters, prompts, adapter_column, config, format, limit)
    else:
        subject = open_subject(source, model=model)
        with bar("answering") as update:
            rows = list(answer(subject, prompt or prompts or [], config, format=format, limit=limit, progress=update))
    if out is not None:
        write_predictions(out, rows)
    if as_json:
        print_json(rows)
    elif out is None:
        typer.echo("\n".join(row["answer"] for row in rows))


def _by_column(
    model: str, adapters: Path, prompts: Path, column: str, config: GenerateConfig, format: str, limit: int | None
) -> list[dict[str, Any]]:
    """Each row answered by the adapter that it names, all in one go."""
    from lorakit.run.device import best_device
    from lorakit.serve.column import answer_by_column
    from lorakit.serve.server import Server, ServerConfig

    with Server(model, adapters, ServerConfig(device=best_device(), warm=False)) as server:
        return list(answer_by_column(server, prompts, column, config, format=format, limit=limit))
