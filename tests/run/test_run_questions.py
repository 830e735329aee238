"""`task: question-answering`, end to end on a tiny BERT; and its loss."""

import json

import pytest
import runs
import tiny
import torch

from lorakit.errors import RecipeError
from lorakit.run.measure import evaluate_subject
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import open_subject
from lorakit.run.train import train
from lorakit.train.loss import objective_for


def squad(path, count, none=False):
    def paragraph(number):
        name, colour = runs.WORDS[number % 5], runs.WORDS[5 + number % 7]
        context = f"a {name} is {colour}." + " and so on" * (number % 6)
        known = {"answers": [{"text": colour, "answer_start": context.index(f"is {colour}") + 3}]}
        empty = {"answers": [], "is_impossible": True}
        entry = empty if none and number % 2 else known
        return {"context": context, "qas": [{"id": str(number), "question": f"{name}?"} | entry]}

    document = {"version": "2", "data": [{"title": "t", "paragraphs": [paragraph(n) for n in range(count)]}]}
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture
def document(tmp_path):
    def bare(**changes):
        return tiny.bert(**changes).bert  # a base without a head, of a config with three labels

    return {
        "model": runs.save_model(tmp_path / "bert", bare),
        "task": "question-answering",
        "data": {
            "train": squad(tmp_path / "train.json", 24),
            "eval": squad(tmp_path / "dev.json", 8, none=True),
            "max_length": 48,
            "stride": 8,
        },
        "method": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
        "train": {"epochs": 3, "lr": 1e-2, "best_metric": "squad_f1"},
        "output": str(tmp_path / "run"),
    }


def test_a_run_trains_measures_and_is_opened_again(document):
    result = train(document)
    rows = [row for row in runs.read_rows(result.folder / "metrics.jsonl") if "eval_loss" in row]
    assert len(rows) == 3
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert result.summary["after"]["squad_f1"] == max(row["eval_squad_f1"] for row in rows)
    assert result.summary["trainable_parameters"] == 2 * 2 * (32 * 4 + 4 * 32) + 32 * 2 + 2  # the head of two beside it
    subject = open_subject(result.folder)
    again = evaluate_subject(subject, document["data"]["eval"], data=load_recipe(document).data)
    assert again.metrics == result.summary["after"]
    assert {"id", "question", "prediction", "references"} == set(again.rows[0])


def test_a_stopped_run_goes_on_to_the_same_adapter(document, tmp_path):
    whole = train(document).folder / "adapter" / "adapter_model.safetensors"
    other = document | {"output": str(tmp_path / "other")}
    train(other | {"train": other["train"] | {"max_steps": 4, "schedule": "constant"}})
    steady = document | {"train": document["train"] | {"schedule": "constant"}, "output": str(tmp_path / "steady")}
    full = train(steady).folder / "adapter" / "adapter_model.safetensors"
    again = train(other | {"train": steady["train"]}, resume=True).folder / "adapter" / "adapter_model.safetensors"
    assert again.read_bytes() == full.read_bytes() != whole.read_bytes()


def test_the_loss_is_transformers_own():
    from transformers import BertConfig, BertForQuestionAnswering

    config = tiny.bert().config.to_dict() | {"num_labels": 2}
    model = BertForQuestionAnswering(BertConfig(**config)).eval()
    batch = tiny.batch(model)
    labels = torch.tensor([[1, 2], [0, 0], [3, 6]])
    found = objective_for("question-answering").loss(model, batch | {"labels": labels})
    theirs = model(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    torch.testing.assert_close(found.total / found.targets, theirs)
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items()}  # padding is no place
    padded = objective_for("question-answering").loss(model, longer | {"labels": labels})
    torch.testing.assert_close(padded.total, found.total)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("data", {"truncate": True}, "windows"),
        ("train", {"label_smoothing": 0.1}, "label_smoothing"),
        ("train", {"best_metric": "accuracy"}, "accuracy"),
    ],
)
def test_what_would_do_nothing_is_refused(document, section, change, said):
    with pytest.raises(ValueError, match=said):
        train(document | {section: document[section] | change})


def test_the_stride_belongs_to_questions(document):
    with pytest.raises(RecipeError, match=r"data\.stride belongs to"):
        train(document | {"task": "causal-lm", "train": {}})
