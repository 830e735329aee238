"""Metrics of the paper's tasks, against values worked out by hand, published ones, and brute force."""

import json
import math
from collections import Counter
from itertools import product

import pytest

from lorakit.errors import DataError, UsageError
from lorakit.evaluate import (
    best_epoch,
    cider,
    default_metrics,
    logical_form,
    meteor,
    nist,
    nlg,
    over_seeds,
    rouge_l_coco,
    squad_exact,
    squad_f1,
    ter,
)
from lorakit.evaluate.squad import normalise

TEXTS = ["the inn is cheap and good .", "a pub near the river serves fish", "Blue Spice is a coffee shop in the centre"]


def test_ter_by_hand():
    # one shift of a block over four words; then one of four words is replaced, and the nearer reference counts
    assert ter(["b c d a"], [["a b c d"]]) == pytest.approx(25)
    assert ter(["a x c d"], [["a b c d", "q q q q"]]) == pytest.approx(25)
    # all edits over all words: 1 of 4 and 0 of 1, not the mean of 25 and 0
    assert ter(["a x c d", "Z"], [["a b c d"], ["z"]]) == pytest.approx(20)


def test_nist_against_its_formula():
    # Doddington 2002, equation 3, one reference a text: information of a hit, by order, over the prediction's n-grams
    predictions, references = [text.lower().split() for text in ("the cat sat down", "a dog ran")], []
    references = [text.split() for text in ("the cat sat there now", "a dog sat")]
    grams = Counter(tuple(row[i : i + n]) for row in references for n in range(1, 6) for i in range(len(row) - n + 1))
    words, total = sum(map(len, references)), 0.0
    for n in range(1, 5):
        hits, count = 0.0, 0
        for ours, theirs in zip(predictions, references, strict=True):
            mine = Counter(tuple(ours[i : i + n]) for i in range(len(ours) - n + 1))
            known = Counter(tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1))
            count += sum(mine.values())
            for gram, times in (mine & known).items():
                hits += times * math.log2((grams[gram[:-1]] if n > 1 else words) / grams[gram])
        total += hits / count
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(7 / 8) ** 2)
    expected = total * penalty
    assert nist(["the cat sat down", "A dog ran"], [["The cat sat there now"], ["a dog sat"]]) == pytest.approx(
        expected
    )
    assert nist(["x"], [["y"]]) == nist([""], [["y"]]) == 0


def test_nist_is_nltks_for_one_reference_and_gathers_several():
    from nltk.translate.nist_score import corpus_nist

    ours = ["the cat sat on a mat today", "a small dog ran to me"]
    theirs = ["the cat sat on the mat", "a dog ran up to me there"]
    expected = corpus_nist([[one.split()] for one in theirs], [one.split() for one in ours])
    assert nist(ours, [[one] for one in theirs]) == pytest.approx(expected)
    # each word has the information log2(8/1) = 3; "a b" is right by the first reference and "c d" by the second:
    # 4 of 4 unigrams; bigrams log2(1/1) = 0; 4 words to 4 on average
    assert nist(["a b c d"], [["a b x y", "c d u v"]]) == pytest.approx(3)


class NoSynonyms:
    @staticmethod
    def synsets(word):
        return []


def test_meteor_has_the_published_examples_values(monkeypatch):
    # Banerjee & Lavie 2005's measure on the usual example: F 1, one chunk of six; F .9836, two chunks of six
    monkeypatch.setattr(nlg, "_wordnet", NoSynonyms)
    reference = [["the cat sat on the mat"]]
    assert meteor(["the cat sat on the mat"], reference) == pytest.approx(99.77, abs=0.005)
    assert meteor(["the cat was sat on the mat"], reference) == pytest.approx(96.54, abs=0.005)
    assert meteor(["The cats sat on the mat"], reference) == pytest.approx(99.77, abs=0.005)  # by Porter's stems
    assert meteor([""], reference) == 0


def test_meteor_without_wordnet_says_what_to_fetch(monkeypatch, tmp_path):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    from nltk.corpus import wordnet

    if type(wordnet).__name__ != "LazyCorpusLoader":
        pytest.skip("WordNet has been loaded in this process already")
    with pytest.raises(UsageError, match=r"nltk\.downloader wordnet.*NLTK_DATA"):
        meteor(["a"], [["a"]])


def test_rouge_l_of_e2e_by_hand():
    # precision 2/4 from either reference, recall 1 from the first: (1 + 1.2^2) * .5 * 1 / (1 + 1.2^2 * .5)
    assert rouge_l_coco(["a b c d"], [["a c", "a b x y"]]) == pytest.approx(100 * 2.44 * 0.5 / 1.72)
    assert rouge_l_coco(["A b, c."], [["a b c"]]) == pytest.approx(100)  # neither case nor punctuation counts


def test_cider_against_brute_force():
    references = [[TEXTS[0], "the cheap inn is near"], [TEXTS[1]], [TEXTS[2], "a coffee shop , Blue Spice", "Spice"]]
    predictions = ["the inn is good", "a pub serves fish near the river", "Blue Spice is a cheap shop"]
    tokens = lambda text: [word for word in text.lower().split() if word not in ".,"]  # noqa: E731
    grams = lambda row, n: Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))  # noqa: E731
    total = 0.0
    for ours, several in zip(predictions, references, strict=True):
        for n, theirs in product(range(1, 5), several):
            known = [set().union(*(grams(tokens(text), n) for text in one)) for one in references]
            weigh = lambda counts, known=known: {  # noqa: E731
                gram: times * (math.log(3) - math.log(max(1, sum(gram in one for one in known))))
                for gram, times in counts.items()
            }
            left, right = weigh(grams(tokens(ours), n)), weigh(grams(tokens(theirs), n))
            norms = [math.sqrt(sum(value**2 for value in side.values())) for side in (left, right)]
            shared = sum(min(value, right.get(gram, 0)) * right.get(gram, 0) for gram, value in left.items())
            apart = max(0, len(tokens(ours)) - 1) - max(0, len(tokens(theirs)) - 1)  # in bigrams, as the code has it
            if all(norms):
                total += shared / norms[0] / norms[1] * math.exp(-(apart**2) / 72) / 4 / len(several)
    assert cider(predictions, references) == pytest.approx(10 * total / 3)
    assert cider(TEXTS, [[text] for text in TEXTS]) == pytest.approx(10)


def test_the_package_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UsageError, match="pycocoevalcap"):
        cider(["a"], [["a"]])


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The  Norman dynasty!", ["norman dynasty"], 100, 100),
        ("Norman kings", ["the Norman dynasty", "dynasty"], 0, 50),
        ("in 1066, by sea", ["1066"], 0, 40),
        ("", [""], 100, 100),
        ("the", [""], 100, 100),  # nothing is left of an article
        ("x", [""], 0, 0),
        ("", ["x"], 0, 0),
        ("x x y", ["x y y z"], 0, 200 * 2 / 7),
    ],
)
def test_squads_metrics(prediction, references, exact, f1):
    assert squad_exact([prediction], [references]) == pytest.approx(exact)
    assert squad_f1([prediction], [references]) == pytest.approx(f1)
    assert normalise("A cat, an Ant; the THE-end (Theo)") == "cat ant theend theo"


def test_logical_form_accuracy():
    gold = "SELECT MAX([1]) FROM table WHERE [2] = 'Foo' AND [3] > '5'"
    same = ["select max([1]) from table where [3] > '5' and [2] = 'foo'", gold]
    wrong = [
        gold.replace("MAX", "MIN"),
        gold.replace("[1]", "[2]"),
        gold.replace("> '5'", "< '5'"),
        gold[:-4],
        "",
        "SQL",
    ]
    assert logical_form(same, [[gold]] * 2) == 1
    assert logical_form([*same, *wrong], [[gold]] * 8) == 0.25
    with pytest.raises(UsageError, match="reference 1 is no SQL"):
        logical_form([gold], [["SELECT everything"]])


def test_seeds(tmp_path):
    for seed, values in enumerate(([0.5, 0.75, 0.75], [0.9, 0.2, None], [0.6, 0.1, 0.7])):
        (tmp_path / str(seed)).mkdir()
        rows = [{"step": 1, "loss": 0.3}]
        rows += [{"step": 10 * n, "eval_accuracy": v, "eval_loss": n} for n, v in enumerate(values, 1)]
        (tmp_path / str(seed) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = over_seeds([tmp_path / str(seed) for seed in range(3)], "accuracy")
    assert (found.values, found.steps, found.median) == ((0.75, 0.9, 0.7), (20, 10, 30), 0.75)
    assert found.spread == pytest.approx(math.sqrt((0.0333333**2 + 0.1166667**2 + 0.0833333**2) / 2), rel=1e-5)
    assert over_seeds([tmp_path / "0"], "loss").steps == (10,)
    assert over_seeds([tmp_path / "0"], "loss").spread is None
    assert best_epoch([{"step": 1, "eval_ter": 40}, {"step": 2, "eval_ter": 30}], "ter").step == 2
    with pytest.raises(DataError, match="no evaluation of it has a finite f1"):
        over_seeds([tmp_path / "0"], "f1")
    with pytest.raises(DataError, match="no run's record"):
        over_seeds([tmp_path / "9"], "loss")
    with pytest.raises(UsageError, match="unknown"):
        best_epoch([], "acuracy")


def test_each_tasks_own_metrics_need_nothing_more():
    assert default_metrics("causal-lm", "webnlg:seen") == ("bleu", "ter")
    assert default_metrics("causal-lm", "wikisql")[0] == "logical_form"
    assert default_metrics("question-answering", "squad") == ("squad_f1", "squad_exact")
    for task in ("e2e", "webnlg", "dart", "wikisql", "samsum"):
        assert not {"meteor", "cider", "rougeL_coco"} & set(default_metrics("causal-lm", task))


def test_references_without_a_word_are_like_nothing():
    assert cider(["a", "b"], [["."], ["!"]]) == 0.0


def test_an_epoch_whose_value_is_no_number_is_not_the_best():
    rows = [
        {"step": 1, "eval_loss": float("nan")},
        {"step": 2, "eval_loss": 1.0},
        {"step": 3, "eval_loss": float("inf")},
    ]
    assert best_epoch(rows, "loss").step == 2
