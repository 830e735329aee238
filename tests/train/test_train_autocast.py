"""The chunked loss under autocast, against the loss that autograd takes from half-precision logits."""

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.core import cross_entropy, kernels
from lorakit.core.cross_entropy import GroupedCrossEntropy, head_cross_entropy
from lorakit.train.config import TrainConfig
from lorakit.train.loss import objective_for


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_a_linear_layer_under_autocast(weight, smoothing, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 5)
    monkeypatch.setattr(cross_entropy, "PIECE", 20)
    draw = torch.Generator().manual_seed(0)
    W, bias = torch.randn(50, 24, generator=draw).to(weight), torch.randn(50, generator=draw)
    labels = torch.randint(0, 50, (13,), generator=draw)
    hidden = [torch.randn(13, 24, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_cross_entropy(hidden[0], W, bias, labels, smoothing)
        logits = nn.functional.linear(hidden[1], W, bias.to(W.dtype))
        assert logits.dtype == torch.bfloat16
        plain = nn.functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    assert ours.dtype == torch.float32
    ours.backward()
    plain.backward()
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-2)
    exact = hidden[0].detach().double().requires_grad_()
    logits = exact @ W.double().t() + bias.double()
    nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing).backward()
    error, allowed = ((one.grad.double() - exact.grad).norm() / exact.grad.norm() for one in hidden)
    assert hidden[0].grad.dtype == torch.float32
    assert error < 1.5 * allowed + 1e-3 < 0.05


@pytest.mark.filterwarnings("ignore:this CPU has no bf16 arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_run_takes_its_loss_in_chunks(make_trainer, monkeypatch, dtype):
    """And learns what one does whose loss comes from the model's logits."""
    calls, found = [], []
    forward = GroupedCrossEntropy.forward

    def counted(ctx, hidden, *rest):
        calls.append(hidden.dtype)
        return forward(ctx, hidden, *rest)

    monkeypatch.setattr(GroupedCrossEntropy, "forward", staticmethod(counted))
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fused", fused)
        model = tiny.llama().to(dtype)
        config = TrainConfig(max_steps=3, epochs=9, batch_size=4, lr=1e-2, precision="bf16")
        trainer = make_trainer(config, model=model)
        before = dict(model.__dict__)
        losses = []
        trainer.hooks.row = lambda row, losses=losses: losses.append(row["loss"])
        trainer.run()
        assert model.__dict__.keys() == before.keys()
        assert not torch.is_autocast_enabled("cpu")
        found.append(losses)
    assert calls == [torch.bfloat16] * 3
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert found[0][-1] < found[0][0] + 0.5


def test_the_head_that_carries_an_adapter_under_autocast():
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=3, target_modules=["lm_head", "q_proj"]), name="a")
    batch = tiny.batch(model, labels=True)
    with torch.autocast("cpu", torch.bfloat16):
        part = objective_for("causal-lm").loss(model, batch)
    with torch.no_grad():
        expected = model(**batch).loss
    assert float(part.total.detach()) / part.targets == pytest.approx(float(expected), rel=1e-2)
    part.total.backward()
    assert all(one.grad is not None for one in lk.parameters(model, "a"))
