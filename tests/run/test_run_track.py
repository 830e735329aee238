"""Trackers through accelerate's classes: what they are sent, and what happens where they are missing or break."""

import accelerate.tracking
import pytest
import runs

from lorakit.errors import RecipeError
from lorakit.run import track
from lorakit.run.train import train


class Fake:
    def __init__(self, *names, **options):
        self.names, self.options, self.calls = names, options, []
        Fake.made.append(self)

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        self.calls.append((step, values))
        if len(self.calls) == Fake.breaks:
            raise ConnectionError("no route")

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def fake(monkeypatch):
    Fake.made, Fake.breaks = [], None
    monkeypatch.setattr(accelerate.tracking, "TensorBoardTracker", Fake)
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Fake)
    monkeypatch.setattr(track, "_available", lambda name: True)
    return Fake


def test_a_tracker_is_sent_every_row(recipe, fake):
    result = train(recipe(train={"trackers": ["tensorboard", "wandb"]}))
    rows = runs.read_rows(result.folder / "metrics.jsonl")
    for one in fake.made:
        assert one.calls[0] == "start"
        assert one.calls[-1] == "finish"
        assert [step for step, _ in one.calls[1:-1]] == [row["step"] for row in rows]
        assert [values.get("eval_loss") for _, values in one.calls[1:-1]] == [row.get("eval_loss") for row in rows]
        assert one.settings["train.lr"] == 5e-3
        assert one.settings["method.target_modules"] == "['q_proj', 'v_proj']"
        assert all(isinstance(value, bool | int | float | str) for value in one.settings.values())
    assert fake.made[0].names == ("tensorboard", result.folder)
    assert (fake.made[1].names, fake.made[1].options) == (("lorakit",), {"name": "run"})


def test_a_tracker_that_breaks_does_not_end_the_run(recipe, fake):
    fake.breaks = 3
    said = []

    class Listening(train.__globals__["Listener"]):
        def note(self, text):
            said.append(text)

    result = train(recipe(train={"trackers": ["wandb"]}), listener=Listening())
    assert len(fake.made[0].calls) == 3
    assert [text for text in said if "tracker wandb failed (no route)" in text]
    assert result.summary["steps"] == 6


def test_missing_and_unknown_trackers_are_told_before_anything_loads(recipe, monkeypatch):
    monkeypatch.setattr(track, "_available", lambda name: False)
    with pytest.raises(RecipeError, match="pip install tensorboard"):
        train(recipe(train={"trackers": ["tensorboard"]}))
    monkeypatch.setattr(track, "_available", lambda name: True)
    with pytest.raises(RecipeError, match="some of tensorboard, trackio, wandb, came 'aim'"):
        train(recipe(train={"trackers": ["aim"]}))
    with pytest.raises(RecipeError, match="twice"):
        train(recipe(train={"trackers": ["wandb", "wandb"]}))


def test_whether_a_package_is_there_is_asked_of_accelerate():
    from accelerate.utils import is_trackio_available

    assert track._available("trackio") == bool(is_trackio_available())
