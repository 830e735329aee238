"""The sides of `lorakit bench train` learn the same from the same batches; every figure is there."""

import importlib.util
import math

import pytest
import torch

from lorakit.bench.config import ROWS, BenchConfig
from lorakit.bench.material import UNMEASURED, read, work_of
from lorakit.bench.memory import peak_above_model
from lorakit.bench.sides import side_of
from lorakit.bench.train import bench_train
from lorakit.errors import DataError, TrainingError, UsageError
from lorakit.train.loop import Trainer


def config(folders, model="llama", **changes):
    values = {"batch": 2, "length": 12, "rounds": 2, "memory": False, "lr": 1e-2}
    return BenchConfig(model=folders[model], **(values | changes))


def sides(report):
    return {row.name: {side.name: side for side in row.sides} for row in report.rows}


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_every_row_of_a_language_model(folders, model):
    wanted = config(folders, model, data=folders["texts"], batch_tokens=160)
    report = bench_train(wanted)
    assert [row.name for row in report.rows] == list(ROWS)
    found = sides(report)
    for row in report.rows:
        assert [side.name for side in row.sides] == list(ROWS[row.name].sides)
        assert row.padding >= 1
        for side in row.sides:
            assert side.seconds.least <= side.seconds.median <= side.seconds.most
            assert min(side.seconds.least, side.step_seconds, side.tokens_per_second, side.over.least) > 0
            assert side.gradients.smallest > 0
            assert math.isfinite(side.loss)
            assert (side.final_loss is None) == (side.name in ("floor", "ceiling"))
        assert row.sides[0].over.median == 1
    for name in ("equal", "masked", "upper", "upper-masked", "real"):  # the same examples in each step
        ours, theirs = found[name]["lorakit"], found[name]["peft"]
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4), name
        assert ours.final_loss == pytest.approx(theirs.final_loss, abs=1e-4), name
        assert ours.trainable == theirs.trainable, name
        assert ours.gradients.tensors == theirs.gradients.tensors, name
        assert ours.gradients.total == pytest.approx(theirs.gradients.total, rel=1e-3), name
    assert found["full"]["full"].trainable == report.parameters
    assert found["dropout"]["lorakit"].loss != found["dropout"]["lorakit, dropout 0"].loss
    assert found["free"]["lorakit"].steps < found["free"]["peft"].steps == 16


def test_every_row_of_a_classifier(folders):
    found = sides(bench_train(config(folders, "bert", data=folders["labels"], batch=3)))
    assert "masked" not in found
    assert {"equal", "upper", "real", "free"} <= set(found)
    for name in ("equal", "upper", "real"):
        ours, theirs = found[name]["lorakit"], found[name]["peft"]
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4), name
        assert ours.final_loss == pytest.approx(theirs.final_loss, abs=1e-4), name


def test_learning_shows_after_the_rounds(folders):
    """The loss at the end is that of what was trained, not of the base: it falls with the steps, on both sides alike."""
    few, many = (
        sides(bench_train(config(folders, rows=["upper"], rounds=rounds, lr=3e-2)))["upper"] for rounds in (1, 12)
    )
    for side in ("lorakit", "peft"):
        assert many[side].final_loss < few[side].final_loss - 0.05


def test_ceiling_is_the_model_without_adapters(folders):
    """The kept states give the base's own loss; only the upper layer is run again."""
    work = work_of(ROWS["upper"], read(config(folders)))
    ceiling = side_of("ceiling", work)
    batch = work.padded(work.rounds[0])
    with torch.no_grad():
        wanted = float(work.material.loaded.model(**batch).loss)
    calls = []
    lower = ceiling.model.model.layers[0].mlp
    lower.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        ceiling.round(work.rounds[0])
        assert ceiling.loss == pytest.approx(wanted, abs=1e-5)
    assert len(calls) == 1


def test_floor_has_the_bases_loss_and_trains_nothing(folders):
    work = work_of(ROWS["floor"], read(config(folders)))
    floor = side_of("floor", work)
    norms = floor.checked_round(work.rounds[0])
    batch = work.padded(work.rounds[0])
    assert floor.loss == pytest.approx(float(work.material.loaded.model(**batch).loss.detach()), abs=1e-5)
    assert norms.total > 0
    assert all(parameter.grad is None for parameter in floor.model.parameters())


def test_sides_leave_the_shared_base_alone(folders):
    material = read(config(folders))
    before = {key: value.clone() for key, value in material.loaded.model.state_dict().items()}
    for row in ("equal", "full"):
        work = work_of(ROWS[row], material)
        for name in ROWS[row].sides:
            side = side_of(name, work)
            for numbers in work.rounds:
                side.round(numbers)
    after = material.loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_masked_part_carries_no_loss(folders):
    work = work_of(ROWS["masked"], read(config(folders, masked=0.25, length=16)))
    labels = work.padded(work.rounds[0])["labels"]
    assert (labels[:, :4] == -100).all()
    assert (labels[:, 4:] != -100).all()


def test_real_rounds_hold_each_example_once(folders):
    work = work_of(ROWS["free"], read(config(folders, data=folders["texts"])))
    numbers = [number for one in work.rounds for number in one]
    assert len(numbers) == len(set(numbers)) == 2 * UNMEASURED + 2 * 2 * 16
    assert not set(numbers) & set(work.checked)


def test_a_gradient_that_is_missing_fails(folders, monkeypatch):
    step = Trainer._backward

    def without(self, group, rate):
        loss = step(self, group, rate)
        self.parameters[3].grad = None  # a B: it stays zero, so its A gets none either
        return loss

    monkeypatch.setattr(Trainer, "_backward", without)
    with pytest.raises(TrainingError, match="2 of 28 trained tensors have a gradient that is missing"):
        bench_train(config(folders, rows=["equal"]))


def test_memory_is_measured_in_a_process_of_its_own(folders):
    wanted = config(folders, rows=["equal"], length=48, batch=64)
    logits = 64 * 48 * 99 * 4
    assert logits < peak_above_model(wanted, "equal", "peft") < 2**31


def test_without_peft_the_rows_that_need_it_are_named(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(UsageError, match=r"equal measure PEFT, which is not installed.*--rows floor,full,dropout"):
        bench_train(config(folders, rows=["equal"]))
    assert [row.name for row in bench_train(config(folders, rows=["floor"])).rows] == ["floor"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["eqal"]}, "row 'eqal' is unknown"),
        ({"rows": ["real"]}, "name a data set"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"masked": 1.0}, "masked must be in"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_a_wrong_config_is_refused_at_once(changes, message):
    with pytest.raises(UsageError, match=message):
        BenchConfig(**changes)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("llama", {"length": 65}, "length must be at most 64"),
        ("llama", {"layers": "2"}, "numbers from 0 to 1"),
        ("llama", {"layers": "top"}, "expected upper-third or numbers"),
        ("llama", {"device": "cuda:7"}, "training takes cpu"),
        ("llama", {"task": "seq2seq"}, "task: expected one of"),
        ("bert", {"task": "sequence-classification", "rows": ["masked"]}, "this model classifies"),
        ("llama", {"overrides": ("train.lrr=1",)}, "did you mean 'lr'"),
    ],
)
def test_what_does_not_fit_the_model(folders, model, changes, message):
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("this machine has a GPU to train on")
    with pytest.raises(UsageError, match=message):
        bench_train(config(folders, model, **({"rows": ["equal"]} | changes)))


def test_too_few_examples_and_no_tokenizer(folders):
    with pytest.raises(UsageError, match=r"needs 68 examples.*gives 10"):
        bench_train(config(folders, data=folders["texts"], rows=["free"], limit=10))
    with pytest.raises(UsageError, match="has no tokenizer"):
        bench_train(BenchConfig(model="minilm", data=folders["labels"], rows=["real"]))
    with pytest.raises(DataError, match="no such file"):
        bench_train(config(folders, data="nowhere.jsonl"))
