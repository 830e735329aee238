"""Operations that a method adds at a module (bottleneck adapters, prefixes): on, off, by rows, copied, taken off again."""

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.method import Draft, Insert, Method
from lorakit.attach.operation import Operation, Share


@dataclass(frozen=True)
class Bend(Operation):
    """y + strength * tanh(y W)."""

    by_token = True

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kw: Any,
    ) -> Any:
        y = call(*args, **kw)
        flat = y.reshape(-1, y.shape[-1])
        rows = share.rows(y.shape[0], flat.shape[0], y.device)
        own = flat if rows is None else flat[rows]
        delta = torch.tanh(own @ tensors["W"]) * share.strength
        return (flat + delta if rows is None else flat.index_add(0, rows, delta)).view(y.shape)


@dataclass(frozen=True)
class Bends(Method):
    name = "bends"
    at: str = "mlp"

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        d = model.config.hidden_size
        paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == self.at]
        return Draft(
            inserts={path: {"bend": Insert(Bend(), {"W": torch.randn(d, d, generator=generator)})} for path in paths}
        )


@pytest.fixture
def model() -> nn.Module:
    return tiny.llama().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def by_hand(model: nn.Module, ids: Tensor, at: str, matrices: list[Tensor]) -> Tensor:
    """The same with torch's forward hooks on a copy."""
    twin, left = copy.deepcopy(model), iter(matrices)
    for path, module in twin.named_modules():
        if path.rpartition(".")[2] == at:
            W = next(left)
            module.register_forward_hook(lambda _m, _x, y, W=W: y + torch.tanh(y @ W))
    return logits(twin, ids)


@pytest.mark.parametrize("at", ["mlp", "o_proj", "input_layernorm"])
def test_computes_what_a_hook_computes(model: nn.Module, ids: Tensor, at: str) -> None:
    plain = copy.deepcopy(model)
    lk.attach(model, Bends(at), name="a", seed=1)
    matrices = [p.detach() for p in lk.parameters(model, "a")]
    torch.testing.assert_close(logits(model, ids), by_hand(plain, ids, at, matrices), rtol=0, atol=1e-6)


def test_on_off_weighed_detached(model: nn.Module, ids: Tensor) -> None:
    base, keys = logits(model, ids), list(model.state_dict())
    lk.attach(model, Bends(), name="a", seed=1)
    assert not torch.equal(logits(model, ids), base)
    for off in (None, {"a": 0.0}):
        with lk.use(model, off):
            assert torch.equal(logits(model, ids), base)
    lk.detach(model, "a")
    assert torch.equal(logits(model, ids), base)
    assert list(model.state_dict()) == keys


def test_rows_of_a_batch_have_their_own(model: nn.Module, ids: Tensor) -> None:
    base = logits(model, ids)
    lk.attach(model, [lk.LoRA(r=2), Bends()], name="a", seed=1)
    lk.attach(model, Bends(), name="b", seed=2)
    alone = {}
    for name in ("a", "b"):
        with lk.use(model, name):
            alone[name] = logits(model, ids)
    with lk.route(model, ["b", None, "a"]):
        mixed = logits(model, ids)
    torch.testing.assert_close(mixed, torch.stack([alone["b"][0], base[1], alone["a"][2]]), rtol=0, atol=1e-6)


def test_gradients_reach_it_beside_lora_and_no_fused_layer_skips_it(model: nn.Module, ids: Tensor) -> None:
    lk.attach(model, [lk.LoRA(r=2), Bends("down_proj")], name="a", seed=1)
    with torch.no_grad():
        for parameter in lk.parameters(model, "a"):
            parameter.add_(0.01)
    twin = copy.deepcopy(model).double()
    for one in (model, twin):
        one(ids).logits.pow(2).sum().backward()
    for mine, exact in zip(lk.parameters(model, "a"), lk.parameters(twin, "a"), strict=True):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * float(exact.grad.abs().max()))
        assert mine.grad.abs().max() > 0


def test_a_fused_feedforward_is_given_up_for_an_insert_that_comes_later(model: nn.Module, ids: Tensor) -> None:
    keys = {path: type(module) for path, module in model.named_modules()}
    lk.attach(model, lk.LoRA(r=2), name="a", seed=1)
    lk.attach(model, Bends("mlp"), name="b", seed=1)
    with lk.use(model, {"a": 1.0, "b": 1.0}):
        both = model(ids).logits
    with lk.use(model, "b"):
        torch.testing.assert_close(model(ids).logits, both)  # a fresh LoRA adds nothing
    lk.detach(model, "b")
    lk.detach(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == keys


def test_copies_and_pickles_keep_it(model: nn.Module, ids: Tensor) -> None:
    lk.attach(model, Bends(), name="a", seed=1)
    here = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), here)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), here)


def test_backbone_and_root_can_carry_it(ids: Tensor) -> None:
    @dataclass(frozen=True)
    class Whole(Operation):
        by_token = True

        def run(self, module, call, tensors, share, *args, **kw):  # type: ignore[no-untyped-def]
            out = call(*args, **kw)
            out.last_hidden_state = out.last_hidden_state + tensors["b"]
            return out

    @dataclass(frozen=True)
    class AtBackbone(Method):
        name = "backbone"
        path: str = "model"

        def draft(self, model, *, dtype, generator):  # type: ignore[no-untyped-def]
            return Draft(inserts={self.path: {"x": Insert(Whole(), {"b": torch.ones(model.config.hidden_size)})}})

    model = tiny.llama().eval()
    base, backbone = logits(model, ids), model.model(ids).last_hidden_state
    lk.attach(model, AtBackbone(), name="a")
    torch.testing.assert_close(logits(model, ids), model.lm_head(backbone + 1), rtol=0, atol=1e-6)
    assert "attention_mask" in inspect.signature(model.model.forward).parameters
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0, attention_mask=torch.ones_like(ids)).shape == (3, 9)
    lk.detach(model, "a")
    assert torch.equal(logits(model, ids), base)
    root = model.model
    lk.attach(root, AtBackbone(path=""), name="a")
    torch.testing.assert_close(root(ids).last_hidden_state, backbone + 1, rtol=0, atol=1e-6)
    lk.detach(root, "a")
    assert torch.equal(root(ids).last_hidden_state, backbone)


def test_counts_and_merge(model: nn.Module) -> None:
    lk.attach(model, [lk.LoRA(r=2), Bends()], name="a")
    counts, d = lk.count_parameters(model), model.config.hidden_size
    assert counts.inserted == len([path for path, _ in model.named_modules() if path.endswith(".mlp")]) * d * d
    assert counts.trainable == counts.low_rank + counts.inserted
    with pytest.raises(lk.LorakitError, match="cannot be merged"):
        lk.merge(model, "a")


def test_a_combination_keeps_its_parts_apart(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="one method of a kind"):
        lk.attach(model, [Bends(), Bends("o_proj")])

    @dataclass(frozen=True)
    class Other(Bends):
        name = "other"

    with pytest.raises(ValueError, match=r"two methods of the combination adapt model.layers.0.mlp"):
        lk.attach(model, [Bends(), Other()])
