"""Judging SQL by what it answers: a prediction is right when its rows equal the reference's on both databases."""

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

from lorakit.errors import UsageError

from .database import DATABASE_SEEDS, fill
from .grammar import Question
from .query import LIMITS, QueryError, QueryLimits, Row, execute

__all__ = [
    "LIMITS",
    "Accuracy",
    "Failure",
    "QueryError",
    "QueryLimits",
    "Row",
    "ShapeScore",
    "execute",
    "execution_accuracy",
    "extract_sql",
    "same_answer",
    "same_rows",
]

_TOLERANCE: Final = 1e-6
_QUOTED: Final = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`"
_INNERMOST: Final = re.compile(r"\([^()]*\)")
_FENCE: Final = re.compile(
    r"```[^\S\n]*(?:(?!SELECT\b|WITH\b)\w+[^\S\n]*\n)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE
)
# Where a statement begins: not at "the SELECT statement" or "with all shops".
_START: Final = (
    r"SELECT\b(?!\s+(?:statement|query|clause|command|keyword)\b)|(?i:WITH\s+(?:RECURSIVE\s+)?\w+[^;]{0,80}?\bAS\s*\()"
)
# Where it ends: a semicolon, a blank line, a fence, a mark of a chat's turn, or a line that begins like the prompt's
# next question or like a remark on the answer.
_END: Final = re.compile(
    rf"({_QUOTED})|;|\n[^\S\n]*\n|```|<\||</s>"
    r"|\n\s*(?:Question|SQL|Answer|Explanation|Note|Output|Result|Schema|Q|A)\s*:"
    r"|\n\s*(?:This|The|Here|In this|Note that)\s"
)


@dataclass(frozen=True)
class ShapeScore:
    """Questions of one shape: how many were right, of how many."""

    correct: int
    total: int


@dataclass(frozen=True)
class Failure:
    """A question that was not answered."""

    question: Question
    predicted: str
    """The SQL that was taken from the model's output; empty where there was none."""
    reason: str
    """What SQLite said, or that the answer differs."""


@dataclass(frozen=True)
class Accuracy:
    """Execution accuracy over a set of questions."""

    correct: int
    total: int
    by_shape: Mapping[str, ShapeScore]
    failures: Sequence[Failure]

    @property
    def value(self) -> float:
        """correct / total, in 0..1."""
        return self.correct / self.total


def execution_accuracy(predictions: Sequence[str], questions: Sequence[Question]) -> Accuracy:
    """Judges a model's raw outputs, one a question, each through `extract_sql`.

    Raises UsageError when there are no questions, or not as many outputs as questions.
    """
    if not questions or len(predictions) != len(questions):
        raise UsageError(
            f"one output a question was expected, and at least one question: {len(predictions)} outputs came for "
            f"{len(questions)} questions."
        )
    failures: list[Failure] = []
    with ExitStack() as stack:
        databases = [stack.enter_context(closing(fill(number))) for number in DATABASE_SEEDS]
        for output, question in zip(predictions, questions, strict=True):
            predicted = extract_sql(output)
            reason = _difference(predicted, question.sql, databases)
            if reason is not None:
                failures.append(Failure(question, predicted, reason))
    wrong = Counter(failure.question.shape for failure in failures)
    totals = Counter(question.shape for question in questions)
    by_shape = {shape: ShapeScore(total - wrong[shape], total) for shape, total in sorted(totals.items())}
    return Accuracy(len(questions) - len(failures), len(questions), by_shape, tuple(failures))


def same_answer(sql: str, reference: str, databases: Sequence[sqlite3.Connection] = ()) -> bool:
    """Whether `sql` gives the reference's rows on every database; by default on the demo's two.

    In the reference's order where it has an ORDER BY of its own (not one in a subquery), else in any order. SQL that
    fails is wrong. Raises UsageError when the reference itself fails.
    """
    if databases:
        return _difference(sql, reference, databases) is None
    with ExitStack() as stack:
        demo = [stack.enter_context(closing(fill(number))) for number in DATABASE_SEEDS]
        return _difference(sql, reference, demo) is None


def same_rows(rows: Sequence[Row], expected: Sequence[Row], *, ordered: bool) -> bool:
    """Whether two results agree: numbers to 1e-6, NULL to NULL alone, as lists or as multisets."""
    if len(rows) != len(expected):
        return False
    if ordered:
        return all(_same_row(row, other) for row, other in zip(rows, expected, strict=True))
    left = list(expected)
    for row in rows:
        match = next((at for at, other in enumerate(left) if _same_row(row, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def extract_sql(model_output: str) -> str:
    """The first SQL statement in a model's output, without fences, talk around it or its semicolon; "" for none."""
    fenced = (match[1] for match in _FENCE.finditer(model_output))
    for text in (*fenced, model_output):
        # Capitals first: in "to select the names: SELECT name" the first word is talk.
        start = re.search(rf"\b(?:{_START})", text) or re.search(rf"\b(?:{_START})", text, re.IGNORECASE)
        if start is None:
            continue
        statement = text[start.start() :]
        end = next((match.start() for match in _END.finditer(statement) if match[1] is None), len(statement))
        if text[: start.start()].endswith("`"):  # `SELECT ...` in running text
            tick = statement.find("`")
            end = end if tick < 0 else min(end, tick)
        return statement[:end].strip()
    return ""


def _difference(sql: str, reference: str, databases: Sequence[sqlite3.Connection]) -> str | None:
    """Why `sql` does not answer as the reference does; None when it does."""
    ordered = _is_ordered(reference)
    for conn in databases:
        expected = execute(conn, reference)
        if isinstance(expected, QueryError):
            raise UsageError(f"the reference has to be SQL that runs; {reference!r} fails: {expected.reason}")
        rows = execute(conn, sql)
        if isinstance(rows, QueryError):
            return rows.reason
        if not same_rows(rows, expected, ordered=ordered):
            return "another answer than the reference's"
    return None


def _is_ordered(sql: str) -> bool:
    """Whether an ORDER BY stands outside of all parentheses and quotes."""
    bare = re.sub(_QUOTED, "''", sql)
    while (flatter := _INNERMOST.sub(" ", bare)) != bare:
        bare = flatter
    return re.search(r"\bORDER\s+BY\b", bare, re.IGNORECASE) is not None


def _same_row(row: Row, other: Row) -> bool:
    return len(row) == len(other) and all(_same_value(value, twin) for value, twin in zip(row, other, strict=True))


def _same_value(value: object, other: object) -> bool:
    if isinstance(value, float) or isinstance(other, float):
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(float(value), float(other), rel_tol=1e-9, abs_tol=_TOLERANCE)  # type: ignore[arg-type]
    return type(value) is type(other) and value == other
