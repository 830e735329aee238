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
    write_predictions,
)
from lorakit.generate import GenerateConfig, generate
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import Subject

Progress = Callable[[int, int], None]


def data_of_run(run: Path) -> tuple[DataConfig, GenerateConfig]:
    """The data and decoding settings of a run's recipe; defaults where the folder holds none."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        return DataConfig(), GenerateConfig()
    loaded = load_recipe(recipe)
    return loaded.data, loaded.generate


def evaluate_subject(
    subject: Subject,
    source: str,
    *,
    format: str = "auto",
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    config: GenerateConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The subject's metrics on a data set. metrics: None = the task's own."""
    dataset = load_examples(source, format=format, split="test", label_names=subject.label_names, limit=limit)
    if subject.task == "sequence-classification":
        return evaluate_classification(subject.model, subject.tokenizer, dataset, metrics, progress=progress)
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
    if subject.task == "sequence-classification":
        raise UsageError("a classification model writes no text: use lorakit evaluate.")
    if isinstance(prompts, str | Path):
        examples: Any = load_examples(str(prompts), format=format, split="test", targets=False, limit=limit).examples
        texts = [prompt_text(example, subject.tokenizer) for example in examples]
    else:
        examples = texts = list(prompts)
    answers = generate(subject.model, subject.tokenizer, examples, config, progress=progress)
    return [{"prompt": prompt, "answer": text} for prompt, text in zip(texts, answers, strict=True)]


__all__ = ["answer", "data_of_run", "evaluate_subject", "write_predictions"]
