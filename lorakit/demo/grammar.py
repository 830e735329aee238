"""Questions with their SQL, sampled from the shapes: one set for training, one whose wordings training never sees."""

import sqlite3
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from lorakit.errors import UsageError

from .database import DATABASE_SEEDS, fill
from .joins import JOIN_SHAPES
from .query import QueryError, execute
from .shapes import ROW_SHAPES, SUMMARY_SHAPES, Shape
from .slots import expand

Split = Literal["train", "heldout"]

SHAPES: Final = ROW_SHAPES + SUMMARY_SHAPES + JOIN_SHAPES
_TRIES: Final = 200  # draws in a row without a new question before a template counts as used up


@dataclass(frozen=True)
class Question:
    """One question and the SQL that answers it."""

    text: str
    sql: str
    shape: str
    """Name of the SQL shape."""
    template: str
    """The wording before its blanks were filled."""


def questions(split: Split, n: int, seed: int = 0) -> list[Question]:
    """`n` questions with different texts, spread evenly over the shapes; the same ones for the same arguments.

    Each answer differs between the two databases and is empty on neither, so no constant passes.
    Raises UsageError on an unknown split, n < 1, or n beyond what the shapes can say.
    """
    if split not in ("train", "heldout"):
        raise UsageError(f'split must be "train" or "heldout", not {split!r}.')
    if n < 1:
        raise UsageError(f"the number of questions must be at least 1, not {n}.")
    rng = Random(f"{split}-{seed}")
    with ExitStack() as stack:
        databases = [stack.enter_context(closing(fill(number))) for number in DATABASE_SEEDS]
        return _sample(split, n, rng, databases)


def _sample(split: Split, n: int, rng: Random, databases: Sequence[sqlite3.Connection]) -> list[Question]:
    """Round after round, one new question of each shape that still has one; mixed at the end."""
    templates = {shape: _templates(shape, split, rng) for shape in rng.sample(SHAPES, len(SHAPES))}
    found: dict[str, Question] = {}  # text -> question
    while templates and len(found) < n:
        for shape, waiting in list(templates.items()):
            question = _new_question(shape, waiting, rng, found, databases)
            if question is None:
                del templates[shape]
            elif len(found) < n:
                found[question.text] = question
    if len(found) < n:
        raise UsageError(
            f"{n} different {split} questions were asked for; the shapes give {len(found)}. Ask for fewer."
        )
    return rng.sample(list(found.values()), n)


def _templates(shape: Shape, split: Split, rng: Random) -> deque[str]:
    """The shape's templates in an order of chance; each is used once before any is used again."""
    templates = shape.wordings.train if split == "train" else shape.wordings.heldout
    return deque(rng.sample(templates, len(templates)))


def _new_question(
    shape: Shape, waiting: deque[str], rng: Random, found: dict[str, Question], databases: Sequence[sqlite3.Connection]
) -> Question | None:
    """A question not in `found`, on the first waiting template that still gives one; None when none does."""
    while waiting:
        template = waiting.popleft()
        for _ in range(_TRIES):
            slots = shape.slots(rng)
            text, sql = expand(template, slots, rng), shape.sql.format_map(slots)
            if text not in found and _tells_apart(sql, databases):
                waiting.append(template)
                return Question(text, sql, shape.name, template)
    return None


def _tells_apart(sql: str, databases: Sequence[sqlite3.Connection]) -> bool:
    """Whether the SQL has an answer on each database (nothing but NULL and 0 is none), and not the same on all."""
    answers = [execute(conn, sql) for conn in databases]
    for answer in answers:
        if isinstance(answer, QueryError):
            raise RuntimeError(f"the grammar made SQL that does not run: {sql!r}: {answer.reason}")
        if not any(value for row in answer for value in row):
            return False
    return any(answer != answers[0] for answer in answers)
