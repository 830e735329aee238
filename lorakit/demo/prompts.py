"""How a question is put to the model: bare to the adapted model; with the schema and three examples to the base."""

from collections.abc import Sequence
from typing import Final

from .database import schema_text
from .grammar import SHAPES, Question, questions

_FEW_SHOT_SHAPES: Final = ("equal", "group_count", "join_filter")  # a filter, a group and a join


def prompt(question_text: str) -> str:
    """The question and `SQL:`; the adapted model goes on with `completion`. It has learnt the schema, and needs none here."""
    return _ask(question_text)


def completion(sql: str) -> str:
    """What the model is to write after `prompt`, up to its end-of-text token: a space, then the SQL."""
    return f" {sql}"


def example(question: Question) -> dict[str, str]:
    """A training row: {"prompt": ..., "completion": ...}."""
    return {"prompt": prompt(question.text), "completion": completion(question.sql)}


def few_shot_examples(seed: int = 0) -> list[Question]:
    """Three training questions of three shapes: a filter, a group and a join."""
    found = {question.shape: question for question in questions("train", len(SHAPES), seed)}
    return [found[shape] for shape in _FEW_SHOT_SHAPES]


def few_shot_prompt(question_text: str, examples: Sequence[Question]) -> str:
    """The same schema, then the answered examples, then the question: for the base model, as plain text."""
    shots = "".join(f"{_ask(shot.text)}{completion(shot.sql)}\n\n" for shot in examples)
    return f"{schema_text()}\n\n{shots}{_ask(question_text)}"


def _ask(question_text: str) -> str:
    return f"Question: {question_text}\nSQL:"
