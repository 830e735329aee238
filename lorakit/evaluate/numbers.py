"""Metrics of predicted numbers."""

import math
import warnings
from collections.abc import Sequence

from lorakit.errors import UsageError
from lorakit.evaluate.labels import check_pairs


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson's correlation, -1 to 1; 0 where either side is constant (undefined: nothing can be seen to vary).

    Raises UsageError for nothing to score or a number that is not finite.
    """
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1, equal values sharing their mean rank; 0 where either side is constant.

    Raises UsageError for nothing to score or a number that is not finite.
    """
    return _correlation("spearmanr", predictions, references)


def _correlation(name: str, predictions: Sequence[float], references: Sequence[float]) -> float:
    from scipy import stats

    check_pairs(predictions, references)
    for side, values in (("predictions", predictions), ("references", references)):
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"{side} must be finite numbers; at least one is NaN or infinite.")
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0
    function = stats.pearsonr if name == "pearsonr" else stats.spearmanr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input: the value is still the best there is
        value = float(function(list(predictions), list(references)).statistic)
    return value if math.isfinite(value) else 0.0
