"""A model on a data set -> predictions and their metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data import (
    ChatExample,
    Dataset,
    ImageExample,
    LabelExample,
    PromptExample,
    group_references,
    prompt_text,
    references_of,
)
from lorakit.errors import DataError
from lorakit.evaluate.registry import check_metrics, default_metrics, score
from lorakit.generate import GenerateConfig, classify, classify_images, generate

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a data set.

    metrics: name -> value. predictions: a text, class id or number a row. rows: one JSON-like record a prediction
    (the input, the prediction, the reference or references), as `write_predictions` takes them.
    """

    metrics: dict[str, float]
    predictions: list[Any]
    rows: list[dict[str, Any]] = field(repr=False)


def evaluate_generation(
    model: Any,
    tokenizer: Any,
    examples: Sequence[PromptExample | ChatExample],
    config: GenerateConfig,
    metrics: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every example and hold the answers against its references.

    Rows that share a prompt are answered once, against the references of all of them; of a chat the last assistant
    turn is the reference. progress: called with (answers done, answers in all). Raises UsageError for metrics that are
    not of text, DataError for an example without reference.
    """
    check_metrics(metrics, "text")
    prompts = group_references([example for example in examples if isinstance(example, PromptExample)])
    chats = [example for example in examples if isinstance(example, ChatExample)]
    questions: list[PromptExample | ChatExample] = [*prompts, *chats]
    if not questions:
        raise DataError("there is nothing to evaluate: expected at least one prompt or chat, came none.")
    references = [list(references_of(example)) for example in questions]
    for example, known in zip(questions, references, strict=True):
        if not known:
            raise DataError("there is no reference to hold the model's answer against", line=example.line)
    answers = generate(model, tokenizer, questions, config, progress=progress)
    rows = [
        {"prompt": prompt_text(example, tokenizer), "prediction": answer, "references": known}
        for example, answer, known in zip(questions, answers, references, strict=True)
    ]
    return Evaluation(score(metrics, answers, references), answers, rows)


def evaluate_classification(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    metrics: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncate: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every text or image (or predict a text's number) and hold it against its label.

    tokenizer: for images the model's image processor. metrics: None takes `default_metrics`. max_length, truncate: of
    texts, as in `classify`. progress: called with (rows done, rows in all). Raises UsageError for metrics of another kind,
    DataError for a row without label or no rows.
    """
    examples = _labelled(dataset)
    kind = "number" if dataset.regression else "label"
    if metrics is None:
        count = None if dataset.label_names is None else len(dataset.label_names)
        metrics = default_metrics(
            "sequence-classification", dataset.format, num_labels=count, regression=dataset.regression
        )
    check_metrics(metrics, kind)
    _check_heads(model, dataset)
    texts = [example for example in examples if isinstance(example, LabelExample)]
    images = [example for example in examples if isinstance(example, ImageExample)]
    if texts:
        limits: dict[str, Any] = {"max_length": max_length, "truncate": truncate}
        found = classify(model, tokenizer, texts, batch_size=batch_size, progress=progress, **limits)
    else:
        found = classify_images(model, tokenizer, images, batch_size=batch_size, progress=progress)
    values = [prediction.scores[0] if dataset.regression else prediction.label for prediction in found]
    labels = [example.label for example in examples]
    rows = [
        {**_input_of(example), "prediction": value, "label": example.label}
        for example, value in zip(examples, values, strict=True)
    ]
    return Evaluation(score(metrics, values, labels), values, rows)


def _input_of(example: LabelExample | ImageExample) -> dict[str, Any]:
    if isinstance(example, ImageExample):
        return {"image": example.path}
    return {"text": example.text, "pair": example.pair}


def _labelled(dataset: Dataset) -> list[LabelExample | ImageExample]:
    """The examples, all of one kind. Raises DataError where one is no text or image with a label."""
    examples = [example for example in dataset.examples if isinstance(example, LabelExample | ImageExample)]
    if not examples or len(examples) != len(dataset) or len({type(example) for example in examples}) > 1:
        raise DataError(
            f"expected texts with labels, or images with classes, came {dataset.format} ({len(dataset)} rows)",
            source=dataset.source,
        )
    for example in examples:
        if example.label is None:
            raise DataError(
                "it is missing, and evaluation needs it", source=dataset.source, line=example.line, field="label"
            )
    return examples


def _check_heads(model: Any, dataset: Dataset) -> None:
    """The model must predict what the data hold; else every figure would be about something else."""
    outputs = model.config.num_labels
    expected = 1 if dataset.regression else len(dataset.label_names or [])
    if expected and outputs != expected:
        what = "a number" if dataset.regression else f"{expected} labels ({', '.join(dataset.label_names or [])})"
        raise DataError(
            f"the data hold {what}, but the model has {outputs} outputs. Load it for them.", source=dataset.source
        )
