"""The variants' fresh starts and steps against PEFT's: PiSSA, OLoRA, DoRA's magnitudes, LoRA+'s optimizer groups; tied
weights, token rows and experts on transformers' models."""

from pathlib import Path
from typing import Any

import custom_cases
import pytest
import tiny
import torch
from custom_cases import batch, case
from parity_cases import Case, logits, peft_load, randomise, stored
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.api import learning_rates
from lorakit.attach.host import host_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:the rank is larger than the smaller side:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
STORED = custom_cases.STORED
STARTS = {
    "pissa": case("mlp", ["lin0", "lin1"], init="pissa"),
    "pissa-rslora": case("mlp", ["lin0"], init="pissa", use_rslora=True, r=4),
    "pissa-conv1d": case("emb", ["conv1d"], STORED, init="pissa"),
    "olora": case("mlp", ["lin0", "lin1"], init="olora"),
    "olora-pattern": case("mlp", ["lin0", "lin1"], init="olora", rank_pattern={"lin1": 3}),
    "pissa-dora": case("mlp", ["lin0"], init="pissa", use_dora=True),
}
EXACT = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pairs_of(model: nn.Module) -> Any:
    return host_of(model).records["default"].draft.pairs


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model(batch(model))


@pytest.mark.parametrize("name", STARTS)
def test_a_start_from_the_base_is_petfs_up_to_sign_and_changes_nothing(name: str) -> None:
    from peft import get_peft_model

    case = STARTS[name]
    plain = case.base(torch.float32)
    expected, state = outputs(plain), {key: value.clone() for key, value in plain.state_dict().items()}
    theirs = get_peft_model(case.base(torch.float32), case.config()).eval()
    lk.attach(plain, case.method())
    torch.testing.assert_close(outputs(plain), expected, **EXACT)
    torch.testing.assert_close(outputs(theirs), expected, **EXACT)
    for path, pair in pairs_of(plain).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        signs = (pair.A * A).sum(1).sign()
        torch.testing.assert_close(pair.A * signs[:, None], A, **EXACT)
        torch.testing.assert_close(pair.Bt * signs[:, None], B.t(), **EXACT)
    assert all(torch.equal(plain.state_dict()[key], state[key]) for key in state)  # PEFT's base has changed here
    lk.detach(plain, "default")
    assert torch.equal(outputs(plain), expected)
    assert list(plain.state_dict()) == list(state)


@pytest.mark.parametrize("name", STARTS)
def test_training_from_such_a_start_ends_in_the_same_function_and_files_go_both_ways(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    case = STARTS[name]
    ours = case.base(torch.float32)
    theirs = get_peft_model(case.base(torch.float32), case.config())
    lk.attach(ours, case.method())
    for model in (ours, theirs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)  # which a singular vector's sign does not change
        for step in range(3):
            optimizer.zero_grad()
            (model(batch(model, step)) - 0.3).square().sum().backward()
            optimizer.step()
    expected = outputs(theirs.eval())
    assert (expected - outputs(case.base(torch.float32))).abs().max() > 1e-3
    torch.testing.assert_close(outputs(ours), expected, atol=1e-5, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "peft")
    again = case.base(torch.float32)
    lk.load(again, tmp_path / "peft")
    torch.testing.assert_close(outputs(again), expected, atol=1e-5, rtol=1e-4)
    lk.save(ours, tmp_path / "ours")
    torch.testing.assert_close(
        outputs(peft_load(case, tmp_path / "ours", case.base(torch.float32))), outputs(ours), **EXACT
    )
    once_more = case.base(torch.float32)
    lk.load(once_more, tmp_path / "ours")
    torch.testing.assert_close(outputs(once_more), outputs(ours), **EXACT)
    lk.merge(ours, "default")
    torch.testing.assert_close(outputs(ours), outputs(once_more), **EXACT)


def test_petfs_olora_on_a_stored_weight_is_of_the_wrong_side_and_lorakits_starts_as_the_base() -> None:
    """PEFT takes QR of Conv1D's (in, out) matrix, whose factors do not fit its A and B; here of the (out, in) one."""
    from peft import get_peft_model

    case = custom_cases.case("emb", ["conv1d"], STORED, init="olora")
    ours = case.base(torch.float32)
    expected = outputs(ours)
    lk.attach(ours, case.method())
    torch.testing.assert_close(outputs(ours), expected, **EXACT)
    with pytest.raises(RuntimeError):
        outputs(get_peft_model(case.base(torch.float32), case.config()))


def test_the_fast_pissa_starts_as_the_base_near_the_full_one() -> None:
    fast, full = (custom_cases.net("mlp", torch.float32) for _ in range(2))
    expected = outputs(fast)
    lk.attach(fast, lk.LoRA(r=2, target_modules=["lin0"], init="pissa_niter_64"))
    lk.attach(full, lk.LoRA(r=2, target_modules=["lin0"], init="pissa"))
    torch.testing.assert_close(outputs(fast), expected, **EXACT)
    products = [pair.Bt.t() @ pair.A for model in (fast, full) for pair in pairs_of(model).values()]
    torch.testing.assert_close(*products, atol=1e-4, rtol=1e-3)


def test_a_start_from_a_weight_smaller_than_the_rank_is_saved_with_the_rank_it_has(tmp_path: Path) -> None:
    case = custom_cases.case("mlp", ["lin0", "head"], r=4, init="pissa")  # head: 6 -> 2
    ours = case.base(torch.float32)
    expected = outputs(ours)
    lk.attach(ours, case.method())
    torch.testing.assert_close(outputs(ours), expected, **EXACT)
    randomise(lk.parameters(ours, "default"))
    lk.save(ours, tmp_path)
    again = case.base(torch.float32)
    lk.load(again, tmp_path)
    torch.testing.assert_close(outputs(again), outputs(ours), **EXACT)
    torch.testing.assert_close(outputs(peft_load(case, tmp_path, case.base(torch.float32))), outputs(ours), **EXACT)


DORA = {
    "linear": case("mlp", ["lin0", "lin1"], use_dora=True),
    "conv1d": case("emb", ["emb", "conv1d"], STORED, use_dora=True),
    "convolution-1d": case("conv1d", ["conv"], use_dora=True),
    "convolution-2d": case("conv2d", ["conv"], use_dora=True),
    "convolution-3d": case("conv3d", ["conv"], use_dora=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DORA)
def test_a_fresh_doras_magnitude_is_petfs_and_changes_no_output_bit(name: str, dtype: torch.dtype) -> None:
    from peft import get_peft_model

    case = DORA[name]
    ours = case.base(dtype)
    expected = outputs(ours)
    lk.attach(ours, case.method())
    assert torch.equal(outputs(ours), expected)
    theirs = get_peft_model(case.base(dtype), case.config(), autocast_adapter_dtype=False)
    for path, pair in pairs_of(ours).items():
        wanted = theirs.get_submodule(f"base_model.model.{path}").lora_magnitude_vector["default"].weight
        assert pair.magnitude is not None
        assert pair.magnitude.dtype == dtype
        close = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-6}
        torch.testing.assert_close(pair.magnitude, wanted.flatten(), **close)


def test_doras_norm_leaves_out_the_bias_of_b() -> None:
    """PEFT reads `B A` off a forward pass, so with lora_bias its norm has the bias in it; here it is that of the weight."""
    model = custom_cases.net("mlp")
    lk.attach(model, lk.LoRA(r=2, alpha=3, target_modules=["lin0"], use_dora=True, lora_bias=True))
    randomise(lk.parameters(model, "default"))
    (pair,) = pairs_of(model).values()
    x, lin = batch(model), custom_cases.net("mlp").lin0
    weight = lin.weight + 1.5 * pair.Bt.t() @ pair.A
    gain = pair.magnitude / weight.norm(dim=1)
    expected = x @ (gain[:, None] * weight).t() + lin.bias + gain * 1.5 * pair.bias
    torch.testing.assert_close(model.lin0(x), expected)
    lk.merge(model, "default")
    torch.testing.assert_close(model.lin0(x), expected)


def test_dora_on_a_grouped_convolution_is_right_here_and_petfs_file_of_it_is_refused(tmp_path: Path) -> None:
    """PEFT's norm mixes the groups there: it reshapes a product of other sides to the weight's shape."""
    from peft import get_peft_model

    case = custom_cases.case("conv2d-groups", ["conv"], r=4, use_dora=True)
    ours = case.base()
    expected = outputs(ours)
    lk.attach(ours, case.method())
    assert torch.equal(outputs(ours), expected)
    randomise(lk.parameters(ours, "default"))
    before = outputs(ours)
    lk.merge(ours, "default")
    torch.testing.assert_close(outputs(ours), before)
    lk.unmerge(ours)
    (pair,) = pairs_of(ours).values()
    conv = case.base().conv
    delta = torch.cat([b @ a.flatten(1) for b, a in zip(pair.Bt.t().chunk(2), pair.A.chunk(2), strict=True)])
    total = conv.weight + 0.75 * delta.view_as(conv.weight)
    total = total * (pair.magnitude / total.flatten(1).norm(dim=1))[:, None, None, None]
    torch.testing.assert_close(ours.conv(batch(ours)), nn.functional.conv2d(batch(ours), total, conv.bias, groups=2))
    theirs = get_peft_model(case.base(), case.config())
    randomise([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lk.errors.FileError, match="across the groups"):
        lk.load(case.base(), tmp_path)


PLUS = {
    "linear": case("mlp", ["lin0", "lin1"], lr_ratio=16.0),
    "stored": case("emb", ["conv1d"], STORED, lr_ratio=4.0),
    "convolution": case("conv2d", ["conv", "lin0"], lr_ratio=8.0, lora_bias=True),
    "dora": case("mlp", ["lin0"], lr_ratio=16.0, use_dora=True),
    "bias-and-head": case("mlp", ["lin0"], lr_ratio=16.0, bias="lora_only", modules_to_save=["head"]),
    "experts": case("mixture", ["lin0"], lr_ratio=16.0, target_parameters=["experts.up", "experts.down"]),
}


@pytest.mark.parametrize("name", PLUS)
def test_lora_plus_has_petfs_groups_and_a_step_ends_in_the_same_parameters(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    case, lr = PLUS[name], 1e-3
    ratio = case.fields["lr_ratio"]
    theirs = get_peft_model(case.base(), custom_cases.case(case.model, **_without_ratio(case)).config())
    theirs.save_pretrained(tmp_path / "start")
    ours = case.base()
    lk.attach(ours, case.method())
    starting = case.base()
    lk.load(starting, tmp_path / "start", trainable=True)
    with torch.no_grad():
        for mine, start in zip(lk.parameters(ours, "default"), lk.parameters(starting, "default"), strict=True):
            mine.copy_(start)
    rates = learning_rates(ours, "default")
    groups = [{"params": [one], "lr": lr * rates.get(id(one), 1.0)} for one in lk.parameters(ours, "default")]
    mine = torch.optim.AdamW(groups, weight_decay=0.0)
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    assert {group["lr"] for group in groups} == {group["lr"] for group in other.param_groups if group["params"]} - {
        1e-6
    }
    for group in other.param_groups:
        wanted = sum(p.numel() for g in other.param_groups if g["lr"] == group["lr"] for p in g["params"])
        assert sum(g["params"][0].numel() for g in groups if g["lr"] == group["lr"]) == wanted
    for model, optimizer in ((theirs, other), (ours, mine)):
        (model(batch(model)) - 0.3).square().sum().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "peft")
    lk.save(ours, tmp_path / "ours")
    expected, _ = stored(tmp_path / "peft")
    for key, tensor in stored(tmp_path / "ours")[0].items():
        torch.testing.assert_close(
            tensor, expected[key], atol=1e-9, rtol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


def _without_ratio(case: Any) -> dict[str, Any]:
    fields = {key: value for key, value in case.fields.items() if key != "lr_ratio"}
    return {"targets": fields.pop("target_modules"), "peft": case.peft, **fields}


def test_lora_plus_speeds_up_the_factor_of_an_embedding_that_starts_at_zero() -> None:
    """PEFT trains both of an embedding's factors at a rate of their own, 1e-6, whatever the others' is."""
    model = custom_cases.net("emb")
    lk.attach(model, lk.LoRA(r=2, target_modules=["emb"], lr_ratio=16.0))
    (pair,) = pairs_of(model).values()
    assert learning_rates(model, "default") == {id(pair.A): 16.0}
    assert not pair.A.any()


def mixtral(**changes: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    values: dict[str, Any] = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.SEED)
        model: nn.Module = MixtralForCausalLM(MixtralConfig(**(values | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # the small random start would hide what an expert does
    return model.eval()


class Transformers(Case):
    """A case of transformers' models; see parity_cases."""

    def base(self) -> nn.Module:
        if self.model == "mixtral":
            return mixtral()
        return tiny.llama(tie_word_embeddings=True) if self.model == "llama-tied" else super().base()


EXPERTS = ["gate_up_proj", "down_proj"]
FIELDS = {"r": 2, "alpha": 3}
MODELS = {
    "experts": Transformers("mixtral", FIELDS | {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-and-attention": Transformers(
        "mixtral", FIELDS | {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    ),
    "one-of-the-experts-weights": Transformers(
        "mixtral", FIELDS | {"target_modules": ["q_proj"], "target_parameters": ["down_proj"], "use_rslora": True}
    ),
    "tokens-tied": Transformers(
        "gpt2", FIELDS | {"target_modules": ["c_attn"], "trainable_token_indices": [3, 40, 7]}, STORED
    ),
    "tokens-untied": Transformers(
        "llama", FIELDS | {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 4]}}
    ),
    "tokens-of-two-embeddings": Transformers(  # of one weight: PEFT trains each apart, and leaves the head
        "t5", FIELDS | {"target_modules": ["q"], "trainable_token_indices": {"embed_tokens": [3, 7]}}
    ),
    # PEFT ties layers that are called embed_tokens and lm_head, and no others (GPT-2's wte)
    "tying": Transformers(
        "llama-tied", FIELDS | {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    ),
    "tying-both": Transformers(
        "llama-tied", FIELDS | {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}
    ),
    "tying-kept-whole": Transformers(
        "llama-tied",
        FIELDS | {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_experts_token_rows_and_ties_agree_both_ways(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    case, close = MODELS[name], {"atol": 2e-5, "rtol": 1e-4}
    ours = case.base()
    base = logits(ours)
    lk.attach(ours, case.method())
    randomise(lk.parameters(ours, "default"))
    expected = logits(ours)
    assert (expected - base).abs().max() > 1e-3
    lk.save(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(peft_load(case, tmp_path / "ours")), expected, **close)
    again = case.base()
    lk.load(again, tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    lk.merge(again, "default")
    torch.testing.assert_close(logits(again), expected, **close)
    lk.unmerge(again)
    assert torch.equal(logits(again), expected)

    theirs = get_peft_model(case.base(), case.config())
    randomise([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.eval().save_pretrained(tmp_path / "peft")
    loaded = case.base()
    lk.load(loaded, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), logits(theirs), **close)
    lk.detach(loaded, "default")
    assert torch.equal(logits(loaded), base)
