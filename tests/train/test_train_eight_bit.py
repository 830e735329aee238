"""The 8-bit optimizer: its size, its nearness to AdamW, its state in a checkpoint."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

from lorakit.errors import FileError, UsageError
from lorakit.train.config import TrainConfig
from lorakit.train.flat import FlatParameters
from lorakit.train.loop import Hooks
from lorakit.train.optimizer import optimizer_for, set_rate, state_of
from lorakit.train.state import FILE

pytest.importorskip("torchao")
CONFIG = TrainConfig(max_steps=6, epochs=9, batch_size=4, lr=1e-2, optimizer="adamw8bit")


def wide():
    """Large enough for an adapter whose state is kept in blocks."""
    return tiny.llama(hidden_size=128, intermediate_size=192)


def size(optimizer, flat):
    return sum(one.numel() * one.element_size() for one in state_of(optimizer, flat).values())


def test_state_takes_a_quarter():
    sizes, values = {}, {}
    for name in ("adamw", "adamw8bit"):
        draw = torch.Generator().manual_seed(0)
        ours = [nn.Parameter(torch.randn(8, 700, generator=draw)) for _ in range(40)]
        flat = FlatParameters(ours, {id(one): 16.0 for one in ours[::2]})
        optimizer = optimizer_for(TrainConfig(optimizer=name), flat)
        before = [one.detach().clone() for one in ours]
        for _ in range(5):
            set_rate(optimizer, 1e-3)
            for one in ours:
                one.grad.copy_(torch.randn(one.shape, generator=draw) * 0.01)
            optimizer.step()
        sizes[name] = size(optimizer, flat)
        values[name] = torch.cat([(one - other).flatten() for one, other in zip(ours, before, strict=True)]).detach()
    assert sizes["adamw"] >= 40 * 8 * 700 * 8
    assert sizes["adamw8bit"] <= 0.3 * sizes["adamw"]
    assert sizes["adamw8bit"] >= 0.2 * sizes["adamw"]
    exact, near = values["adamw"], values["adamw8bit"]
    assert (near - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(near, exact)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_stopped_and_resumed_to_the_same_bytes(make_trainer, tmp_path, optimizer):
    config = TrainConfig(max_steps=6, epochs=9, batch_size=4, lr=1e-2, clip=0.5, optimizer=optimizer)
    whole = make_trainer(config, dropout=0.1, model=wide())
    whole.run()
    kept = state_of(whole._inner, whole.flat)
    assert any("codes" in key for key in kept) == (optimizer == "adamw8bit")
    first = make_trainer(config, dropout=0.1, model=wide())

    def stop(row):
        if row["step"] == 3:
            first.save(tmp_path)
            first.asked_to_stop = True

    first.hooks = Hooks(row=stop)
    assert first.run().step == 3
    again = make_trainer(config, dropout=0.1, model=wide())
    again.load(tmp_path)
    again.run()
    for one, other in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_state_of_the_other_optimizer_is_refused_before_anything_changes(make_trainer, tmp_path):
    trainer = make_trainer(CONFIG, model=wide())
    trainer.run()
    trainer.save(tmp_path)
    assert any("codes" in key for key in state_of(trainer._inner, trainer.flat))
    other = make_trainer(replace(CONFIG, optimizer="adamw"), model=wide())
    before = [one.detach().clone() for one in other.parameters]
    with pytest.raises(FileError, match="is of another optimizer"):
        other.load(tmp_path)
    assert all(torch.equal(one, was) for one, was in zip(other.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("optimizer.0.exp_avg.scale", None, "optimizer state 0.exp_avg is missing"),
        (
            "optimizer.0.exp_avg_sq.scale",
            lambda one: one[1:].clone(),
            r"0.exp_avg_sq.scale: \(\d+,\) in the checkpoint",
        ),
        ("optimizer.0.exp_avg.codes", lambda one: one[:9].clone(), r"0.exp_avg.codes: \(9,\) in the checkpoint"),
        ("optimizer.7.step", lambda one: torch.zeros(()), "optimizer state 7.step is of another optimizer"),
    ],
)
def test_a_damaged_state_is_told_whole(make_trainer, tmp_path, key, change, message):
    from safetensors.torch import load_file, save_file

    trainer = make_trainer(replace(CONFIG, max_steps=1), model=wide())
    trainer.run()
    trainer.save(tmp_path)
    path = tmp_path / FILE
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    held = load_file(path)
    one = held.pop(key, None)
    save_file(held if change is None else {**held, key: change(one)}, path, notes)
    with pytest.raises(FileError, match=message):
        make_trainer(CONFIG, model=wide()).load(tmp_path)


def test_without_torchao(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"adamw8bit needs torchao, which is not installed.*lorakit\[quantized\]"):
        make_trainer(CONFIG)


def test_an_unknown_optimizer():
    with pytest.raises(UsageError, match=r"train.optimizer must be one of adamw, adamw8bit, not 'adam'"):
        TrainConfig(optimizer="adam")
