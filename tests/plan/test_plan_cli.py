"""lorakit plan."""

import json

import pytest

from lorakit.cli import main


def said(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["plan", *words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return int(left.value.code or 0), out, err


def test_the_table_of_the_issue(capsys):
    code, out, _ = said(capsys, "gpt3-175b", "--r", "4", "--targets", "q,v", "--batch", "1", "--length", "16")
    assert code == 0
    for text in ("18,874,368", "174,604,259,328", "9,251", "9,285", "37.7 MB", "353 GB", "354 GB", "34.9 TB", "1.2 TB"):
        assert text in out


def test_ranks_and_places_make_rows(capsys):
    words = ("gpt2", "--r", "4,8", "--targets", "q,v", "--targets", "all-linear", "--length", "8", "--json")
    found = json.loads(said(capsys, *words)[1])
    assert [row["method"] for row in found["rows"]] == [
        "full fine-tuning",
        "LoRA r=4 on q, v",
        "LoRA r=8 on q, v",
        "LoRA r=4 on all-linear",
        "LoRA r=8 on all-linear",
    ]
    assert found["rows"][1]["trainable"] == 147_456
    assert found["rows"][1]["memory"]["peak"] > 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("gpt2", "--r", "x"), "whole numbers"),
        (("gpt2", "--method", "full", "--r", "4"), "LoRA's"),
        (("gpt2", "--method", "nonsense"), "expected full"),
        (("no such model",), "Shapes known by name"),
        (("gpt2", "--targets", "gate"), "no matrix known as gate"),
    ],
)
def test_mistakes_are_told(capsys, words, text):
    code, _, err = said(capsys, *words)
    assert code == 1
    assert text in err
