"""A model on a data set: references grouped, values in their order, faults named."""

import json
import os

import pytest

from lorakit import evaluate as ev
from lorakit.data import ChatExample, Dataset, LabelExample, Message, PromptExample
from lorakit.errors import DataError, OutputError, UsageError
from lorakit.generate import GenerateConfig, classify, generate

CONFIG = GenerateConfig(max_new_tokens=6)


def prompt(text, *references, line=1):
    return PromptExample(text, references[0] if references else None, references, line)


def test_rows_that_share_a_prompt_are_answered_once_against_all_their_references(llama, tokenizer):
    right = generate(llama, tokenizer, ["ab", "cd"], CONFIG)
    rows = [prompt("ab", "wrong"), prompt("cd", right[1]), prompt("ab", right[0], "other")]
    found = ev.evaluate_generation(llama, tokenizer, rows, CONFIG, ["exact_match", "bleu"])
    assert found.predictions == right
    assert found.metrics["exact_match"] == 1.0
    assert found.metrics["bleu"] == ev.bleu(right, [["wrong", right[0], "other"], [right[1]]])
    assert found.rows[0] == {"prompt": "ab", "prediction": right[0], "references": ["wrong", right[0], "other"]}


def test_of_a_chat_the_last_answer_is_the_reference_and_hidden_from_the_model(llama, tokenizer):
    (right,) = generate(llama, tokenizer, [[{"role": "user", "content": "hi"}]], CONFIG)
    chat = ChatExample((Message("user", "hi"), Message("assistant", right)), line=1)
    found = ev.evaluate_generation(llama, tokenizer, [chat], CONFIG, ["exact_match"])
    assert found.metrics == {"exact_match": 1.0}
    assert found.rows[0]["prompt"] == "<user>hi</s><a>"


def test_generation_faults(llama, tokenizer):
    with pytest.raises(DataError, match="nothing to evaluate"):
        ev.evaluate_generation(llama, tokenizer, [], CONFIG, ["bleu"])
    with pytest.raises(DataError, match=r"line 7: there is no reference"):
        ev.evaluate_generation(llama, tokenizer, [prompt("a", "b"), prompt("c", line=7)], CONFIG, ["bleu"])
    with pytest.raises(UsageError, match="compares labels"):
        ev.evaluate_generation(llama, tokenizer, [prompt("a", "b")], CONFIG, ["accuracy"])


def labelled(*labels, regression=False, names=("no", "yes"), source="x.tsv"):
    texts = ["good", "a longer one", "bad", "so so"]
    examples = [LabelExample(text, None, label, line) for line, (text, label) in enumerate(zip(texts, labels), 1)]  # noqa: B905
    return Dataset(tuple(examples), "text-label", source, None if regression else list(names), regression)


def test_classes_are_held_against_labels_in_their_order(make_classifier, tokenizer):
    model = make_classifier(2)
    found = [row.label for row in classify(model, tokenizer, ["good", "a longer one", "bad", "so so"])]
    labels = [found[0], 1 - found[1], found[2], found[3]]
    seen = []
    result = ev.evaluate_classification(
        model, tokenizer, labelled(*labels), batch_size=3, progress=lambda *at: seen.append(at)
    )
    assert result.predictions == found
    assert result.metrics == {"accuracy": 0.75, "f1": ev.f1(found, labels)}
    assert [row["label"] for row in result.rows] == labels
    assert seen == [(3, 4), (4, 4)]


def test_numbers_are_correlated(make_classifier, tokenizer):
    model = make_classifier(1)
    numbers = [row.scores[0] for row in classify(model, tokenizer, ["good", "a longer one", "bad", "so so"])]
    data = labelled(*[2 * number + 1 for number in numbers], regression=True)
    result = ev.evaluate_classification(model, tokenizer, data)
    assert result.metrics == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    assert result.predictions == numbers


def test_classification_faults(make_classifier, tokenizer):
    model = make_classifier(2)
    with pytest.raises(DataError, match=r"x.tsv.*3 labels \(a, b, c\), but the model has 2 outputs"):
        ev.evaluate_classification(model, tokenizer, labelled(0, 1, names=("a", "b", "c")))
    with pytest.raises(DataError, match="a number, but the model has 2 outputs"):
        ev.evaluate_classification(model, tokenizer, labelled(0.5, 1.5, regression=True))
    with pytest.raises(DataError, match=r"line 2.*label"):
        ev.evaluate_classification(model, tokenizer, labelled(0, None))
    with pytest.raises(DataError, match="expected texts with labels"):
        ev.evaluate_classification(model, tokenizer, Dataset((), "text-label", "x"))
    with pytest.raises(DataError, match="expected texts with labels"):
        ev.evaluate_classification(model, tokenizer, Dataset((prompt("a", "b"),), "prompt-completion", "x"))
    with pytest.raises(UsageError, match="compares numbers, not labels"):
        ev.evaluate_classification(model, tokenizer, labelled(0, 1), ["pearson"])


def test_predictions_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "predictions.jsonl"
    rows = [{"prompt": "é\n", "prediction": "x"}, {"prompt": "b", "prediction": 2}]
    ev.write_predictions(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows

    def breaks():
        yield {"a": 1}
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="no space left"):
        ev.write_predictions(path, breaks())
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert os.listdir(tmp_path) == ["predictions.jsonl"]
    with pytest.raises(OutputError, match=r"x\.jsonl"):
        ev.write_predictions(path / "x.jsonl", rows)  # inside a file
