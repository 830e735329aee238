"""lorakit and loralib (0.1.2) layer by layer: the same A and B give the same outputs unmerged, merged, unmerged again and
off, and training steps end in the same A and B. Where loralib raises or is wrong, float64 brute force is the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import pytest
import tiny
import torch
from parity_cases import Case, logits, peft_load, randomise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attach.host import host_of
from lorakit.attach.method import Pair

R, ALPHA, ROWS = 2, 3.0, 4
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **fields: Any) -> tuple[Holder, Pair]:
    """A copy of `layer` in a model with a lorakit adapter, and its pair."""
    model = Holder(copy.deepcopy(layer))
    lk.attach(model, lk.LoRA(**({"r": R, "alpha": ALPHA, "target_modules": ["layer"]} | fields)))
    return model, host_of(model).records["default"].draft.pairs["layer"]


def grown(layer: Any) -> Any:
    """A loralib layer in float64 with random factors, in training mode (which is where it isn't merged)."""
    layer = as_trained(layer.double())
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def as_trained(layer: Any, training: bool = True) -> Any:
    """loralib merges in `eval()` and takes the update out in `train()`; both return None."""
    layer.train(training)
    return layer


@torch.no_grad()
def in_all_states(theirs: Any, model: Holder, plain: nn.Module, x: Tensor) -> None:
    expected = as_trained(theirs)(x)
    before = model(x)
    torch.testing.assert_close(before, expected, **CLOSE)
    assert (before - plain(x)).abs().max() > 1e-2
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), as_trained(theirs, False)(x), **CLOSE)
    lk.unmerge(model)
    torch.testing.assert_close(model(x), as_trained(theirs)(x), **CLOSE)
    assert torch.equal(model(x), before)
    with lk.use(model, None):
        assert torch.equal(model(x), plain(x))


def trained_alike(theirs: Any, model: Holder, pair: Pair, x: Tensor, to_theirs: Any) -> None:
    """Three steps of SGD. to_theirs: (A, Bt) of the pair in loralib's shapes."""
    for one, parameters in ((as_trained(theirs), [theirs.lora_A, theirs.lora_B]), (model, [pair.A, pair.Bt])):
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            (one(x.roll(step, 0)) - 0.3).square().mean().backward()
            optimizer.step()
    A, B = to_theirs(pair)
    torch.testing.assert_close(A, theirs.lora_A, **CLOSE)
    torch.testing.assert_close(B, theirs.lora_B, **CLOSE)


def as_matrices(pair: Pair) -> tuple[Tensor, Tensor]:
    return pair.A, pair.Bt.t()


@pytest.mark.parametrize(("bias", "stored"), [(True, False), (False, False), (True, True)])
def test_linear(bias: bool, stored: bool) -> None:
    """stored: as (in, out), fan_in_fan_out there and Hugging Face's Conv1D here, which always has a bias."""
    theirs = grown(loralib.Linear(6, 9, r=R, lora_alpha=ALPHA, bias=bias, fan_in_fan_out=stored))
    plain = _plain(theirs, 6, 9, stored)
    model, pair = adapted(plain)
    with torch.no_grad():
        pair.A.copy_(theirs.lora_A)
        pair.Bt.copy_(theirs.lora_B.t())
    x = torch.randn(ROWS, 5, 6, dtype=torch.float64)
    in_all_states(theirs, model, plain, x)
    trained_alike(theirs, model, pair, x, as_matrices)


def _plain(theirs: Any, d_in: int, d_out: int, stored: bool) -> nn.Module:
    """The base layer with the weight and bias of a loralib layer."""
    bias = theirs.bias
    layer: Any = Conv1D(d_out, d_in) if stored else nn.Linear(d_in, d_out, bias=bias is not None)
    layer = layer.double().eval()
    with torch.no_grad():
        layer.weight.copy_(theirs.weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding(padding_idx: int | None) -> None:
    theirs = grown(loralib.Embedding(12, 5, r=R, lora_alpha=ALPHA, padding_idx=padding_idx))
    plain = nn.Embedding(12, 5, padding_idx=padding_idx).double()
    with torch.no_grad():
        plain.weight.copy_(theirs.weight)
    model, pair = adapted(plain)
    with torch.no_grad():
        pair.A.copy_(theirs.lora_A.t())
        pair.Bt.copy_(theirs.lora_B.t())
    x = torch.randint(0, 12, (ROWS, 7))
    x[0, 0] = 3
    in_all_states(theirs, model, plain, x)
    trained_alike(theirs, model, pair, x, lambda pair: (pair.A.t(), pair.Bt.t()))


PARTS = [[True, False, True], [False, True, False], [True, True, True], [True, False], [False, False, False, True]]


@pytest.mark.parametrize("stored", [False, True], ids=["out-in", "fan-in-fan-out"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_merged_linear(parts: list[bool], stored: bool) -> None:
    width = 12 * len(parts)
    theirs = grown(loralib.MergedLinear(6, width, r=R, lora_alpha=ALPHA, enable_lora=parts, fan_in_fan_out=stored))
    plain = _plain(theirs, 6, width, stored)
    model, pair = adapted(plain, enable_lora={"layer": parts})
    assert pair.A.shape == theirs.lora_A.shape
    assert pair.Bt.t().shape == theirs.lora_B.shape
    with torch.no_grad():
        pair.A.copy_(theirs.lora_A)
        pair.Bt.copy_(theirs.lora_B.t())
    x = torch.randn(ROWS, 5, 6, dtype=torch.float64)
    in_all_states(theirs, model, plain, x)
    trained_alike(theirs, model, pair, x, as_matrices)
    untouched = torch.tensor(parts).logical_not().repeat_interleave(12)
    with torch.no_grad():
        assert torch.equal(model(x)[..., untouched], plain(x)[..., untouched])


def test_a_fused_projection_without_a_part_is_refused_where_loralib_fails_in_forward() -> None:
    with pytest.raises(lk.errors.TargetError, match="at least one"):
        adapted(nn.Linear(6, 9), enable_lora={"layer": [False, False, False]})
    with pytest.raises(lk.errors.TargetError, match="equal parts"):
        adapted(nn.Linear(6, 10), enable_lora={"layer": [True, False, True]})
    with pytest.raises(lk.errors.TargetError, match="none of the adapted layers"):
        adapted(nn.Linear(6, 9), enable_lora={"other": [True, False, True]})


FUSED = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"h.0.attn.c_attn": 3}},
    "bias": {"lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape:UserWarning")
@pytest.mark.parametrize("name", FUSED)
def test_gpt2s_query_and_value_go_through_peft_route_and_merge(name: str, tmp_path: Path) -> None:
    fields = {"r": 2, "alpha": 3, "target_modules": ["c_attn", "c_fc"], "enable_lora": {"c_attn": [True, False, True]}}
    model = tiny.gpt2()
    base = logits(model)
    lk.attach(model, lk.LoRA(**fields, **FUSED[name]), name="a")
    assert torch.equal(logits(model), base)
    lk.attach(model, lk.LoRA(**fields, **FUSED[name]), name="b")
    for one in ("a", "b"):
        randomise(lk.parameters(model, one))
    lk.use(model, "a")
    expected, close = logits(model), {"atol": 1e-5, "rtol": 1e-5}
    assert (expected - base).abs().max() > 1e-3
    lk.save(model, tmp_path, "a")
    peft = Case("gpt2", {"r": 2, "target_modules": ["c_attn"]}, {"fan_in_fan_out": True})
    torch.testing.assert_close(logits(peft_load(peft, tmp_path)), expected, **close)  # blocks of zeros, of rank 2 r
    again = tiny.gpt2()
    lk.load(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, **close)
    with lk.route(model, ["b", None, "a"]):
        torch.testing.assert_close(logits(model)[2], expected[2], **close)
    lk.merge(model, "a")
    torch.testing.assert_close(logits(model), expected, **close)
    lk.unmerge(model)
    for one in ("a", "b"):
        lk.detach(model, one)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1, "bias": False}], ids=str)
def test_convolution_of_kernel_one(options: dict[str, Any]) -> None:
    theirs = grown(loralib.Conv2d(4, 6, 1, r=R, lora_alpha=ALPHA, **options))
    plain = nn.Conv2d(4, 6, 1, **options).double()
    plain.load_state_dict(theirs.conv.state_dict())
    model, pair = adapted(plain)
    with torch.no_grad():
        pair.A.copy_(theirs.lora_A[..., None, None])
        pair.Bt.copy_(theirs.lora_B.t())
    x = torch.randn(ROWS, 4, 5, 5, dtype=torch.float64)
    in_all_states(theirs, model, plain, x)
    trained_alike(theirs, model, pair, x, lambda pair: (pair.A.flatten(1), pair.Bt.t()))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_on_which_loralib_raises(dimensions: int) -> None:
    """Its A and B have the sides of a Conv2d whatever the convolution: the update cannot take the weight's shape."""
    broken = (loralib.Conv1d if dimensions == 1 else loralib.Conv3d)(4, 6, 3, r=R, lora_alpha=ALPHA)
    kind, function = {1: (nn.Conv1d, nn.functional.conv1d), 3: (nn.Conv3d, nn.functional.conv3d)}[dimensions]
    x = torch.randn(ROWS, 4, *[6] * dimensions, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        broken.double()(x)
    plain = kind(4, 6, 3).double()
    model, pair = adapted(plain)
    with torch.no_grad():
        pair.Bt.normal_()
    delta = torch.einsum("ro,ri...->oi...", pair.Bt, pair.A) * ALPHA / R
    expected = function(x, plain.weight + delta, plain.bias)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_an_embedding_with_max_norm_merges_to_what_it_computes() -> None:
    """loralib shortens W's rows and A's apart, so its merged and unmerged outputs differ; here the sum is shortened."""
    theirs = grown(loralib.Embedding(12, 5, r=R, lora_alpha=ALPHA, max_norm=1.0))
    plain = nn.Embedding(12, 5, max_norm=1.0).double()
    with torch.no_grad():
        plain.weight.copy_(theirs.weight)
    x = torch.randint(0, 12, (ROWS, 7))
    model, pair = adapted(plain)
    with torch.no_grad():
        pair.A.copy_(theirs.lora_A.t())
        pair.Bt.copy_(theirs.lora_B.t())
        total = plain.weight + ALPHA / R * pair.A @ pair.Bt
        rows = total[x]
        length = rows.norm(dim=-1, keepdim=True)
        expected = torch.where(length > 1, rows / (length + 1e-7), rows)
        torch.testing.assert_close(model(x), expected, **CLOSE)
        lk.merge(model, "default")
        torch.testing.assert_close(model(x), expected, **CLOSE)
        lk.unmerge(model)
        assert torch.equal(model.layer.weight, plain.weight)


def test_a_hundred_merges_leave_the_base_where_loralibs_drifts() -> None:
    theirs = grown(loralib.Linear(16, 16, r=R, lora_alpha=ALPHA)).to(torch.bfloat16)
    plain = _plain(theirs, 16, 16, False).to(torch.bfloat16)
    model, _ = adapted(plain)
    with torch.no_grad():
        for tensor in lk.parameters(model, "default"):
            tensor.normal_()
    start = theirs.weight.detach().clone()
    for _ in range(100):
        theirs.eval()
        theirs.train()
        lk.merge(model, "default")
        lk.unmerge(model)
    assert torch.equal(model.layer.weight, plain.weight)
    assert not torch.equal(theirs.weight, start)
