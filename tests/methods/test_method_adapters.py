"""Bottleneck and residual adapters: what they compute against hooks in float64, where they go, and what they refuse."""

import copy
from typing import Any

import method_kit as kit
import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import TargetError, UsageError
from lorakit.methods.adapter import ACTIVATIONS
from lorakit.methods.adapter_drop import AdapterDrop
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.methods.pfeiffer import PfeifferAdapter
from lorakit.methods.residual_adapter import ResidualAdapter

PLACES = {  # what each family calls a block, and in it the attention's and the feed-forward part's last layer
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "roberta": ("roberta.encoder.layer", "attention.output.dense", "output.dense"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "deberta": ("deberta.encoder.layer", "attention.output.dense", "output.dense"),
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
}


def expected_sites(family: str, name: str) -> list[str]:
    blocks, attention, mlp = PLACES[family]
    within = {"pfeiffer": [mlp], "adapter-drop": [mlp], "lin": [""]}.get(name, [attention, mlp])
    numbers = [1] if name == "adapter-drop" else [0, 1]
    return [f"{blocks}.{number}{'.' if part else ''}{part}" for number in numbers for part in within]


def by_hand(plain: nn.Module, name: str, method: Any, sites: list[str], tensors: list[Tensor], batch: Any) -> Tensor:
    """The same with torch's hooks on a copy in float64. tensors: the adapter's, in order."""
    twin, left = copy.deepcopy(plain).double(), iter(tensor.detach().double() for tensor in tensors)

    def bottleneck(y: Tensor, norm: list[Tensor], down: Tensor, db: Tensor, up: Tensor, ub: Tensor) -> Tensor:
        h = nn.functional.layer_norm(y, y.shape[-1:], *norm, 1e-5) if norm else y
        return ACTIVATIONS[method.activation](h @ down.t() + db) @ up.t() + ub

    for site in sites:
        if name in ("parallel", "series"):
            maps = [next(left) for _ in range(1 if method.r is None else 2)]

            def hook(_m: Any, args: Any, y: Tensor, maps: list[Tensor] = maps) -> Tensor:
                h = args[0] if name == "parallel" else y
                for one in maps:
                    h = h @ one.t()
                return y + h
        else:
            norm = [next(left) for _ in range(2 if name == "lin" else 0)]
            four = [next(left) for _ in range(4)]

            def hook(_m: Any, args: Any, y: Any, norm: Any = norm, four: Any = four) -> Any:
                if isinstance(y, tuple):
                    return (y[0] + bottleneck(y[0], norm, *four), *y[1:])
                return y + bottleneck(y, norm, *four)

        twin.get_submodule(site).register_forward_hook(hook)
    return kit.logits(twin, **batch)


@pytest.mark.parametrize("name", kit.ADAPTERS)
@pytest.mark.parametrize("family", kit.FAMILIES)
def test_computes_what_hooks_compute_at_the_families_places(family: str, name: str) -> None:
    plain = kit.FAMILIES[family]()
    model, method, batch = copy.deepcopy(plain), kit.ADAPTERS[name], tiny.batch(plain)
    report = lk.attach(model, method, name="a", seed=0)
    sites = expected_sites(family, name)
    assert sorted(report.modules) == sorted(sites)
    assert torch.equal(kit.logits(model, **batch), kit.logits(plain, **batch))  # fresh: not one bit
    kit.shaken(model)
    wanted = by_hand(plain, name, method, sites, list(lk.parameters(model, "a")), batch)
    got = kit.logits(model, **batch)
    assert not torch.allclose(wanted.float(), kit.logits(plain, **batch), atol=1e-4)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_of_it_and_not_the_base() -> None:
    model = tiny.gpt2()
    lk.attach(model, HoulsbyAdapter(r=4), name="a", seed=0)
    kit.shaken(model)
    model(**tiny.batch(model, labels=True)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in lk.parameters(model, "a"))
    own = {id(parameter) for parameter in lk.parameters(model, "a")}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in own)


def test_dropped_blocks_have_no_adapter_and_their_states_are_the_bases() -> None:
    model = tiny.gpt2(n_layer=3)
    batch = tiny.batch(model)
    base = model(**batch, output_hidden_states=True).hidden_states
    lk.attach(model, AdapterDrop(r=4, drop=2), name="a", seed=0)
    kit.shaken(model)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states[:3], base[:3], strict=True))
    assert not torch.equal(states[3], base[3])
    assert states[2].requires_grad is False  # nothing is propagated back through them


def test_a_seed_gives_the_same_and_the_global_generator_is_left_alone() -> None:
    drawn = []
    for _ in range(2):
        model, before = tiny.llama(), torch.get_rng_state()
        lk.attach(model, PfeifferAdapter(r=4), name="a", seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append([parameter.detach().clone() for parameter in lk.parameters(model, "a")])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    assert abs(float(drawn[0][0].std()) - 0.01) < 0.002


def test_two_adapters_are_weighed_and_stacked() -> None:
    model = tiny.llama()
    batch = tiny.batch(model)
    for seed, name in enumerate("ab"):
        lk.attach(model, HoulsbyAdapter(r=4), name=name, seed=seed)
        kit.shaken(model, name, seed)
    with lk.use(model, {"a": 1.0, "b": 0.0}):
        one = kit.logits(model, **batch)
    with lk.use(model, "a"):
        assert torch.equal(one, kit.logits(model, **batch))
    with lk.use(model, {"a": 0.5, "b": 0.5}):
        half = kit.logits(model, **batch)
    with lk.use(model, {"a": 1.0, "b": 1.0}):
        assert not torch.equal(half, kit.logits(model, **batch))


def test_dtype_of_its_own_beside_a_base_in_half_precision() -> None:
    model = tiny.llama().to(torch.bfloat16)
    batch = tiny.batch(model)
    base = kit.logits(model, **batch)
    lk.attach(model, HoulsbyAdapter(r=4), name="a", dtype=torch.float32, seed=0)
    assert {parameter.dtype for parameter in lk.parameters(model, "a")} == {torch.float32}
    assert torch.equal(kit.logits(model, **batch), base)
    kit.shaken(model)
    assert kit.logits(model, **batch).dtype == base.dtype


class Odd(nn.Module):
    """Blocks whose layers bear no known name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4), "feed": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part["mix"](x)  # type: ignore[index]
            x = x + part["feed"](x)  # type: ignore[index]
        return x


def test_places_that_are_not_known_are_refused_and_can_be_named() -> None:
    with pytest.raises(
        TargetError, match=r"output projection of parts.0's attention is not known.*mix, feed.*none bears"
    ):
        lk.attach(Odd(), HoulsbyAdapter())
    with pytest.raises(TargetError, match="several"):
        lk.attach(Odd(), HoulsbyAdapter(attention=["mix"], mlp=r"parts\..*"))
    with pytest.raises(TargetError, match="has no list of blocks"):
        lk.attach(nn.Linear(4, 4), HoulsbyAdapter())
    model = Odd()
    report = lk.attach(model, HoulsbyAdapter(r=2, attention=["mix"], mlp=["feed"]))
    assert report.modules == ("parts.0.mix", "parts.0.feed", "parts.1.mix", "parts.1.feed")
    assert lk.attach(Odd(), LinAdapter(r=2, attention="parts.*mix", mlp=["feed"])).modules == ("parts.0", "parts.1")


def test_an_encoder_and_a_decoder_both_have_adapters() -> None:
    report = lk.attach(tiny.t5(), HoulsbyAdapter(r=2))
    assert len(report.modules) == 8
    assert "decoder.block.0.layer.0.SelfAttention.o" in report.modules
    assert "decoder.block.0.layer.2.DenseReluDense.wo" in report.modules


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HoulsbyAdapter(r=0), "r must be a whole number"),
        (lambda: HoulsbyAdapter(r=True), "r must be a whole number"),
        (lambda: LinAdapter(r=2.0), "r must be a whole number"),  # type: ignore[arg-type]
        (lambda: PfeifferAdapter(activation="swish"), "activation must be one of"),
        (lambda: PfeifferAdapter(activation=[]), "activation must be one of"),  # type: ignore[arg-type]
        (lambda: AdapterDrop(drop=-1), "drop must be a whole number"),
        (lambda: ResidualAdapter(kind="beside"), "kind must be one of"),
        (lambda: HoulsbyAdapter(attention=[]), "attention must be names"),
        (lambda: HoulsbyAdapter(mlp=[3]), "mlp must be names"),  # type: ignore[list-item]
        (lambda: HoulsbyAdapter(modules_to_save="classifier"), "a list of names"),
        (lambda: HoulsbyAdapter(modules_to_save=[1]), "must be names of modules"),  # type: ignore[list-item]
    ],
)
def test_settings_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_dropping_every_block_and_unknown_heads_are_refused() -> None:
    with pytest.raises(TargetError, match="leaves none of the model's 2 blocks"):
        lk.attach(tiny.gpt2(), AdapterDrop(drop=2))
    with pytest.raises(TargetError, match="modules_to_save names 'clasifier'"):
        lk.attach(tiny.roberta(), HoulsbyAdapter(modules_to_save=["clasifier"]))
