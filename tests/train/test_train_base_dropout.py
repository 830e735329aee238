"""The base's own dropout in training on a CPU: by lorakit's masks inside a step, by torch's everywhere else."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.core import kernels
from lorakit.train import base_dropout
from lorakit.train.base_dropout import BaseDropout
from lorakit.train.config import TrainConfig

DROPS = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.2},
}


def attached(family, attention="sdpa"):
    """A tiny model that drops as its pretrained relatives do, with an adapter that is not zero."""
    like = getattr(tiny, family)()
    config = like.config
    for key, value in DROPS[family].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = type(like)(config)
    model.config._attn_implementation = attention
    lk.attach(model, lk.LoRA(r=4), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.train()


def step(model, inputs, seed):
    """(loss, gradients) of one pass whose masks come of `seed`."""
    torch.manual_seed(seed)
    loss = model(**inputs).logits.square().mean()
    loss.backward()
    grads = [parameter.grad.clone() for parameter in lk.parameters(model, "default")]
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@pytest.fixture
def seen(monkeypatch):
    """How often each of ours ran."""
    counts = {"dropped": 0, "attention": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(base_dropout, "dropped", counted("dropped", base_dropout.dropped))
    monkeypatch.setattr(base_dropout, "dropped_attention", counted("attention", base_dropout.dropped_attention))
    return counts


@pytest.mark.parametrize("family", DROPS)
def test_the_law_is_that_of_torchs_dropout(family, seen):
    model, rounds = attached(family), 300
    inputs, own = tiny.batch(model), BaseDropout(model)
    with torch.no_grad():
        theirs = torch.stack([model(**inputs).logits for _ in range(rounds)])
        assert seen == {"dropped": 0, "attention": 0}
        with own.drawing():
            ours = torch.stack([model(**inputs).logits for _ in range(rounds)])
    drops = sum(isinstance(one, nn.Dropout) for one in model.modules())
    layers = model.config.num_hidden_layers
    assert seen == {
        "dropped": (drops - layers) * rounds,
        "attention": layers * rounds,
    }  # attention's own is in its product
    spread = (ours.var(0) + theirs.var(0)).div(rounds).sqrt()
    assert float(((ours.mean(0) - theirs.mean(0)) / spread).abs().max()) < 5
    assert float(ours.std(0).mean() / theirs.std(0).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("family", DROPS)
def test_outside_of_a_step_the_bits_are_torchs(family):
    model, plain = attached(family), attached(family)
    inputs, own = tiny.batch(model), BaseDropout(model)
    with own.drawing():
        ours = step(model, inputs, 7)
    expected = step(plain, inputs, 7)
    assert not torch.equal(ours[0], expected[0])  # other masks of the same law
    again = step(model, inputs, 7)
    assert torch.equal(again[0], expected[0])
    for one, other in zip(again[1], expected[1], strict=True):
        assert torch.equal(one, other)
    assert not any("forward" in one.__dict__ for one in model.modules() if isinstance(one, nn.Dropout))


@pytest.mark.parametrize("family", DROPS)
def test_evaluation_is_untouched(family):
    model = attached(family).eval()
    inputs = tiny.batch(model)
    expected = model(**inputs).logits
    with BaseDropout(model).drawing():
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", DROPS)
def test_a_checkpoint_draws_the_same_again(family, reentrant, seen):
    model, same = attached(family), attached(family)
    inputs = tiny.batch(model)
    with BaseDropout(model).drawing():
        expected = step(model, inputs, 9)
    once = dict(seen)
    same.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same.enable_input_require_grads()
    with BaseDropout(same).drawing():
        found = step(same, inputs, 9)
    assert seen["attention"] == 3 * once["attention"]  # forward, and again in backward
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other)


def test_eager_attention_and_the_reference_keep_their_own(seen, monkeypatch):
    eager = attached("bert", attention="eager")
    with BaseDropout(eager).drawing():
        step(eager, tiny.batch(eager), 1)
    assert seen["attention"] == 0 < seen["dropped"]
    monkeypatch.setattr(kernels, "fused", False)
    model, plain = attached("bert"), attached("bert")
    with BaseDropout(model).drawing():
        ours = step(model, tiny.batch(model), 1)
    assert torch.equal(ours[0], step(plain, tiny.batch(plain), 1)[0])


def test_a_trainers_step_draws_so(make_trainer, monkeypatch):
    trainer = make_trainer(TrainConfig(epochs=1.0))
    entered = []
    own = trainer.base_dropout.drawing

    def drawing():
        entered.append(True)
        return own()

    monkeypatch.setattr(trainer.base_dropout, "drawing", drawing)
    trainer.run()
    assert len(entered) == trainer.state.step > 0
