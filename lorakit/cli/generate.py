"""lorakit generate"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import bar, print_json
from lorakit.errors import UsageError
from lorakit.generate import GenerateConfig
from lorakit.run.measure import answer, write_predictions
from lorakit.run.subject import open_subject


def run(
    source: Annotated[str | None, typer.Argument(help="A run's folder, an adapter's folder or a hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; without a source it answers alone.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts (text, JSONL, CSV ...).")] = None,
    format: Annotated[str, typer.Option(help="The file's format.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the answers to this JSONL file.")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = GenerateConfig.max_new_tokens,
    num_beams: Annotated[int, typer.Option()] = GenerateConfig.num_beams,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = GenerateConfig.temperature,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = GenerateConfig.top_p,
    top_k: Annotated[int, typer.Option(help="With --sample; 0 = all.")] = GenerateConfig.top_k,
    length_penalty: Annotated[float, typer.Option(help="With beams.")] = GenerateConfig.length_penalty,
    no_repeat_ngram_size: Annotated[int, typer.Option()] = GenerateConfig.no_repeat_ngram_size,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer.")] = None,
    batch_size: Annotated[int, typer.Option()] = GenerateConfig.batch_size,
    seed: Annotated[int, typer.Option()] = GenerateConfig.seed,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompts and answers as JSON.")] = False,
) -> None:
    """Example: lorakit generate runs/sql --prompt 'How many albums are there?'"""
    if bool(prompt) == bool(prompts):
        raise UsageError("name either --prompt (one or several) or --prompts FILE.")
    config = GenerateConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        batch_size=batch_size,
        seed=seed,
        stop=tuple(stop or ()),
    )
    subject = open_subject(source, model=model)
    with bar("answering") as update:
        rows = answer(subject, prompt or prompts or [], config, format=format, progress=update)
    if out is not None:
        write_predictions(out, rows)
    if as_json:
        print_json(rows)
    elif out is None:
        typer.echo("\n".join(row["answer"] for row in rows))
