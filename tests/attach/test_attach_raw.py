"""Parameters that a module reads itself: experts' stacks (Mixtral), PyTorch's attention layer, plain matrices, against the
weights written out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from adapting import assert_same, grow, host, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.errors import AdapterError, TargetError, UsageError

CLOSE = {"atol": 1e-10, "rtol": 1e-9}
DTYPES = {"mixtral": torch.float32}  # its experts' grouped product takes no float64


def mixtral(dtype: torch.dtype) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.SEED)
        model: nn.Module = MixtralForCausalLM(config)
    return model.to(dtype).eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


class Matrices(nn.Module):
    """A stack that is (E, in, out), and a matrix, each read twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.stack = nn.Parameter(torch.randn(3, 8, 8) * 0.3)
        self.matrix = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (x @ self.stack[0] + x @ self.stack[2]).tanh() @ self.matrix.t()
        return x


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(8, 8), Matrices()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(self.first(x))
        return out


def made(kind: str, dtype: torch.dtype | None = None) -> Any:
    dtype = dtype or DTYPES.get(kind, torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        plain = {"attention": Attention, "stacked": Stacked}
        return plain[kind]().to(dtype).eval() if kind in plain else mixtral(dtype)


METHODS = {
    "attention": {"target_modules": ["mha"]},
    "stacked": {"target_modules": ["first"], "target_parameters": ["own.stack", "own.matrix"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
}
every_kind = pytest.mark.parametrize("kind", METHODS)


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    if kind == "mixtral":
        return {"input_ids": torch.randint(3, tiny.VOCAB, (3, 6))}
    return {"x": torch.randn(3, 5, 8, dtype=dtype)}


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def adapted(kind: str, *names: str, dtype: torch.dtype | None = None, std: float = 0.5) -> Any:
    model = made(kind, dtype)
    for number, name in enumerate(names or ("a",)):
        lk.attach(model, lk.LoRA(r=2, alpha=3, **METHODS[kind]), name=name, seed=number)
        grow(model, name, seed=number + 3, std=std)
    return model


def written_out(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    """Every adapted parameter as W + sum of strength * s B A, by loops over experts."""
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, strength in weights.items():
        for path, pair in host(model).records[name].draft.all_pairs():
            full = path if path in parameters else f"{path}.weight"
            base = parameters[full]
            A, Bt, s = pair.A, pair.Bt, pair.scale * strength
            if base.dim() == 2:
                delta = s * Bt.t() @ A
            else:
                experts = base.shape[0]
                r = A.shape[0] // experts
                blocks = []
                for e in range(experts):  # A expert-major, B expert-minor
                    a, b = A[e * r : (e + 1) * r], Bt[torch.arange(r) * experts + e].t()
                    blocks.append(s * (a.t() @ b.t() if "stack" in full else b @ a))
                delta = torch.stack(blocks)
            found[full] = found.get(full, base) + delta
    return found


def by_hand(model: Any, batch: dict[str, Tensor], weights: dict[str, float] | None = None) -> Tensor:
    replaced = written_out(model, weights or {"a": 1.0})
    plain = copy.deepcopy(model)
    for name in list(lk.adapters(plain)):
        lk.detach(plain, name)
    out = functional_call(plain, replaced, (), batch)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


@every_kind
def test_forward_gradients_merge_and_weights_are_those_written_out(kind: str) -> None:
    model, batch = adapted(kind, "a", "b"), inputs(kind)
    close = {"atol": 1e-4, "rtol": 1e-3} if kind in DTYPES else CLOSE
    lk.use(model, "a")
    assert len(written_out(model, {"a": 1.0})) == {"attention": 2, "stacked": 3, "mixtral": 6}[kind]
    expected, found = by_hand(model, batch), outputs(model, batch)
    torch.testing.assert_close(found, expected, **close)
    up, trained = torch.randn_like(expected), lk.parameters(model, "a")
    for mine, reference in zip(
        torch.autograd.grad(found, trained, up), torch.autograd.grad(expected, trained, up), strict=True
    ):
        torch.testing.assert_close(mine, reference, **close)
    with torch.no_grad():
        before = outputs(model, batch)
        lk.merge(model, "a")
        torch.testing.assert_close(outputs(model, batch), before, **close)
        lk.unmerge(model)
        assert torch.equal(outputs(model, batch), before)
        weights = {"a": 0.5, "b": 0.7}
        with lk.use(model, weights):
            torch.testing.assert_close(outputs(model, batch), by_hand(model, batch, weights), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_and_detach_leaves_none(kind: str, dtype: torch.dtype) -> None:
    model, batch = made(kind, dtype).requires_grad_(False), inputs(kind, dtype)
    expected, before = outputs(model, batch), snapshot(model)
    lk.attach(model, lk.LoRA(r=2, alpha=3, **METHODS[kind]))
    assert torch.equal(outputs(model, batch), expected)
    grow(model, "default", std=0.5)
    assert not torch.equal(outputs(model, batch), expected)
    lk.merge(model, "default")
    lk.unmerge(model)
    with lk.use(model, None):
        assert torch.equal(outputs(model, batch), expected)
    lk.detach(model, "default")
    assert_same(before, snapshot(model))


@every_kind
@torch.no_grad()
def test_copies_and_pickles_go_on_as_the_model(kind: str) -> None:
    model, batch = adapted(kind, "a", "b"), inputs(kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("a", "b"):
            with lk.use(model, name), lk.use(other, name):
                assert torch.equal(outputs(other, batch), outputs(model, batch))
        lk.detach(other, "a")
        lk.detach(other, "b")
        assert torch.equal(outputs(other, batch), outputs(made(kind).requires_grad_(False), batch))


@every_kind
def test_rows_cannot_take_different_adapters_there_and_the_model_goes_on(kind: str) -> None:
    model, batch = adapted(kind, "a", "b"), inputs(kind)
    expected = outputs(model, batch)
    with lk.route(model, ["a", None, "b"]), pytest.raises(AdapterError, match=r"lorakit\.use"):
        outputs(model, batch)
    torch.testing.assert_close(outputs(model, batch), expected)


SWITCHES: dict[str, Any] = {"none": None, "other": "b", "weighed": {"a": 0.5, "b": 0.5}, "strength": {"a": 0.5}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.parametrize("switch", SWITCHES)
@every_kind
def test_a_switch_between_forward_and_backward_raises_under_checkpointing(
    kind: str, switch: str, reentrant: bool, dtype: torch.dtype
) -> None:
    model, batch = adapted(kind, "a", "b", dtype=dtype, std=0.1), inputs(kind, dtype)
    lk.use(model, "a")
    if kind == "mixtral":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        if reentrant:
            model.enable_input_require_grads()
        run = lambda: outputs(model, batch)  # noqa: E731
    else:
        batch["x"].requires_grad_()
        run = lambda: checkpoint(model, batch["x"], use_reentrant=reentrant)  # noqa: E731
    run().float().square().sum().backward()  # without a switch it goes through
    assert all(parameter.grad is not None for parameter in lk.parameters(model, "a"))
    loss = run().float().square().sum()
    lk.use(model, SWITCHES[switch])
    with pytest.raises(AdapterError, match="between a forward pass and its backward pass"):
        loss.backward()


def test_parameters_that_take_no_update_are_refused_by_name() -> None:
    model = made("stacked")
    before = snapshot(model)
    for fields, error in (
        ({"target_parameters": ["own.stak"]}, TargetError),
        ({"target_parameters": ["first.bias"]}, TargetError),
        ({"target_parameters": ["own.stack"], "dropout": 0.1}, UsageError),
        ({"target_parameters": ["own.stack"], "use_dora": True}, UsageError),
        ({"target_parameters": ["own.stack"], "init": "pissa"}, UsageError),
    ):
        with pytest.raises(error):
            lk.attach(model, lk.LoRA(r=2, target_modules=[], **fields))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("stacked", {"target_modules": ["first"], "target_parameters": ["first.weight"]}),
        ("stacked", {"target_modules": [], "target_parameters": ["own.stack"], "modules_to_save": ["own"]}),
        ("attention", {"target_modules": ["mha"], "target_parameters": ["in_proj_weight"]}),
        ("attention", {"target_modules": ["mha"], "target_parameters": ["out_proj.weight"]}),
    ],
)
def test_one_weight_is_not_adapted_twice(kind: str, fields: dict[str, Any]) -> None:
    model = made(kind)
    with pytest.raises(UsageError, match="out of one of the two"):
        lk.attach(model, lk.LoRA(r=2, **fields))
    assert lk.adapters(model) == {}


@pytest.mark.parametrize("kind", ["attention", "stacked"])
def test_a_compiled_model_gives_the_same(kind: str) -> None:
    model, batch = adapted(kind), inputs(kind)
    torch._dynamo.reset()
    expected = outputs(model, batch)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(*batch.values())
    torch.testing.assert_close(found, expected, **CLOSE)
    reference = torch.autograd.grad(expected.square().sum(), lk.parameters(model, "a"))
    for one, other in zip(torch.autograd.grad(found.square().sum(), lk.parameters(model, "a")), reference, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()


def test_a_layer_that_pytorchs_fast_path_reads_past_is_refused_until_that_is_off() -> None:
    """The fast path reads `linear1.weight` and never calls linear1: PEFT's adapter there has no effect in evaluation."""
    model, x = encoder(), torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(TargetError, match="fast path"):
        lk.attach(model, lk.LoRA(r=2, target_modules=["linear1"]))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        lk.attach(model, lk.LoRA(r=2, target_modules=["linear1", "self_attn"]))
        grow(model, "default", std=0.5)
        with torch.no_grad():
            expected = model(x)
            lk.merge(model, "default")
            torch.testing.assert_close(model(x), expected, **CLOSE)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@torch.no_grad()
def test_attention_in_pytorchs_fast_path_reads_the_adapted_weights() -> None:
    model, x = encoder(), torch.randn(2, 5, 8, dtype=torch.float64)
    base = model(x)
    lk.attach(model, lk.LoRA(r=2, target_modules=["self_attn"], modules_to_save=["norm1"]))
    grow(model, "default", std=0.5)
    fast = model(x)
    assert (fast - base).abs().max() > 1e-2
    with torch.enable_grad():
        torch.testing.assert_close(model(x), fast, atol=1e-9, rtol=1e-9)  # the slow path
    lk.merge(model, "default")
    torch.testing.assert_close(model(x), fast, atol=1e-9, rtol=1e-9)
