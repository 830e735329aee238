"""Classification: batched = alone, order, pairs, limits."""

import pytest
import torch

from lorakit.data import LabelExample
from lorakit.errors import DataError, UsageError
from lorakit.generate import classify

TEXTS = ["good", "a much longer sentence", "b", "été", "the end"]


def alone(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist()


def test_each_row_is_what_it_is_alone(classifier, tokenizer):
    classifier.train()
    found = classify(classifier, tokenizer, TEXTS, batch_size=2)
    assert classifier.training
    classifier.eval()
    for text, prediction in zip(TEXTS, found, strict=True):
        scores = alone(classifier, tokenizer, text)
        assert prediction.scores == pytest.approx(scores, abs=1e-5)
        assert prediction.label == scores.index(max(scores))
    assert len({prediction.scores for prediction in found}) == len(TEXTS)


def test_a_regression_gives_its_number(regressor, tokenizer):
    found = classify(regressor, tokenizer, ["abc", "d"])
    with torch.no_grad():
        number = regressor(**tokenizer("abc", return_tensors="pt")).logits.item()
    assert found[0].label is None
    assert found[0].scores == pytest.approx((number,), abs=1e-5)


def test_a_pair_is_two_texts_and_an_examples_label_is_not_looked_at(classifier, tokenizer):
    pair, one = classify(classifier, tokenizer, [("ab", "cd"), "ab"])
    assert pair.scores != pytest.approx(one.scores, abs=1e-4)
    (example,) = classify(classifier, tokenizer, [LabelExample("ab", "cd", None, 7)])
    assert example.scores == pytest.approx(pair.scores, abs=1e-6)


def test_too_long_a_text_names_its_line_and_may_be_cut(classifier, tokenizer):
    with pytest.raises(DataError, match=r"line 2.*49 tokens"):
        classify(classifier, tokenizer, ["fine", "x" * 49])
    cut, short = classify(classifier, tokenizer, ["x" * 49, "x" * 10], max_length=10, truncate=True)
    assert cut.scores == pytest.approx(short.scores, abs=1e-6)
    with pytest.raises(UsageError, match="max_length"):
        classify(classifier, tokenizer, ["a"], max_length=0)


def test_no_texts_no_predictions(classifier, tokenizer):
    assert classify(classifier, tokenizer, []) == []


def test_progress_counts_rows(classifier, tokenizer):
    seen = []
    classify(classifier, tokenizer, TEXTS, batch_size=3, progress=lambda *at: seen.append(at))
    assert seen == [(3, 5), (5, 5)]
