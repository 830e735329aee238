"""`lorakit bench`: commands, table, JSON, mistakes."""

import json
import sys

import pytest


def test_train_has_an_example(lorakit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = lorakit("bench", "train", "--help")
    assert said.code == 0
    assert said.out.count("Example: lorakit bench train") == 1
    assert "--json" in said.out


def test_table_and_json(lorakit, texts, tmp_path):
    words = ["bench", "train", "--model", texts.model, "--rows", "equal,floor", "--batch", 2, "--length", 8]
    words += ["--rounds", 2, "--no-memory"]
    out = tmp_path / "new" / "bench.json"
    said = lorakit(*words, "--json", "--out", out)
    assert said.code == 0
    assert [row["name"] for row in said.json["rows"]] == ["equal", "floor"]
    assert said.json["machine"]["threads"] >= 1
    assert said.json["config"]["batch"] == 2
    assert json.loads(out.read_text()) == said.json
    equal = {side["name"]: side for side in said.json["rows"][0]["sides"]}
    assert equal["lorakit"]["loss"] == pytest.approx(equal["peft"]["loss"], abs=1e-4)
    table = lorakit(*words)
    assert table.code == 0
    for text in ("equal", "floor", "peft", "threads", "time over lorakit's"):
        assert text in table.out


def test_settings_reach_lorakits_recipe(lorakit, texts):
    words = ["bench", "train", "--model", texts.model, "--rows", "equal", "--batch", 2, "--length", 8, "--rounds", 1]
    said = lorakit(*words, "--no-memory", "--json", "--set", "method.r=2")
    ours, theirs = said.json["rows"][0]["sides"]
    assert ours["trainable"] == theirs["trainable"]  # PEFT takes over what lorakit begins with
    assert said.json["config"]["overrides"] == ["method.r=2"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["bench"], 2, ""),
        (["bench", "nothing"], 2, "No such command"),
        (["bench", "train", "--rows", "equl"], 1, "row 'equl' is unknown"),
        (["bench", "train", "--rows", "real"], 1, "name a data set (--data)"),
        (["bench", "train", "--model", "nowhere/at/all"], 1, "no model 'nowhere/at/all'"),
        (["bench", "train", "--rounds", "0"], 1, "rounds must be at least 1"),
        (["bench", "train", "--rounds", "x"], 2, "rounds"),
    ],
)
def test_mistakes(lorakit, words, code, message):
    said = lorakit(*words)
    assert said.code == code
    assert message in said.err


def test_ctrl_c_is_one_word(lorakit, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    lorakit("bench", "--help")
    monkeypatch.setattr(sys.modules["lorakit.cli.bench"], "bench_train", pressed)
    said = lorakit("bench", "train")
    assert (said.code, said.out, said.err) == (1, "", "error: interrupted.\n")
