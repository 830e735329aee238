"""Metrics of class ids."""

from collections.abc import Sequence
from typing import Any

from lorakit.errors import UsageError


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The share, 0 to 1, of predictions that are right. Raises UsageError for nothing to score."""
    check_pairs(predictions, references)
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """F1 of class 1 of two (0, 1): harmonic mean of precision and recall, 0 to 1; 0 where class 1 is nowhere.

    Raises UsageError for nothing to score, and for other classes than 0 and 1: for those there is f1_macro.
    """
    check_pairs(predictions, references)
    if others := sorted({*predictions, *references} - {0, 1}):
        raise UsageError(f"f1 is of class 1 of the two classes 0 and 1, came {others[:5]} too. Use f1_macro.")
    return _f1(predictions, references, average="binary")


def f1_macro(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The mean of the F1 of every class that occurs in predictions or references, 0 to 1."""
    check_pairs(predictions, references)
    return _f1(predictions, references, average="macro")


def _f1(predictions: Sequence[int], references: Sequence[int], average: str) -> float:
    from sklearn.metrics import f1_score

    value: Any = f1_score(list(references), list(predictions), average=average, zero_division=0.0)
    return float(value)


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Matthews' correlation, -1 to 1, of two or more classes; 0 where either side has one class alone (undefined)."""
    from sklearn.metrics import matthews_corrcoef

    check_pairs(predictions, references)
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0
    return float(matthews_corrcoef(list(references), list(predictions)))


def check_pairs(predictions: Sequence[float], references: Sequence[float]) -> None:
    """Raises UsageError unless there is at least one prediction and as many references."""
    if not predictions or len(predictions) != len(references):
        raise UsageError(
            f"expected a reference for each of at least one prediction, came {len(predictions)} predictions and "
            f"{len(references)} references."
        )
