"""A file whose rows name their adapters, answered in one go: what `lorakit generate --adapter-column` does."""

from pathlib import Path
from typing import Any

from lorakit.data import load_examples, prompt_text
from lorakit.data.faults import raise_at_once
from lorakit.data.source import open_source
from lorakit.errors import DataError, UsageError
from lorakit.generate import GenerateConfig
from lorakit.serve.limits import SamplingParams
from lorakit.serve.server import Server


def answer_by_column(
    server: Server, file: Path, column: str, config: GenerateConfig, *, format: str = "auto", limit: int | None = None
) -> list[dict[str, str | None]]:
    """[{"prompt", "adapter", "hash", "answer"}] for each row of `file`, by the adapter that its `column` names.

    An empty cell is the base. Raises DataError for a file without the column, UsageError for settings that only
    `lorakit.generate` has, and what Server.generate raises.
    """
    params = sampling(config)
    names = adapter_cells(file, column)
    examples: Any = load_examples(str(file), format=format, split="test", targets=False, limit=limit).examples
    chosen = [names[example.line] for example in examples]
    answers = server.generate(examples, chosen, params)
    return [
        {"prompt": prompt_text(example, server.tokenizer), "adapter": name, "hash": one.adapter, "answer": one.text}
        for example, name, one in zip(examples, chosen, answers, strict=True)
    ]


def adapter_cells(file: Path, column: str) -> dict[int, str | None]:
    """line -> the adapter that the row there names. Raises DataError for a row without the column, or no text in it."""
    found: dict[int, str | None] = {}
    for line, row in open_source(str(file), "test").rows(None, raise_at_once):
        if column not in row:
            raise DataError(
                f"expected a column {column!r} that names the adapter; there are: {', '.join(map(str, row))}",
                source=str(file),
                line=line,
            )
        cell = row[column]
        if cell is not None and not isinstance(cell, str):
            raise DataError(f"expected an adapter's name, came {cell!r}", source=str(file), line=line, field=column)
        found[line] = cell or None
    return found


def sampling(config: GenerateConfig) -> SamplingParams:
    """The engine's settings that mean the same. Raises UsageError where it has none."""
    for name in ("length_penalty", "no_repeat_ngram_size"):
        if getattr(config, name) != getattr(GenerateConfig, name):
            raise UsageError(f"{name} does not go with rows that name their adapters: leave it out.")
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature if config.do_sample else 0.0,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed if config.do_sample else None,
        stop=config.stop,
        num_beams=config.num_beams,
    )
