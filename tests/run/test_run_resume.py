"""Stop anywhere, resume: the final adapter has the bytes of the uninterrupted run's, and the metrics the same rows."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import runs
import yaml

import lorakit as lk
from lorakit.errors import DataError, FileError, RecipeError, UsageError
from lorakit.run.listen import Listener


def adapter(folder):
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


class Interrupt(Listener):
    """Presses Ctrl-C when the row of a step comes: of training, or of evaluation."""

    def __init__(self, step, *, key="loss", times=1):
        self.step, self.key, self.times = step, key, times

    def row(self, row, total_steps):
        if row["step"] == self.step and self.key in row:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def whole(recipe, tmp_path):
    """whole(task, **train): the folder of the uninterrupted run, and the recipe of one to interrupt."""

    def make(task="causal-lm", **train):
        settings = {"epochs": 2, "eval_every": 2, **train}
        done = lk.train(recipe(task, train=settings, output=str(tmp_path / "whole")))
        return done, recipe(task, train=settings)

    return make


def check_same(done, folder):
    assert adapter(folder) == adapter(done.folder)
    assert runs.steps_of(folder / "metrics.jsonl") == runs.steps_of(done.folder / "metrics.jsonl")
    clock = {"seconds", "training_seconds", "tokens_per_second", "peak_memory_bytes"}
    ours, theirs = (json.loads((one / "summary.json").read_text()) for one in (folder, done.folder))
    assert {key: value for key, value in ours.items() if key not in clock} == {
        key: value for key, value in theirs.items() if key not in clock
    }


@pytest.mark.parametrize("step", [1, 3, 6, 11])
def test_interrupted_and_resumed(whole, step):
    done, document = whole()
    stopped = lk.train(document, listener=Interrupt(step))
    assert stopped.interrupted
    assert stopped.summary == {"step": step}
    assert not lk.inspect(stopped.folder / "adapter").faults
    assert not (stopped.folder / "summary.json").exists()
    assert adapter(stopped.folder) != adapter(done.folder)
    resumed = lk.train(document, resume=True)
    assert not resumed.interrupted
    check_same(done, resumed.folder)


@pytest.mark.parametrize(
    ("task", "train"),
    [
        ("sequence-classification", {"best_metric": "accuracy"}),
        ("seq2seq", {"keep": "last"}),
        ("causal-lm", {"accumulate": 2, "eval_every": 1, "lr": 0.05}),
        ("causal-lm", {"gradient_checkpointing": True, "group_by_length": False, "schedule": "cosine"}),
    ],
)
def test_other_settings_interrupted_twice(whole, task, train):
    done, document = whole(task, **train)
    lk.train(document, listener=Interrupt(2))
    lk.train(document, listener=Interrupt(4), resume=True)
    check_same(done, lk.train(document, resume=True).folder)


def test_interrupted_in_an_evaluation(whole):
    done, document = whole()
    assert lk.train(document, listener=Interrupt(4, key="eval_loss")).interrupted
    check_same(done, lk.train(document, resume=True).folder)


def test_ctrl_c_in_the_last_step_is_a_finished_run(whole):
    done, document = whole()
    assert not lk.train(document, listener=Interrupt(12)).interrupted
    check_same(done, Path(document["output"]))


def test_a_second_ctrl_c_breaks_off_at_once(recipe):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lk.train(recipe(), listener=Interrupt(2, times=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_may_be_resumed_and_stays_the_same(whole):
    done, document = whole()
    first = lk.train(document)
    again = lk.train(document, resume=True)
    assert again.summary["steps"] == 12
    check_same(done, first.folder)


def test_a_longer_run_goes_on_from_the_last_adapter_not_the_best(recipe):
    """With a constant rate, 1 epoch and another is 2 epochs, though the best adapter stood in place in between."""
    constant = {"schedule": "constant", "warmup": 0, "lr": 0.05, "keep": "best"}
    document = recipe(train={**constant, "epochs": 1})
    lk.train(document)
    longer = lk.train(recipe(train={**constant, "epochs": 2}), resume=True)
    assert yaml.safe_load((longer.folder / "recipe.yaml").read_text())["train"]["epochs"] == 2
    rows = runs.steps_of(longer.folder / "metrics.jsonl")
    lk.train(recipe(train={**constant, "epochs": 2}), overwrite=True)
    assert rows == runs.steps_of(longer.folder / "metrics.jsonl")


SCRIPT = textwrap.dedent(
    """
    import sys, time
    import lorakit as lk
    from lorakit.run.listen import Listener

    class Slow(Listener):
        def row(self, row, total_steps):
            time.sleep(0.05)
            print(row["step"], flush=True)

    lk.train(sys.argv[1], listener=Slow())
    """
)


def test_killed_and_resumed(whole, tmp_path):
    done, document = whole(save_every=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    victim = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)
    for line in victim.stdout:
        if int(line) == 7:
            victim.send_signal(signal.SIGKILL)
            break
    victim.wait()
    victim.stdout.close()
    metrics = Path(document["output"]) / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 8, "lo')  # a line torn by the crash
    check_same(done, lk.train(path, resume=True).folder)


# -- what cannot go on


@pytest.fixture
def stopped(recipe):
    document = recipe()
    lk.train(document, listener=Interrupt(2))
    return document


def test_another_recipe_cannot_go_on(recipe, stopped):
    other = recipe(method={"r": 8}, train={"lr": 1e-5})
    with pytest.raises(RecipeError, match=r"(?s)method\.r: 4 there, 8 now.*train\.lr: 0\.005 there, 1e-05 now"):
        lk.train(other, resume=True)


def test_other_data_cannot_go_on(stopped):
    path = Path(stopped["data"]["train"])
    path.write_text(path.read_text().replace("red", "blue"))
    with pytest.raises(DataError, match="not the rows that the run began with"):
        lk.train(stopped, resume=True)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}" * 40])
def test_a_damaged_checkpoint(stopped, damage):
    path = Path(stopped["output"]) / "checkpoints" / "last" / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    before = adapter(stopped["output"])
    with pytest.raises(FileError, match=r"checkpoint in .* cannot be read"):
        lk.train(stopped, resume=True)
    assert adapter(stopped["output"]) == before


def test_a_checkpoint_of_another_model(stopped):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(stopped["output"]) / "checkpoints" / "last" / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, notes = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["parameter.0"] = tensors["parameter.0"][:1].clone()
    del tensors["parameter.3"]
    save_file(tensors, path, notes)
    with pytest.raises(FileError) as caught:
        lk.train(stopped, resume=True)
    assert caught.value.faults == [
        "parameter 0: (1, 32) in the checkpoint, (4, 32) in the model",
        "parameter 3 is missing",
    ]


def test_a_lost_start(stopped):
    (Path(stopped["output"]) / "checkpoints" / "start.json").unlink()
    with pytest.raises(FileError, match=r"start\.json cannot be read"):
        lk.train(stopped, resume=True)


def test_a_new_run_over_a_stopped_one_is_refused(stopped):
    with pytest.raises(lk.LorakitError, match="--resume"):
        lk.train(stopped)
    with pytest.raises(UsageError, match="no checkpoint"):
        lk.train({**stopped, "output": stopped["output"] + "-other"}, resume=True)


def test_a_nan_after_resuming_names_its_step(recipe):
    """The first step of a resumed run has no step of its own before it to fall back to."""
    document = recipe(data={"eval": None}, train={"epochs": 2})
    mean = lambda model, batch: model(**batch).loss  # noqa: E731
    lk.train(document, loss=mean, listener=Interrupt(3))
    before = adapter(document["output"])
    with pytest.raises(lk.LorakitError, match="loss is nan at step 4"):
        lk.train(document, loss=lambda model, batch: mean(model, batch) * float("nan"), resume=True)
    assert adapter(document["output"]) == before
