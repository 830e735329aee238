"""Measuring in a run: larger batches, the last block pruned, the same figures; nothing said where nothing is gained."""

import pytest
import runs

import lorakit as lk
from lorakit.data import Encoded
from lorakit.run.batches import EncodedBatches
from lorakit.run.listen import Listener
from lorakit.train import prune


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def evaluations(folder):
    return [row for row in runs.read_rows(folder / "metrics.jsonl") if "eval_loss" in row]


def test_evaluation_batches_hold_every_row_once_and_no_more_than_training_may():
    lengths = [3, 4, 40, 5, 6, 3, 4, 5, 38, 3]
    rows = [Encoded([7] * length, [7] * length, number) for number, length in enumerate(lengths)]

    def batches(most):
        return EncodedBatches(rows, task="causal-lm", pad_id=0, batch_size=2, seed=0, pass_tokens=most)

    made = list(batches(8192).evaluation())
    assert sorted(int(n) for batch in made for n in batch["attention_mask"].sum(1)) == sorted(lengths)
    assert max(batch["input_ids"].numel() for batch in made) <= 2 * 40
    assert len(made) == 2
    assert max(batch["input_ids"].numel() for batch in batches(45).evaluation()) <= 45


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "seq2seq"])
def test_the_figures_are_those_of_one_row_a_batch(recipe, task, monkeypatch):
    document = recipe(task, train={"max_steps": 3, "eval_every": 1, "keep": "last"})
    first = evaluations(lk.train(document).folder)
    monkeypatch.setattr(EncodedBatches, "evaluation", lambda self: (self._batch([n]) for n in range(len(self.rows))))
    second = evaluations(lk.train(document, overwrite=True).folder)
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-5)


def test_accuracy_is_measured_with_the_last_block_pruned(recipe, monkeypatch):
    entered = []
    before = prune._pruned
    monkeypatch.setattr(prune, "_pruned", lambda *args, **kwargs: entered.append(1) or before(*args, **kwargs))
    run = lk.train(recipe("sequence-classification", train={"max_steps": 1, "eval_every": 1, "packing": False}))
    assert len(entered) > 2
    assert "forward" not in run.model.__dict__


def test_nothing_is_said_of_packing_that_gains_nothing(recipe, tmp_path):
    even = [{"prompt": f"a{number} >", "completion": " b"} for number in range(8)]
    for rows, told in ((even, False), (runs.text_rows(24, 1), True)):
        data = {"train": runs.write_rows(tmp_path / "rows.jsonl", rows), "eval": None}
        heard = Notes()
        lk.train(recipe(data=data, train={"max_steps": 1}, evaluate={"samples": 0}), listener=heard, overwrite=True)
        assert any("rows are packed" in note for note in heard.notes) == told
