"""The other metrics of data-to-text challenges: NIST, METEOR, ROUGE-L and CIDEr of E2E, TER of WebNLG and DART.

All but NIST are other people's code. Where its results differ from the challenges' own scripts, docs/metrics.md says so.
"""

from collections.abc import Sequence
from typing import Any

from lorakit.errors import UsageError
from lorakit.evaluate.nist import corpus_nist
from lorakit.evaluate.text import check_references

Texts = Sequence[str]
References = Sequence[Sequence[str]]

_COCO_DROPS = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""The tokens that coco-caption's tokenizer takes out."""


def ter(predictions: Texts, references: References) -> float:
    """Translation edit rate, 0 upwards, times 100; lower is better (Snover et al. 2006, by sacrebleu, tercom's way).

    All edits of the predictions, each against its nearest reference, over the references' mean lengths. Case does not count.
    Raises UsageError for nothing to score.
    """
    from sacrebleu.metrics.ter import TER

    check_references(predictions, references)
    most = max(len(several) for several in references)
    streams: list[Any] = [
        [several[number] if number < len(several) else None for several in references] for number in range(most)
    ]
    return float(TER().corpus_score(list(predictions), streams).score)


def nist(predictions: Texts, references: References) -> float:
    """NIST, 0 upwards (Doddington 2002): 1- to 5-grams, weighed by how rare the references have them (see nist.py).

    Words are those of mteval's tokenizer (sacrebleu's 13a) in lower case. Raises UsageError for nothing to score.
    """
    check_references(predictions, references)
    theirs = [[_words_13a(text) for text in several] for several in references]
    return corpus_nist([_words_13a(text) for text in predictions], theirs)


def meteor(predictions: Texts, references: References) -> float:
    """METEOR, 0 to 100 (Banerjee & Lavie 2005, by nltk: exact words, then Porter stems, then WordNet's synonyms).

    The mean of the predictions, each with its best reference; words as in `nist`. Raises UsageError where WordNet's files
    are not there, saying what to fetch, and for nothing to score.
    """
    from nltk.translate.meteor_score import meteor_score

    check_references(predictions, references)
    synonyms, total = _wordnet(), 0.0
    for prediction, several in zip(predictions, references, strict=True):
        theirs = [_words_13a(text) for text in several]
        ours = _words_13a(prediction)
        total += float(meteor_score(theirs, ours, wordnet=synonyms)) if ours else 0.0
    return 100 * total / len(predictions)


def _wordnet() -> Any:
    """WordNet of nltk's corpora. Raises UsageError where it has not been fetched."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise UsageError(
            "METEOR needs WordNet's files, which are not here. Fetch them once with `python -m nltk.downloader wordnet`, or "
            "unpack nltk's corpora/wordnet.zip into a folder nltk_data/corpora and set NLTK_DATA to that nltk_data. Leave "
            "meteor out of the metrics to go on without."
        ) from error
    return wordnet


def rouge_l_coco(predictions: Texts, references: References) -> float:
    """ROUGE-L as E2E counts it, 0 to 100 (Lin 2004, by pycocoevalcap): F with beta 1.2 of the best precision and the best
    recall among the references, which may be of different ones. Words as in `cider`. Raises UsageError.
    """
    rouge = _coco("pycocoevalcap.rouge.rouge", "Rouge")()
    gathered = _coco_sides(predictions, references)
    return 100 * float(rouge.compute_score(*gathered)[0])


def cider(predictions: Texts, references: References) -> float:
    """CIDEr-D, 0 to 10 (Vedantam et al. 2015, by pycocoevalcap): tf-idf similarity of 1- to 4-grams with the references.

    Rarity is counted in the references given, so a part of a test set has other values than the whole, and of a single
    prediction it is 0. Words are nltk's Penn Treebank ones in lower case, without punctuation. Raises UsageError.
    """
    scorer = _coco("pycocoevalcap.cider.cider", "Cider")()
    gathered = _coco_sides(predictions, references)
    if not any(text.strip() for texts in gathered[0].values() for text in texts):
        return 0.0  # no reference has a word, so nothing is like it
    return float(scorer.compute_score(*gathered)[0])


def _coco(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UsageError(
            "cider and rougeL_coco need the package pycocoevalcap: pip install 'lorakit[metrics]'. Java is not needed."
        ) from error


def _coco_sides(predictions: Texts, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(references, predictions) by number, tokenized."""
    check_references(predictions, references)
    theirs = {number: [_coco_words(text) for text in several] for number, several in enumerate(references)}
    return theirs, {number: [_coco_words(text)] for number, text in enumerate(predictions)}


def _coco_words(text: str) -> str:
    from nltk.tokenize import NLTKWordTokenizer

    words = NLTKWordTokenizer().tokenize(text, convert_parentheses=True)
    return " ".join(word.lower() for word in words if word not in _COCO_DROPS)


def _words_13a(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Any = Tokenizer13a
    words: str = tokenizer()(text.lower())
    return words.split()
