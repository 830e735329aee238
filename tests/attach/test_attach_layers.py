"""Each kind of layer on its own against its base with W + s B A written out in float64: forward, gradients, merge, route,
weights, DoRA, compile, copies, detach."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from adapting import assert_same, grow, host, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attach.method import Pair

pytestmark = pytest.mark.filterwarnings("ignore:the rank is larger than the smaller side:UserWarning")
CLOSE = {"atol": 1e-10, "rtol": 1e-9}
FIELDS = {"r": 4, "alpha": 6, "target_modules": ["layer"]}
CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {"stride": 2, "padding": 1, "dilation": 2}),
    "1d-same": (1, {"padding": "same", "dilation": 2}),
    "1d-groups": (1, {"groups": 2, "padding": "valid"}),
    "1d-circular": (1, {"padding": 2, "padding_mode": "circular", "groups": 4}),
    "2d": (2, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "bias": False}),
    "2d-one": (2, {"kernel_size": 1, "stride": 2}),
    "2d-flat": (2, {"kernel_size": (1, 3)}),
    "2d-same": (2, {"padding": "same"}),
    "2d-reflect": (2, {"padding": 1, "padding_mode": "reflect", "groups": 2}),
    "2d-circular-same": (2, {"padding": "same", "padding_mode": "circular"}),
    "2d-replicate": (2, {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
    "2d-depthwise": (2, {"groups": 4, "dilation": 2}),
    "3d": (3, {"stride": 2, "padding": 1, "groups": 2}),
    "3d-circular": (3, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "padding_mode": "circular"}),
}
OTHERS = ["linear", "conv1d-stored", "embedding", "embedding-padding", "embedding-scaled", "embedding-gemma"]
EVERY = [*CONVOLUTIONS, *OTHERS]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer_of(name: str) -> nn.Module:
    if name in CONVOLUTIONS:
        dimensions, options = CONVOLUTIONS[name]
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        return kind(4, 8, **({"kernel_size": 3} | options))
    if name == "embedding-scaled":
        from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

        return BartScaledWordEmbedding(20, 6, 0, embed_scale=3.0)
    if name == "embedding-gemma":
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        return Gemma3TextScaledWordEmbedding(20, 6, 0, embed_scale=2.5)
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(5, 6),
        "conv1d-stored": lambda: Conv1D(6, 5),
        "embedding": lambda: nn.Embedding(20, 6),
        "embedding-padding": lambda: nn.Embedding(20, 6, padding_idx=0),
    }
    layer: nn.Module = made[name]()
    return layer


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Holder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Holder(layer_of(name)).to(dtype).eval()
        nn.init.normal_(model.layer.weight)
        return model


def inputs(name: str, rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    if name.startswith("embedding"):
        ids = torch.randint(0, 20, (rows, 7))
        ids[:, 0] = 0
        return ids
    if name in CONVOLUTIONS:
        return torch.randn(rows, 4, *[7] * CONVOLUTIONS[name][0], dtype=dtype)
    return torch.randn(rows, 3, 5, dtype=dtype)


def adapted(name: str, *names: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Holder:
    model = model_of(name, dtype)
    for number, one in enumerate(names or ("a",)):
        lk.attach(model, lk.LoRA(**(FIELDS | fields)), name=one, seed=number)
        grow(model, one, seed=number + 10, std=0.5)
    return model


def delta_of(layer: Any, pair: Pair) -> Tensor:
    """s B A in the weight's own layout, from the definition."""
    A, Bt = pair.A, pair.Bt
    if isinstance(layer, nn.Embedding):
        return pair.scale * A @ Bt
    if isinstance(layer, Conv1D):
        return pair.scale * A.t() @ Bt
    if isinstance(layer, nn.Linear):
        return pair.scale * Bt.t() @ A
    rows, per_out = A.shape[0] // layer.groups, layer.out_channels // layer.groups
    blocks = []
    for group in range(layer.groups):  # output o of group g: sum over the group's ranks j of Bt[j, o] A[g r/g + j]
        a = A[group * rows : (group + 1) * rows]
        b = Bt[:, group * per_out : (group + 1) * per_out]
        blocks.append(torch.einsum("jo,ji...->oi...", b, a))
    return pair.scale * torch.cat(blocks)


def total_of(model: Holder, weights: Mapping[str, float]) -> Tensor:
    """The weight with several adapters; DoRA's change is `m (W + d) / |W + d| - W`, each on its own."""
    layer: Any = model.layer
    base = layer._parameters["weight"]
    total = base
    for name, strength in weights.items():
        pair = host(model).records[name].draft.pairs["layer"]
        summed = base + delta_of(layer, pair)
        if pair.magnitude is not None:
            along = 1 if isinstance(layer, nn.Embedding | Conv1D) else 0
            shape = [-1 if i == along else 1 for i in range(base.dim())]
            others = [i for i in range(base.dim()) if i != along]
            norm = torch.linalg.vector_norm(summed, dim=others).detach()  # a constant in backward
            summed = summed * (pair.magnitude / norm).view(shape)
        total = total + strength * (summed - base)
    return total


def by_hand(model: Holder, x: Tensor, weights: Mapping[str, float] | None = None) -> Tensor:
    """The layer's own forward on the written-out weight."""
    plain = copy.deepcopy(model)
    for name in list(lk.adapters(plain)):
        lk.detach(plain, name)
    return functional_call(plain.layer, {"weight": total_of(model, weights or {"a": 1.0})}, (x,))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", EVERY)
def test_forward_gradients_and_merge_are_those_of_the_written_out_weight(name: str, dora: bool) -> None:
    model = adapted(name, use_dora=dora)
    x = inputs(name)
    if name.startswith("embedding"):
        x = x.clamp_min(1)  # the padding row's gradient: the next test
    trained = lk.parameters(model, "a")
    wanted = [x.requires_grad_()] + trained if x.is_floating_point() else trained
    expected = by_hand(model, x)
    found = model(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    up = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(found, wanted, up), torch.autograd.grad(expected, wanted, up), strict=True
    ):
        torch.testing.assert_close(mine, reference, **CLOSE)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, expected, **CLOSE)
        lk.merge(model, "a")
        torch.testing.assert_close(model(x), expected, **CLOSE)
        lk.unmerge(model)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["embedding-padding", "embedding-scaled", "embedding-gemma"])
def test_a_padding_row_learns_nothing(name: str) -> None:
    model = model_of(name)
    lk.attach(model, lk.LoRA(**FIELDS))
    A, _ = lk.parameters(model, "default")
    model(inputs(name)).square().sum().backward()
    assert A.grad is not None
    assert not A.grad[0].any()
    assert A.grad[1:].any()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_routed_row_is_the_row_alone_and_weighed_adapters_add_up(name: str, dora: bool) -> None:
    model = adapted(name, "a", "b", use_dora=dora)
    x = inputs(name, rows=5)
    rows = ["b", None, "a", "b", "a"]
    with lk.route(model, rows):
        mixed = model(x)
    for row, one in enumerate(rows):
        with lk.use(model, one):
            torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), **CLOSE)
    with lk.route(model, rows, strict=True):
        torch.testing.assert_close(model(x), mixed, **CLOSE)
    weights = {"a": 0.5, "b": 0.7}
    with lk.use(model, weights):
        weighed = model(x)
        torch.testing.assert_close(weighed, by_hand(model, x, weights), **CLOSE)
    lk.merge(model, weights)
    torch.testing.assert_close(model(x), weighed, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_and_detach_leaves_none(name: str, dora: bool, dtype: torch.dtype) -> None:
    """DoRA's too: its magnitude is rounded as the norm is, so that the gain is exactly 1."""
    model = model_of(name, dtype)
    x = inputs(name, dtype=dtype)
    expected, before = model(x), snapshot(model)
    lk.attach(model, lk.LoRA(**FIELDS, use_dora=dora))
    assert torch.equal(model(x), expected)
    grow(model, "default", std=0.5)
    assert not torch.equal(model(x), expected)
    with lk.use(model, None):
        assert torch.equal(model(x), expected)
    lk.merge(model, "default")
    lk.unmerge(model)
    lk.detach(model, "default")
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["1d-same", "2d-reflect", "embedding", "conv1d-stored"])
@torch.no_grad()
def test_copies_and_pickles_go_on_as_the_model(name: str) -> None:
    model = adapted(name, "a", "b", use_dora=True, bias="all" if name == "1d-same" else "none")
    x = inputs(name)
    expected = {}
    for one in ("a", "b"):
        with lk.use(model, one):
            expected[one] = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one, output in expected.items():
            lk.use(other, one)
            assert torch.equal(other(x), output)
        lk.merge(other, "a")
        lk.unmerge(other)
        lk.detach(other, "a")
        lk.detach(other, "b")
        assert type(other.layer) is type(layer_of(name))
    assert torch.equal(model(x), expected["b"])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["1d-same", "2d-reflect", "3d", "linear", "embedding", "embedding-scaled"])
def test_a_compiled_layer_gives_the_same_outputs_and_gradients(name: str, dora: bool) -> None:
    model = adapted(name, use_dora=dora)
    x = inputs(name)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = compiled(x)
        mine = torch.autograd.grad(found.square().sum(), lk.parameters(model, "a"))
    expected = model(x)
    reference = torch.autograd.grad(expected.square().sum(), lk.parameters(model, "a"))
    torch.testing.assert_close(found, expected, **CLOSE)
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    with lk.use(model, None):
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@torch.no_grad()
def test_an_embedding_with_max_norm_is_shortened_once_as_a_whole(norm_type: float) -> None:
    """PEFT shortens A's rows, and its merged layer the sum's: the two differ."""
    model = Holder(nn.Embedding(20, 6, max_norm=0.8, norm_type=norm_type, padding_idx=2)).double()
    nn.init.normal_(model.layer.weight)
    plain = model.layer.weight.clone()
    x = torch.randint(0, 20, (4, 7))
    for number, name in enumerate(("a", "b")):
        lk.attach(model, lk.LoRA(**FIELDS), name=name)
        grow(model, name, seed=number, std=0.5)

    def shortened(rows: Tensor) -> Tensor:
        length = rows.norm(p=norm_type, dim=-1, keepdim=True)
        return torch.where(length > 0.8, rows * 0.8 / (length + 1e-7), rows)

    expected = {name: shortened(total_of(model, {name: 1.0})[x]) for name in ("a", "b")}
    for name, rows in expected.items():
        with lk.use(model, name):
            torch.testing.assert_close(model(x), rows, **CLOSE)
    with lk.route(model, ["a", "b", "b", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed[0], expected["a"][0], **CLOSE)
    torch.testing.assert_close(mixed[1:3], expected["b"][1:3], **CLOSE)
    torch.testing.assert_close(mixed[3], shortened(plain[x[3]]), **CLOSE)
    assert torch.equal(model.layer.weight, plain)  # the base's forward would have shortened its own rows
    lk.merge(model, "a")
    torch.testing.assert_close(model(x), expected["a"], **CLOSE)
    lk.unmerge(model)
    assert torch.equal(model.layer.weight, plain)


@pytest.mark.parametrize("name", ["1d", "2d-same", "3d"])
@torch.no_grad()
def test_a_single_image_without_a_batch_is_taken_as_the_base_takes_it(name: str) -> None:
    model = adapted(name)
    x = inputs(name, rows=1)
    torch.testing.assert_close(model(x[0]), model(x)[0], **CLOSE)


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    model = model_of("2d-depthwise")
    with pytest.raises(lk.errors.TargetError, match="multiple of 4"):
        lk.attach(model, lk.LoRA(r=6, target_modules=["layer"]))
    assert lk.adapters(model) == {}


@pytest.mark.parametrize("name", ["2d", "linear", "embedding"])
def test_dropout_drops_in_training_alone_and_on_the_updates_input(name: str) -> None:
    model = adapted(name, dropout=0.5, use_dora=name == "linear")
    x = inputs(name)
    expected = by_hand(model, x)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    model.train()
    if name == "embedding":  # whole numbers are not dropped, as in PEFT
        torch.testing.assert_close(model(x), expected, **CLOSE)
        return
    outputs = torch.stack([model(x) for _ in range(400)])
    assert not torch.allclose(outputs[0], outputs[1])
    spread = outputs.std(0) / 20 + 1e-12
    assert ((outputs.mean(0) - expected).abs() / spread).max() < 6  # dropping keeps the mean
