"""LoRA's configuration: what it refuses, how its tensors start."""

import dataclasses
import math
import warnings

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError, UsageError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": -1}, "not -1"),
        ({"r": True}, "not True"),
        ({"r": 4.0}, r"not 4\.0"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "16"}, "alpha must be a finite number"),
        ({"alpha_pattern": {"q": float("inf")}}, "q must be a finite number"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), not 1\.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, not 'some'"),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": 5}, "target_modules must be names"),
        ({"target_modules": ["q", 5]}, "target_modules must be names"),
        ({"exclude_modules": [1]}, "exclude_modules must be names"),
        ({"modules_to_save": "classifier"}, r"modules_to_save is a list of names: \['classifier'\]"),
        ({"target_modules": "q.*", "layers_to_transform": 1}, "a regular expression names its own"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "give both, or neither"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        lk.LoRA(**fields)


def test_unknown_and_changed_fields_are_errors():
    with pytest.raises(TypeError):
        lk.LoRA(rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lk.LoRA().r = 4


def test_defaults_are_pefts_but_for_the_targets():
    lora = lk.LoRA()
    assert (lora.r, lora.dropout, lora.bias, lora.use_rslora) == (8, 0.0, "none", False)
    assert lora.target_modules == "all-linear"


def test_rank_above_the_matrix_warns_and_works():
    model = tiny.llama()
    with pytest.warns(
        UserWarning, match=r"larger than the smaller side of 2 adapted matrices \(first model.*: 32 x 16\)"
    ):
        lk.attach(model, lk.LoRA(r=20, target_modules=["v_proj"]), name="a")
    adapting.grow(model, "a")
    model(**tiny.batch(model, labels=True)).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.attach(model, lk.LoRA(r=16, target_modules=["v_proj"]), name="b")


def pair_of(model, lora, **attach):
    lk.attach(model, lora, name="a", **attach)
    (pair,) = adapting.host(model).records["a"].draft.pairs.values()
    return pair


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / math.sqrt(3 * 400)), ("gaussian", 1 / 16)])
def test_a_starts_random_and_b_at_zero(init, deviation):
    pair = pair_of(nn.Sequential(nn.Linear(400, 300)), lk.LoRA(r=16, init=init), seed=0)
    assert pair.A.shape == (16, 400)
    assert pair.Bt.shape == (16, 300)
    assert not pair.Bt.any()
    assert pair.A.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(pair.A.mean().item()) < 3 * deviation / math.sqrt(pair.A.numel())
    if init == "kaiming":  # uniform on +-1/sqrt(in), as loralib and PEFT
        assert pair.A.abs().max() <= 1 / math.sqrt(400)


def test_embedding_starts_as_loralib():
    pair = pair_of(nn.Sequential(nn.Embedding(300, 64)), lk.LoRA(r=16, target_modules=["0"]), seed=0)
    assert pair.A.shape == (300, 16)
    assert not pair.A.any()
    assert pair.Bt.std().item() == pytest.approx(1.0, rel=0.05)


def test_seed_decides_the_start_whatever_the_global_state_and_dtype():
    def start(seed, **attach):
        return pair_of(nn.Sequential(nn.Linear(8, 8)), lk.LoRA(r=2), seed=seed, **attach).A

    first = start(5)
    assert torch.equal(start(5), first)
    assert not torch.equal(start(6), first)
    assert torch.equal(start(5, dtype=torch.bfloat16), first.bfloat16())
    torch.manual_seed(1)
    unseeded = start(None)
    torch.manual_seed(1)
    assert torch.equal(start(None), unseeded)


@pytest.mark.parametrize(
    ("model_dtype", "asked", "found"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
)
def test_dtype_of_the_pair(model_dtype, asked, found):
    model = tiny.llama().to(model_dtype)
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]), name="a", dtype=asked)
    adapting.grow(model, "a")
    assert {p.dtype for p in lk.parameters(model, "a")} == {found}
    with torch.no_grad():
        assert model(**tiny.batch(model)).logits.dtype == model_dtype
    model(**tiny.batch(model, labels=True)).loss.backward()
    assert {p.grad.dtype for p in lk.parameters(model, "a")} == {found}


def test_under_a_default_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8, device="cpu"))
        lk.attach(model, lk.LoRA(r=2), name="a", seed=0)
        lk.use(model, None)
        lk.use(model, "a")
    model(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_biases_that_train(kind, bias):
    model = tiny.MODELS[kind]()
    lora = lk.LoRA(r=2, bias=bias, target_modules=["c_attn"] if kind == "gpt2" else ["query", "value"])
    targets = lora.targets(model)
    expected = {
        "none": set(),
        "lora_only": {f"{path}.bias" for path in targets},
        "all": {name for name, _ in model.named_parameters() if name.endswith(".bias")},
    }[bias]
    lk.attach(model, lora, name="a")
    draft = adapting.host(model).records["a"].draft
    assert {f"{path}.{name}" for path, group in draft.replaced.items() for name in group} == expected
    model(**tiny.batch(model, labels=True)).loss.backward()
    assert {n.replace("lora_bias", "bias") for n, p in model.named_parameters() if n.endswith("lora_bias")} == expected


def test_modules_to_save_are_not_adapted_and_stand_alone():
    model = tiny.roberta()
    lk.attach(model, lk.LoRA(r=2, target_modules=["dense"], modules_to_save=["classifier"]), name="a")
    draft = adapting.host(model).records["a"].draft
    assert not any(path.startswith("classifier") for path in draft.pairs)
    assert {p: sorted(g) for p, g in draft.replaced.items()} == {
        "classifier.dense": ["bias", "weight"],
        "classifier.out_proj": ["bias", "weight"],
    }
    # a second adapter keeps the base's names, not those of the first, which is on
    lk.attach(model, lk.LoRA(r=2, target_modules=["dense"], modules_to_save=["classifier"]), name="b")
    second = adapting.host(model).records["b"].draft
    assert {p: sorted(g) for p, g in second.replaced.items()} == {p: sorted(g) for p, g in draft.replaced.items()}
    assert list(second.pairs) == list(draft.pairs)


def test_head_tied_to_the_embeddings_gets_a_copy():
    model = tiny.gpt2()
    inputs = tiny.batch(model)
    lk.attach(model, lk.LoRA(r=2, modules_to_save=["lm_head"]), name="a")
    model(**tiny.batch(model, labels=True)).loss.backward()
    own = adapting.host(model).records["a"].draft.replaced["lm_head"]["weight"]
    assert own.grad is not None
    with torch.no_grad():
        own.zero_()
    assert not adapting.logits(model, inputs).any()
    assert model.transformer.wte.weight.any()
    assert model.transformer.wte.weight is model.lm_head._parameters["weight"]


def test_module_to_save_that_is_not_there():
    with pytest.raises(TargetError, match="modules_to_save names 'score'"):
        lk.attach(tiny.roberta(), lk.LoRA(modules_to_save=["score"]))


def test_gaussian_takes_each_layers_own_rank():
    """As PEFT: the deviation is 1 / the layer's rank, whatever r the others have."""
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2, init="gaussian", rank_pattern={"c_fc": 16}, target_modules=["c_fc"]), seed=0)
    values = torch.cat([one.flatten() for one in lk.parameters(model, "default") if one.abs().sum() > 0])
    assert float(values.detach().std()) == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_from_the_base_follows_from_the_seed_alone(init):
    drawn = []
    weights = tiny.llama().state_dict()
    for state in (1, 2):
        torch.manual_seed(state)
        model = tiny.llama()
        model.load_state_dict(weights)
        lk.attach(model, lk.LoRA(r=2, init=init, target_modules=["q_proj"]), seed=7)
        drawn.append(torch.cat([one.detach().flatten() for one in lk.parameters(model, "default")]))
    assert torch.equal(*drawn)


def test_a_start_from_the_base_wants_a_positive_scale():
    with pytest.raises(UsageError, match="alpha above 0"):
        lk.attach(tiny.llama(), lk.LoRA(r=2, alpha=-4, init="pissa", target_modules=["q_proj"]))
