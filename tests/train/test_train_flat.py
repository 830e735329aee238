"""Trained tensors in one buffer: the same steps as torch's AdamW takes on each, the same objects, nothing left behind."""

import copy

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import UsageError
from lorakit.train.config import TrainConfig
from lorakit.train.flat import ALIGN, LARGEST, FlatParameters
from lorakit.train.loop import Hooks
from lorakit.train.optimizer import optimizer_for, set_rate

SHAPES = [(4, 32), (32,), (3, 5, 7), (1,), (40, 40)]


def tensors(dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_torchs_on_each_tensor(clip, decay):
    """Against AdamW and clip_grad_norm_ on the separate tensors in float64, with two learning rates."""
    ours, theirs = tensors(), tensors(torch.float64)
    rates = {id(ours[1]): 16.0, id(ours[3]): 16.0}
    config = TrainConfig(lr=1e-2, weight_decay=decay)
    flat = FlatParameters(ours, rates)
    optimizer = optimizer_for(config, flat)
    assert len(flat.held) == 2
    groups = [{"params": [theirs[i] for i in (0, 2, 4)]}, {"params": [theirs[i] for i in (1, 3)]}]
    plain = torch.optim.AdamW(groups, weight_decay=decay, foreach=False)
    draw = torch.Generator().manual_seed(0)
    for step in range(8):
        rate = 1e-2 / (step + 1)
        for one, other in zip(ours, theirs, strict=True):
            grad = torch.randn(one.shape, generator=draw) * (step + 0.1)
            one.grad.add_(grad)
            other.grad = grad.double()
        flat.gather()
        norm = flat.clip(clip)
        expected = nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        assert norm == pytest.approx(float(expected), rel=1e-6)
        set_rate(optimizer, rate)
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = rate, 16 * rate
        optimizer.step()
        plain.step()
        flat.updated()
        assert all(not one.grad.any() for one in ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_the_norm_of_millions_is_exact():
    one = nn.Parameter(torch.zeros(LARGEST))
    flat = FlatParameters([one, nn.Parameter(torch.zeros(3 * LARGEST))], {})
    grads = [torch.randn(held.shape, generator=torch.Generator().manual_seed(1)) * 1e-3 for held in flat.held]
    for held, grad in zip(flat.held, grads, strict=True):
        held.grad = grad
    expected = torch.cat([grad.double() for grad in grads]).norm()
    assert flat.clip(None) == pytest.approx(float(expected), rel=1e-6)


def test_what_does_not_fit_stays_apart():
    whole = torch.randn(8, 8)
    tied = [nn.Parameter(whole.view(-1)[:32]), nn.Parameter(whole.view(-1)[32:])]
    across, large, small = nn.Parameter(torch.randn(4, 6).t()), nn.Parameter(torch.zeros(LARGEST + 1)), tensors()[0]
    flat = FlatParameters([*tied, across, large, small], {})
    assert [one is other for one, other in zip(flat.held[1:], [*tied, across, large], strict=True)] == [True] * 4
    assert flat.held[0].shape == (ALIGN,)
    tied[0].data[0] = 9.0
    assert whole[0, 0] == 9.0
    mixed = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3).bfloat16())]
    assert [one.dtype for one in FlatParameters(mixed, {}).held] == [torch.float32, torch.bfloat16]


def test_gradients_and_values_set_by_others_are_brought_in():
    ours = tensors()
    flat = FlatParameters(ours, {})
    ours[0].grad.fill_(5.0)
    ours[0].grad = None
    ours[1].grad = torch.full((32,), 2.0)
    ours[2].data = torch.ones(3, 5, 7)
    flat.gather()
    assert not ours[0].grad.any()
    assert flat.held[0].grad.sum() == 64
    assert ours[2].data_ptr() != 0
    total = float(sum(one.detach().sum() for one in ours))
    assert float(flat.held[0].detach().sum()) == pytest.approx(total, abs=1e-3)
    ours[4].data = ours[4].data.double()
    with pytest.raises(UsageError, match=r"torch.float32 on cpu and is torch.float64 on cpu"):
        flat.gather()


def test_a_forward_that_is_not_over_notices_the_update():
    """The buffer is written, not the parameter: without its version raised autograd would go back through new values."""
    ours = tensors()
    flat = FlatParameters(ours, {})
    optimizer = optimizer_for(TrainConfig(), flat)
    loss = (ours[0] * ours[0]).sum()
    ours[0].grad.add_(1.0)
    optimizer.step()
    flat.updated()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_release_gives_each_its_own_storage_and_bind_takes_it_back():
    ours = tensors()
    before = [one.detach().clone() for one in ours]
    flat = FlatParameters(ours, {})
    assert len({one.untyped_storage().data_ptr() for one in ours}) == 1
    kept = flat.copy()
    flat.release()
    assert all(one.untyped_storage().nbytes() == one.numel() * 4 and one.grad is None for one in ours)
    assert all(torch.equal(one, other) for one, other in zip(ours, before, strict=True))
    ours[0].data.add_(1.0)
    flat.bind()
    assert torch.equal(ours[0], before[0] + 1)
    flat.restore(kept)
    assert all(torch.equal(one, other) for one, other in zip(ours, before, strict=True))


def test_in_the_midst_of_training_all_of_lorakit_works(make_trainer, rows, tmp_path):
    """Switching, saving, loading, copying and another adapter between steps: the steps are what they are without."""
    quiet = make_trainer(TrainConfig(max_steps=5, epochs=9, batch_size=4, lr=1e-2))
    quiet.run()
    seen = []
    trainer = make_trainer(TrainConfig(max_steps=5, epochs=9, batch_size=4, lr=1e-2))
    model, first = trainer.model, list(trainer.parameters)

    def between(row):
        number = len(seen)
        with lk.use(model, None):
            model(**tiny.batch(model))
        lk.save(model, tmp_path / str(number), name="default")
        lk.load(model, tmp_path / str(number), name="copy")
        batch = tiny.batch(model)
        with torch.no_grad(), lk.use(model, "default"):
            logits = model(**batch).logits
            twin = copy.deepcopy(model)(**batch).logits
            model.to("cpu")
        with torch.no_grad(), lk.use(model, "copy"):
            seen.append((logits, twin, model(**batch).logits))
        lk.use(model, "default")
        lk.detach(model, "copy")

    trainer.hooks = Hooks(row=between)
    trainer.run()
    assert len(seen) == 5
    for logits, twin, loaded in seen:
        assert torch.equal(logits, twin)
        assert torch.equal(logits, loaded)
    assert not torch.equal(seen[0][0], seen[4][0])
    after = lk.parameters(model, "default")
    assert all(one is other for one, other in zip(first, after, strict=True))
    for one, other in zip(after, quiet.parameters, strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
    lk.detach(model, "default")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny.llama().state_dict().values(), strict=True)
    )
