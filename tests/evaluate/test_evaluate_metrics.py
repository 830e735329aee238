"""Metrics against formulas written out here, and against the libraries called directly."""

import math
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from lorakit import evaluate as ev
from lorakit.errors import UsageError

PREDICTIONS = ["the cat sat on the mat", "there is a dog in the garden", "a b c d e f"]
REFERENCES = [
    ["the cat sat on the mat today"],
    ["a dog is in the garden", "there is a dog in a garden"],
    ["a b x d e f"],
]


def bleu_by_hand(predictions, references):
    """Papineni et al. 2002, formula of section 2.3, on words: clipped counts, closest reference length."""
    hits, totals, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for prediction, several in zip(predictions, references, strict=True):
        words, others = prediction.split(), [text.split() for text in several]
        ours += len(words)
        theirs += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            best = Counter()
            for other in others:
                best |= Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
            hits[n - 1] += sum((grams & best).values())
            totals[n - 1] += sum(grams.values())
    mean = sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4
    return 100 * min(1, math.exp(1 - theirs / ours)) * math.exp(mean)


def rouge_l_by_hand(prediction, reference):
    a, b = prediction.split(), reference.split()
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    common = table[-1, -1]
    return 2 * common / (len(a) + len(b))


def test_bleu_is_the_formula_with_unequal_numbers_of_references():
    assert ev.bleu(PREDICTIONS, REFERENCES) == pytest.approx(bleu_by_hand(PREDICTIONS, REFERENCES), rel=1e-9)


def test_bleu_is_sacrebleus_own_with_equal_numbers():
    references = [several[:1] for several in REFERENCES]
    direct = sacrebleu.corpus_bleu(PREDICTIONS, [[several[0] for several in references]]).score
    assert ev.bleu(PREDICTIONS, references) == pytest.approx(direct, rel=1e-12)
    assert ev.bleu(["A b, c d."], [["A b, c d."]]) == pytest.approx(100)


def test_a_second_reference_counts_and_its_place_does_not():
    swapped = [several[::-1] for several in REFERENCES]
    assert ev.bleu(PREDICTIONS, swapped) == pytest.approx(ev.bleu(PREDICTIONS, REFERENCES))
    assert ev.bleu(PREDICTIONS, REFERENCES) > ev.bleu(PREDICTIONS, [several[:1] for several in REFERENCES])


def test_bleu_of_empty_answers_is_zero_and_silent(capfd, caplog):
    assert ev.bleu(["", ""], [["a b c d"], ["e"]]) == 0
    ev.bleu(["a ."] * 200, [["a ."]] * 200)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_rouge_takes_the_best_reference_of_each_source():
    expected = [max(rouge_l_by_hand(p, r) for r in several) for p, several in zip(PREDICTIONS, REFERENCES, strict=True)]
    found = ev.rouge(PREDICTIONS, REFERENCES)
    assert found["rougeL"] == pytest.approx(100 * np.mean(expected), rel=1e-9)
    scorer = RougeScorer(["rouge1", "rouge2"])
    for name in ("rouge1", "rouge2"):
        best = [
            max(scorer.score(reference, prediction)[name].fmeasure for reference in several)
            for prediction, several in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert found[name] == pytest.approx(100 * np.mean(best), rel=1e-9)
    assert ev.rouge(["", "x"], [["a"], ["x"]])["rouge1"] == pytest.approx(50)


def test_exact_match():
    assert ev.exact_match([" a  b\n", "A b", "c"], [["x", "a b"], ["a b"], ["c"]]) == pytest.approx(2 / 3)


RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 2, 60).tolist(), RANDOM.integers(0, 2, 60).tolist()
THREE = RANDOM.integers(0, 3, 60).tolist(), RANDOM.integers(0, 3, 60).tolist()


def test_binary_metrics_are_the_formulas_of_the_four_counts():
    predictions, references = LABELS
    pairs = Counter(zip(predictions, references, strict=True))
    tp, fp, fn, tn = pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0]
    assert ev.accuracy(*LABELS) == pytest.approx((tp + tn) / 60)
    assert ev.f1(*LABELS) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert ev.matthews(*LABELS) == pytest.approx((tp * tn - fp * fn) / root)


def test_three_classes():
    predictions, references = THREE
    assert ev.f1_macro(*THREE) == pytest.approx(f1_score(references, predictions, average="macro"))
    each = []
    for label in range(3):
        hit = sum(p == r == label for p, r in zip(*THREE, strict=True))
        each.append(2 * hit / (predictions.count(label) + references.count(label)))
    assert ev.f1_macro(*THREE) == pytest.approx(np.mean(each))
    assert ev.matthews(*THREE) == pytest.approx(matthews_corrcoef(references, predictions))
    with pytest.raises(UsageError, match="f1_macro"):
        ev.f1(*THREE)


def test_correlations():
    predictions = RANDOM.normal(size=40).round(1)
    references = (predictions + RANDOM.normal(size=40)).round(1)
    a, b = predictions - predictions.mean(), references - references.mean()
    expected = (a @ b) / math.sqrt((a @ a) * (b @ b))
    assert ev.pearson(predictions.tolist(), references.tolist()) == pytest.approx(expected, rel=1e-9)
    ranks = [stats.rankdata(side) for side in (predictions, references)]  # ties share their mean rank
    assert len(set(predictions.tolist())) < 40
    expected = np.corrcoef(*ranks)[0, 1]
    assert ev.spearman(predictions.tolist(), references.tolist()) == pytest.approx(expected, rel=1e-9)
    assert ev.spearman([1, 2, 3], [1, 8, 90]) == pytest.approx(1)
    assert ev.pearson([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("sides", [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([1, 1], [1, 1]), ([1], [0])])
def test_what_is_undefined_is_zero_without_warnings(name, sides):
    assert ev.METRICS[name].function(*sides) == 0.0


def test_f1_of_a_class_that_is_nowhere_is_zero_without_warnings():
    assert ev.f1([0, 0], [0, 0]) == 0.0
    assert ev.f1([0, 0], [1, 0]) == 0.0
    assert ev.f1_macro([0, 0], [0, 0]) == 1.0


def test_nearly_constant_numbers_give_a_number_without_warnings():
    assert -1 <= ev.pearson([1.0, 1.0 + 1e-16, 1.0 + 3e-16], [1.0, 2.0, 3.0]) <= 1
    assert math.isfinite(ev.pearson([1e308, -1e308, 5.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_an_error(bad):
    with pytest.raises(UsageError, match="predictions must be finite"):
        ev.pearson([1.0, bad], [1.0, 2.0])
    with pytest.raises(UsageError, match="references must be finite"):
        ev.spearman([1.0, 2.0], [1.0, bad])


@pytest.mark.parametrize("name", list(ev.METRICS))
def test_nothing_to_score_and_unequal_lengths_are_errors(name):
    one = [["a"]] if ev.METRICS[name].kind == "text" else [1]
    for predictions, references in (([], []), (["a"], []), ([], one)):
        with pytest.raises(UsageError, match="at least one prediction"):
            ev.score([name], predictions, references)


@pytest.mark.parametrize("name", [name for name, metric in ev.METRICS.items() if metric.kind == "text"])
def test_a_bare_text_as_references_is_an_error(name):
    for references in (["abc"], [[]]):
        with pytest.raises(UsageError, match="prediction 1: expected a list of at least one reference"):
            ev.score([name], ["a"], references)


def test_score_and_its_errors():
    found = ev.score(["rougeL", "exact_match"], PREDICTIONS, REFERENCES)
    assert found == {"rougeL": ev.rouge(PREDICTIONS, REFERENCES)["rougeL"], "exact_match": 0.0}
    with pytest.raises(UsageError, match="Did you mean 'accuracy'"):
        ev.score(["acuracy"], [1], [1])
    with pytest.raises(UsageError, match="list of metrics"):
        ev.score("bleu", [1], [1])
    with pytest.raises(UsageError, match=r"compares texts, not labels.*accuracy"):
        ev.check_metrics(["bleu"], "label")


@pytest.mark.parametrize(
    ("arguments", "options", "first"),
    [
        (("causal-lm", "e2e"), {}, "bleu"),
        (("seq2seq", "prompt-completion"), {}, "bleu"),
        (("causal-lm", "messages"), {}, "rougeL"),
        (("sequence-classification", "glue:cola"), {"num_labels": 2}, "matthews"),
        (("sequence-classification", "glue:stsb"), {"regression": True}, "pearson"),
        (("sequence-classification", "glue:rte"), {"num_labels": 2}, "accuracy"),
        (("sequence-classification", "text-label"), {"num_labels": 5}, "accuracy"),
        (("sequence-classification", "text-label"), {"regression": True}, "pearson"),
    ],
)
def test_default_metrics_exist_and_suit_the_task(arguments, options, first):
    names = ev.default_metrics(*arguments, **options)
    assert names[0] == first
    kind = "text" if arguments[0] != "sequence-classification" else "number" if "regression" in options else "label"
    ev.check_metrics(names, kind)
    assert ("f1" in names) == (options == {"num_labels": 2} and arguments[1] == "glue:rte")
