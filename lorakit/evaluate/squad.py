"""Exact match and F1 as SQuAD's evaluate-v1.1.py and evaluate-v2.0.py compute them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lorakit.evaluate.text import check_references

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_exact(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share, 0 to 100, of predictions equal to one of their references once normalised (`normalise`).

    references: [""] where the right answer is that there is none. Raises UsageError for nothing to score.
    """
    return _mean(lambda one, other: float(normalise(one) == normalise(other)), predictions, references)


def squad_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean, 0 to 100, of each prediction's F1 of normalised words with the reference that suits it best.

    Where either side has no words the score is 1 if both have none, else 0. Raises UsageError for nothing to score.
    """
    return _mean(_f1, predictions, references)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without a, an and the, and with single blanks: in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(prediction: str, reference: str) -> float:
    ours, theirs = normalise(prediction).split(), normalise(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _mean(score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    check_references(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(max(score(one, other) for other in several) for one, several in pairs) / len(predictions)
