"""Measuring and answering with a subject: what `lorakit evaluate` and `lorakit generate` do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.data import DataConfig, load_examples, prompt_text
from lorakit.errors import UsageError
from lorakit.evaluate import (
    Evaluation,
    default_metrics,
    evaluate_classification,
    evaluate_generation,
    evaluate_questions,
    write_predictions,
)
from lorakit.generate import GenerateConfig, generate
from lorakit.run.recipe import CLASSIFIERS, QUESTION_ANSWERING, Recipe, load_recipe
from lorakit.run.subject import Subject

Progress = Callable[[int, int], None]


def recipe_of_run(run: str | Path) -> Recipe | None:
    """The recipe of a run's folder; None where the folder is no run's."""
    recipe = Path(run).expanduser() / "recipe.yaml"
    return load_recipe(recipe) if recipe.is_file() else None


def evaluate_subject(
    subject: Subject,
    source: str,
    *,
    data: DataConfig | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    config: GenerateConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The subject's metrics on a data set.

    data: how its rows are read (format, columns, lengths, eval_limit). metrics: None = the task's own. seed: of the sample
    where there is an eval_limit.
    """
    data = data or DataConfig()
    classifies = subject.task in CLASSIFIERS
    dataset = load_examples(
        source,
        format=data.format,
        # The run's own eval set is measured where the run has no test set: the same split of it again.
        split="eval" if source == data.eval and source != data.test else "test",
        columns=data.columns,
        label_names=subject.label_names,
        regression=(classifies and subject.model.config.num_labels == 1) or None,
        limit=data.eval_limit,
        seed=seed,
    )
    if classifies:
        return evaluate_classification(
            subject.model,
            subject.tokenizer,
            dataset,
            metrics,
            max_length=data.max_length,
            truncate=data.truncate,
            progress=progress,
        )
    if subject.task == QUESTION_ANSWERING:
        lengths = {"max_length": data.max_length, "stride": data.stride}
        return evaluate_questions(subject.model, subject.tokenizer, dataset, metrics, progress=progress, **lengths)
    examples: Any = dataset.examples
    return evaluate_generation(
        subject.model,
        subject.tokenizer,
        examples,
        config or GenerateConfig(),
        metrics or default_metrics(subject.task, dataset.format),
        progress=progress,
    )


def answer(
    subject: Subject,
    prompts: Sequence[str] | str | Path,
    config: GenerateConfig,
    *,
    format: str = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """[{"prompt", "answer"}] for prompts given as a list, or as a file of them."""
    if subject.task in CLASSIFIERS:
        raise UsageError("a classification model writes no text: use lorakit evaluate.")
    if subject.task == QUESTION_ANSWERING:
        raise UsageError(
            "a question-answering model marks stretches of contexts and writes no text: use lorakit evaluate."
        )
    if isinstance(prompts, str | Path):
        examples: Any = load_examples(str(prompts), format=format, split="test", targets=False, limit=limit).examples
        texts = [prompt_text(example, subject.tokenizer) for example in examples]
    else:
        examples = texts = list(prompts)
    answers = generate(subject.model, subject.tokenizer, examples, config, progress=progress)
    return [{"prompt": prompt, "answer": text} for prompt, text in zip(texts, answers, strict=True)]


__all__ = ["answer", "evaluate_subject", "recipe_of_run", "write_predictions"]
