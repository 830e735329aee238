"""The GLUE tasks as their TSV files come: which columns hold the texts and the label, and how to tell a task.

Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding".
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GlueTask:
    """One task's columns. `header`: the names for files that begin with data (CoLA's train and dev), else None."""

    name: str
    text: str
    pair: str | None
    label: str
    header: tuple[str, ...] | None = None
    regression: bool = False


GLUE_TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", "sentence", None, "label", header=("source", "label", "mark", "sentence")),
        GlueTask("sst2", "sentence", None, "label"),
        GlueTask("mrpc", "#1 String", "#2 String", "Quality"),
        GlueTask("qqp", "question1", "question2", "is_duplicate"),
        GlueTask("stsb", "sentence1", "sentence2", "score", regression=True),
        GlueTask("mnli", "sentence1", "sentence2", "gold_label"),
        GlueTask("qnli", "question", "sentence", "label"),
        GlueTask("rte", "sentence1", "sentence2", "label"),
        GlueTask("wnli", "sentence1", "sentence2", "label"),
    )
}

# Headers that only GLUE's own files have, so that a file can be told without being named. WNLI's is RTE's.
_HEADERS = {
    ("sentence", "label"): "sst2",
    ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"): "mrpc",
    ("index", "#1 ID", "#2 ID", "#1 String", "#2 String"): "mrpc",
    ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"): "qqp",
    ("index", "question", "sentence", "label"): "qnli",
    ("index", "sentence1", "sentence2", "label"): "rte",
    (
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ): "stsb",
}
_MNLI = {
    "pairID",
    "genre",
    "sentence1",
    "sentence2",
    "gold_label",
}  # its files differ in how many annotators' labels they have


def glue_task(name: str) -> GlueTask | None:
    """The task called `name`; case and dashes don't matter ("SST-2" is "sst2"). None if GLUE has no such task."""
    return GLUE_TASKS.get(name.lower().replace("-", "").replace("_", ""))


def detect_glue(first: Sequence[str]) -> GlueTask | None:
    """The task whose file begins with the fields `first`, None if it is not one of GLUE's."""
    name = _HEADERS.get(tuple(first))
    if name is None and set(first) >= _MNLI:
        name = "mnli"
    if name is None and len(first) == 4 and first[1] in ("0", "1") and first[2] in ("", "*"):
        name = "cola"
    return None if name is None else GLUE_TASKS[name]
