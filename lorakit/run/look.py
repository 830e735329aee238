"""What training would see of a data set: its examples as tokens, which of them carry loss, what is cut."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data import IGNORE, Dataset, Encoded, encode, encode_all, load_examples
from lorakit.data.read import SUFFIXES
from lorakit.errors import ModelError, UsageError
from lorakit.models import longest_row
from lorakit.models.quiet import quiet
from lorakit.models.source import resolve
from lorakit.run.check import TASK_OF

UNCUT = 10**9
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that all carry loss, or all do not. tokens: how many."""

    text: str
    tokens: int
    loss: bool


@dataclass(frozen=True)
class Shown:
    """One example. tokens: before it is cut; cut: how many of them are. label: the class or score, None for text."""

    line: int
    tokens: int
    cut: int
    loss_tokens: int
    stretches: Sequence[Stretch]
    label: str | None


@dataclass(frozen=True)
class Look:
    """A data set as a model would be trained on it. lengths: least, median, 95th percentile and most tokens of a row.

    limit: the most tokens that a row may have, None for no limit; over: rows that are longer. loss_tokens, loss_share:
    tokens that carry loss, uncut; None for a classification.
    """

    source: str
    format: str
    task: str
    model: str
    rows: int
    tokens: int
    loss_tokens: int | None
    loss_share: float | None
    lengths: tuple[int, float, int, int]
    limit: int | None
    over: int
    labels: Sequence[str] | None
    examples: Sequence[Shown]


def is_data(source: str) -> bool:
    """Whether `source` is called as a file of data is (and not as an adapter's .json)."""
    return Path(source).suffix.lower() in set(SUFFIXES) - {".json"}


def look(
    source: str,
    model: str,
    *,
    task: str | None = None,
    format: str = "auto",
    max_length: int | None = None,
    show: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Look:
    """Encode a data set for a model and count. The model's weights are not loaded.

    task: None = what the data are for. max_length: None = what the model takes. show: how many examples to give whole.
    Raises DataError, ModelError, UsageError.
    """
    if show < 0 or (max_length is not None and max_length < 1):
        raise UsageError(f"expected show of at least 0 and max_length of at least 1, got {show} and {max_length}.")
    dataset = load_examples(source, format=format)
    task = task or TASK_OF[type(dataset.examples[0])]
    if task not in TASKS:
        raise UsageError(f"task: expected one of {', '.join(TASKS)} (data of tokens), got {task!r}.")
    tokenizer, limit = _tokenizer(model, task)
    limit = max_length or limit
    rows = encode_all(dataset, tokenizer, task=task, max_length=UNCUT, progress=progress)
    lengths = sorted(_length(row) for row in rows)
    masked = task != "sequence-classification"
    counted = sum(_loss_tokens(row) for row in rows) if masked else None
    inputs = sum(len(row.input_ids) + len(_target(row, task)) for row in rows)
    return Look(
        source=dataset.source,
        format=dataset.format,
        task=task,
        model=model,
        rows=len(rows),
        tokens=inputs,
        loss_tokens=counted,
        loss_share=None if counted is None else counted / max(1, inputs),
        lengths=(lengths[0], statistics.median(lengths), lengths[int(0.95 * (len(lengths) - 1))], lengths[-1]),
        limit=limit,
        over=0 if limit is None else sum(length > limit for length in lengths),
        labels=dataset.label_names,
        examples=[_shown(dataset, place, rows[place], tokenizer, task, limit) for place in range(min(show, len(rows)))],
    )


def _shown(dataset: Dataset, place: int, full: Encoded, tokenizer: Any, task: str, limit: int | None) -> Shown:
    row = encode(dataset.examples[place], tokenizer, task=task, max_length=limit or UNCUT, truncate=True)
    target = _target(row, task)
    if isinstance(row.labels, list) and not target:
        stretches = _stretches(row.input_ids, [label != IGNORE for label in row.labels], tokenizer)
    else:
        stretches = _stretches(row.input_ids, [False] * len(row.input_ids), tokenizer)
        stretches += _stretches(target, [True] * len(target), tokenizer)
    before, after = (len(one.input_ids) + len(_target(one, task)) for one in (full, row))
    label = None if isinstance(row.labels, list) else str(row.labels)
    if isinstance(row.labels, int) and dataset.label_names:
        label = dataset.label_names[row.labels]
    return Shown(row.line, before, before - after, _loss_tokens(row), stretches, label)


def _stretches(ids: Sequence[int], loss: Sequence[bool], tokenizer: Any) -> list[Stretch]:
    """Each stretch's text as it stands in the whole: a token's own text may lack the blank before it."""
    found: list[Stretch] = []
    begin, said = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and loss[end] == loss[begin]:
            continue
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        own = whole[len(said) :] if whole.startswith(said) else tokenizer.decode(ids[begin:end])
        found.append(Stretch(own, end - begin, loss[begin]))
        begin, said = end, whole
    return found


def _target(row: Encoded, task: str) -> list[int]:
    """The target's own ids where it is no part of the input."""
    return row.labels if task == "seq2seq" and isinstance(row.labels, list) else []


def _length(row: Encoded) -> int:
    """Tokens that the model's limit counts: of a source with a target the longer."""
    return max(len(row.input_ids), len(row.labels) if isinstance(row.labels, list) else 0)


def _loss_tokens(row: Encoded) -> int:
    return sum(label != IGNORE for label in row.labels) if isinstance(row.labels, list) else 0


def _tokenizer(name: str, task: str) -> tuple[Any, int | None]:
    """The model's tokenizer, and the most tokens that it takes. Its weights are not read: only its shape is built."""
    import torch
    import transformers

    source = resolve(name)
    try:
        with quiet(progress=False):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
            config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
            with torch.device("meta"):
                model = getattr(transformers, TASKS[task]).from_config(config)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ...
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"{name}: its tokenizer or config cannot be read for {task} ({text}).") from error
    return tokenizer, longest_row(model, tokenizer)
