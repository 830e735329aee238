"""Metrics of written text against one or several references each."""

from collections.abc import Sequence
from typing import Any

from lorakit.errors import UsageError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002, by sacrebleu: 4-grams, tokenizer 13a, case kept, smoothing exp).

    references: of each prediction at least one; their numbers may differ. Raises UsageError for none at all.
    """
    from sacrebleu.metrics.bleu import BLEU

    check_references(predictions, references)
    most = max(len(several) for several in references)
    # sacrebleu takes streams, one a reference number; None where a prediction has no more.
    streams: list[Any] = [
        [several[number] if number < len(several) else None for several in references] for number in range(most)
    ]
    # force: no lecture on the console about predictions that end in " ."
    return float(BLEU(force=True).corpus_score(list(predictions), streams).score)


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], types: Sequence[str] = ROUGE_TYPES
) -> dict[str, float]:
    """F-measures of ROUGE (Lin 2004, by rouge-score, without stemming), 0 to 100, averaged over the predictions.

    With several references each type takes the best of a prediction. rougeL is of whole texts, not sentence by sentence.
    Raises UsageError for nothing to score.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(predictions, references)
    scorer = RougeScorer(list(types), use_stemmer=False)
    totals = dict.fromkeys(types, 0.0)
    for prediction, several in zip(predictions, references, strict=True):
        for name, score in scorer.score_multi(list(several), prediction).items():
            totals[name] += score.fmeasure
    return {name: 100 * total / len(predictions) for name, total in totals.items()}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share, 0 to 1, of predictions equal to one of their references; runs of blanks count as one, case counts."""
    check_references(predictions, references)
    pairs = zip(predictions, references, strict=True)
    hits = sum(_plain(prediction) in {_plain(text) for text in several} for prediction, several in pairs)
    return hits / len(predictions)


def _plain(text: str) -> str:
    return " ".join(text.split())


def check_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises UsageError unless each of at least one prediction has a list of at least one reference."""
    if not predictions or len(predictions) != len(references):
        raise UsageError(
            f"expected references for each of at least one prediction, came {len(predictions)} predictions and "
            f"references for {len(references)}."
        )
    for index, several in enumerate(references):
        if isinstance(several, str) or not several:
            raise UsageError(f"prediction {index + 1}: expected a list of at least one reference, came {several!r}.")
