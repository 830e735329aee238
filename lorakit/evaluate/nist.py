"""NIST against several references, as mteval-v13a.pl and E2E's script count it.

Of our own: nltk holds each prediction against its single best reference, where these gather the n-grams of all of them; on
E2E's references, 7.4 in place of 8.5 (docs/metrics.md).
"""

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
_BETA = math.log(0.5) / math.log(1.5) ** 2
"""The length penalty is one half where a prediction has two thirds of its references' words."""


def corpus_nist(predictions: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = 5) -> float:
    """The sum over n of the information of right n-grams a predicted n-gram, times the length penalty (Doddington 2002, 3).

    An n-gram is right as often as the reference with the most of it has it. 0 where no word is predicted.
    """
    rows = [words for several in references for words in several]
    counts: list[Counter[tuple[str, ...]]] = [Counter({(): sum(map(len, rows))})]
    counts += [Counter(gram for words in rows for gram in _grams(words, n)) for n in range(1, longest + 1)]
    total = sum(_precision(predictions, references, counts, n) for n in range(1, longest + 1))
    expected = sum(sum(map(len, several)) / len(several) for several in references)
    ratio = sum(map(len, predictions)) / expected if expected else 0.0
    if ratio == 0:
        return 0.0
    return total * math.exp(_BETA * math.log(min(1.0, ratio)) ** 2)


def _precision(
    predictions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    counts: Sequence[Counter[tuple[str, ...]]],
    n: int,
) -> float:
    """Information of the right n-grams, in bits, over the number of predicted ones."""
    found, made = 0.0, 0
    for words, several in zip(predictions, references, strict=True):
        known: Counter[tuple[str, ...]] = Counter()
        for one in several:
            known |= Counter(_grams(one, n))
        ours = Counter(_grams(words, n))
        made += ours.total()
        for gram, times in (ours & known).items():
            found += times * math.log2(counts[n - 1][gram[:-1]] / counts[n][gram])
    return found / made if made else 0.0


def _grams(words: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
