"""A question-answering model on a data set -> answers and their metrics."""

from collections.abc import Callable, Sequence
from typing import Any

from lorakit.data import Dataset, QuestionExample
from lorakit.errors import DataError
from lorakit.evaluate.registry import check_metrics, default_metrics, score
from lorakit.evaluate.tasks import Evaluation
from lorakit.generate import answer_questions


def evaluate_questions(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    metrics: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer every question and hold the answer against its own.

    "No answer" is given only where the data set has questions without one (SQuAD v2). metrics: of text; None takes
    `default_metrics`. max_length, stride: see `encode_question`. progress: called with (windows done, windows in all).
    Raises UsageError for metrics of another kind, DataError for another data set or a question whose answers are not known.
    """
    examples = [example for example in dataset.examples if isinstance(example, QuestionExample)]
    if not examples or len(examples) != len(dataset):
        raise DataError(f"expected questions on contexts, came {dataset.format}", source=dataset.source)
    names = metrics or default_metrics("question-answering", dataset.format)
    check_metrics(names, "text")
    references = []
    for example in examples:
        if example.answers is None:
            reason = "there is no answer to hold the model's against"
            raise DataError(reason, source=dataset.source, line=example.line, field="answers")
        references.append([text for text, _ in example.answers] or [""])
    found = answer_questions(
        model,
        tokenizer,
        examples,
        allow_none=any(not example.answers for example in examples),
        batch_size=batch_size,
        max_length=max_length,
        stride=stride,
        progress=progress,
    )
    answers = [one.text for one in found]
    rows = [
        {"id": example.id, "question": example.question, "prediction": answer, "references": known}
        for example, answer, known in zip(examples, answers, references, strict=True)
    ]
    return Evaluation(score(names, answers, references), answers, rows)
