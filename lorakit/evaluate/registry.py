"""The metrics by name, and which suit a task."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorakit.errors import UsageError
from lorakit.evaluate.labels import accuracy, f1, f1_macro, matthews
from lorakit.evaluate.logical import logical_form
from lorakit.evaluate.nlg import cider, meteor, nist, rouge_l_coco, ter
from lorakit.evaluate.numbers import pearson, spearman
from lorakit.evaluate.squad import squad_exact, squad_f1
from lorakit.evaluate.text import bleu, exact_match, rouge


@dataclass(frozen=True)
class Metric:
    """`function(predictions, references)`; `kind` of what it compares: text (references are lists), label, number."""

    function: Callable[[Sequence[Any], Sequence[Any]], float]
    kind: str
    higher_is_better: bool = True


def _one_rouge(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return rouge(predictions, references, types=(name,))[name]


METRICS: dict[str, Metric] = {
    "bleu": Metric(bleu, "text"),
    "rouge1": Metric(partial(_one_rouge, "rouge1"), "text"),
    "rouge2": Metric(partial(_one_rouge, "rouge2"), "text"),
    "rougeL": Metric(partial(_one_rouge, "rougeL"), "text"),
    "exact_match": Metric(exact_match, "text"),
    "nist": Metric(nist, "text"),
    "meteor": Metric(meteor, "text"),
    "rougeL_coco": Metric(rouge_l_coco, "text"),
    "cider": Metric(cider, "text"),
    "ter": Metric(ter, "text", higher_is_better=False),
    "logical_form": Metric(logical_form, "text"),
    "squad_exact": Metric(squad_exact, "text"),
    "squad_f1": Metric(squad_f1, "text"),
    "accuracy": Metric(accuracy, "label"),
    "f1": Metric(f1, "label"),
    "f1_macro": Metric(f1_macro, "label"),
    "matthews": Metric(matthews, "label"),
    "pearson": Metric(pearson, "number"),
    "spearman": Metric(spearman, "number"),
}
"""Adding one is adding a row here: `METRICS["mine"] = Metric(function, "text")`."""

_GLUE = {
    "cola": ("matthews", "accuracy"),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
}
_TEXT = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match")
_OF_FORMAT = {
    "messages": ("rougeL", "rouge1", "rouge2", "bleu", "exact_match"),
    "e2e": ("bleu", "nist", "ter", "rougeL"),
    "webnlg": ("bleu", "ter"),
    "dart": ("bleu", "ter"),
    "wikisql": ("logical_form", "exact_match"),
    "samsum": ("rouge1", "rouge2", "rougeL"),
}
"""Of these tasks' own metrics those that need nothing to be fetched or installed first (docs/metrics.md)."""


def check_metrics(names: Sequence[str], kind: str | None = None) -> None:
    """Raises UsageError for no names, an unknown name (with the nearest), or one of another `kind`."""
    if isinstance(names, str) or not names:
        raise UsageError(f"expected a list of metrics, came {names!r}. Known: {', '.join(METRICS)}.")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"metric {name!r} is unknown; expected one of: {', '.join(METRICS)}.{hint}")
        if kind is not None and METRICS[name].kind != kind:
            fitting = ", ".join(known for known, metric in METRICS.items() if metric.kind == kind)
            raise UsageError(f"metric {name!r} compares {METRICS[name].kind}s, not {kind}s. Use one of: {fitting}.")


def score(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """The value of each named metric. Raises UsageError for an unknown one and for nothing to score."""
    check_metrics(names)
    return {name: METRICS[name].function(predictions, references) for name in names}


def default_metrics(
    task: str, dataset_format: str = "auto", *, num_labels: int | None = None, regression: bool = False
) -> tuple[str, ...]:
    """The metrics to report for a task when none are named; the first is the one that chooses the best adapter.

    dataset_format: as `Dataset.format` says it; `glue:<task>` gives GLUE's own metrics.
    """
    if dataset_format.startswith("glue:") and (known := _GLUE.get(dataset_format.removeprefix("glue:"))):
        return known
    if task in ("sequence-classification", "image-classification"):
        if regression:
            return ("pearson", "spearman")
        return ("accuracy", "f1" if num_labels == 2 else "f1_macro")
    if task == "question-answering":
        return ("squad_f1", "squad_exact")
    return _OF_FORMAT.get(dataset_format.partition(":")[0], _TEXT)
