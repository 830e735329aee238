"""`lorakit inspect DATA --model M`: which tokens carry loss, lengths, what is cut."""

from pathlib import Path

import pytest
import runs
import tiny


@pytest.fixture
def data(tmp_path):
    return runs.write_rows(tmp_path / "data.jsonl", [{"prompt": "one >", "completion": " two"}, *runs.text_rows(8)])


def test_targets_stand_in_brackets(lorakit, texts, data):
    said = lorakit("inspect", data, "--model", texts.model, "--show", 1)
    assert said.code == 0
    assert said.out.splitlines()[-1].removeprefix("<s>") == "one >[[ two</s>]]"
    assert "line 1: 10 tokens, 5 with loss" in said.out
    assert "longer than 64" in said.out


def test_json_has_every_figure(lorakit, texts, data):
    found = lorakit("inspect", data, "--model", texts.model, "--json", "--show", 9).json
    rows = runs.read_rows(Path(data))
    assert found["rows"] == len(rows) == len(found["examples"])
    assert found["loss_tokens"] == sum(len(row["completion"]) + 1 for row in rows)
    assert found["tokens"] == sum(one["tokens"] for one in found["examples"])
    assert found["lengths"][0] == min(one["tokens"] for one in found["examples"])
    assert found["lengths"][3] == max(one["tokens"] for one in found["examples"])
    assert (found["limit"], found["over"]) == (64, 0)
    for one, row in zip(found["examples"], rows, strict=True):
        assert "".join(part["text"] for part in one["stretches"] if part["loss"]) == row["completion"] + "</s>"
        assert sum(part["tokens"] for part in one["stretches"]) == one["tokens"]


def test_what_is_cut(lorakit, texts, data):
    found = lorakit("inspect", data, "--model", texts.model, "--json", "--max-length", 7, "--show", 1).json
    first = found["examples"][0]
    assert (first["tokens"], first["cut"], found["over"]) == (10, 3, found["rows"])
    assert sum(part["tokens"] for part in first["stretches"]) == 7
    said = lorakit("inspect", data, "--model", texts.model, "--max-length", 7, "--show", 1)
    assert "3 cut" in said.out
    assert said.out.splitlines()[-1].endswith("[[ two</s>]]")  # the prompt is cut first


def test_classes_have_a_label_and_no_mask(lorakit, classes):
    said = lorakit("inspect", classes.root / "train.jsonl", "--model", classes.model, "--show", 2)
    assert said.code == 0
    assert "label neg" in said.out
    assert "label pos" in said.out
    assert "[[" not in said.out
    assert "with loss" not in said.out


def test_the_limit_is_the_models_own(lorakit, classes):
    """RoBERTa's positions begin behind the padding's, here 0: the first of its 66 rows is never used."""
    found = lorakit("inspect", classes.root / "train.jsonl", "--model", classes.model, "--json").json
    assert found["limit"] == 65
    assert found["labels"] == ["neg", "pos", "so"]


def test_a_target_of_its_own_follows_the_source(lorakit, tmp_path, data):
    model = runs.save_model(tmp_path / "t5", tiny.t5)
    found = lorakit("inspect", data, "--model", model, "--task", "seq2seq", "--json", "--show", 1).json
    source, target = found["examples"][0]["stretches"]
    assert (source["loss"], target["loss"]) == (False, True)
    assert target["text"] == " two</s>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{data}"], "Say for which model to show it: --model NAME"),
        (["{data}", "--model", "nowhere/at/all"], "no model 'nowhere/at/all'"),
        (["{data}x", "--model", "{model}"], "there is no such file"),
        (["{data}", "--model", "{model}", "--alpha", "8"], "are of an adapter's files"),
        (["{data}", "--model", "{model}", "--task", "sequence-classification"], "needs texts with labels"),
        (["{data}", "--model", "{model}", "--task", "nothing"], "task: expected one of causal-lm"),
        (["{data}", "--model", "{model}", "--max-length", "0"], "max_length of at least 1"),
        (["{run}", "--show", "1"], "name a model too (--model)"),
    ],
)
def test_mistakes(lorakit, texts, data, words, message):
    said = lorakit("inspect", *(word.format(data=data, model=texts.model, run=texts.run) for word in words))
    assert said.code == 1
    assert message in said.err
    assert said.out == ""


def test_an_adapter_is_inspected_as_before(lorakit, texts):
    said = lorakit("inspect", texts.run)
    assert said.code == 0
    assert "lora" in said.out
