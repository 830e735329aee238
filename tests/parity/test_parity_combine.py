"""lorakit.combine and PEFT 0.21's add_weighted_adapter give the same updates where PEFT is right: equal ranks, scaling 1.

Where it is not (rsLoRA, one adapter whose alpha is not its rank), lorakit's combination is held against the updates themselves.
"""

import copy
from unittest import mock

import pytest
import tiny
import torch
from adapting import host
from combining import CONVS, EXPERTS, Layers, Sparse, with_adapters
from parity_cases import CONV, Case, logits, peft_load, randomise

import lorakit as lk
from lorakit.methods.combine import HOWS, SIGNS, combine

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.2}
R = 4
FIELDS = {"r": R, "alpha": R, "target_modules": ["q_proj", "v_proj"]}
LLAMA = Case("llama", FIELDS)
PLAIN = ("cat", "svd", "linear")
PRUNING = [how for how in HOWS if how not in PLAIN]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def both(case, tmp_path, names):
    """(PEFT's model, ours) with the same adapters."""
    ours = case.base()
    for number, name in enumerate(names):
        lk.attach(ours, case.method(), name=name, seed=number)
        torch.manual_seed(number)
        randomise(lk.parameters(ours, name))
        with torch.no_grad():
            for parameter in lk.parameters(ours, name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        lk.save(ours, tmp_path / name, name=name)
    theirs = peft_load(case, tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(str(tmp_path / name), name)
    return theirs, ours


def add_weighted(theirs, weights, **options):
    """PEFT's combination, its draws (after the ones that its fresh tensors take) from the seed 5."""
    model = type(theirs.base_model)
    inject = model.inject_adapter

    def then_seeded(self, *args, **kwargs):
        inject(self, *args, **kwargs)
        torch.manual_seed(5)

    with mock.patch.object(model, "inject_adapter", then_seeded):
        theirs.add_weighted_adapter(list(weights), list(weights.values()), "new", **options)
    theirs.set_adapter("new")


def assert_same(theirs, ours, **tolerances):
    for path, pair in host(ours).records["new"].draft.pairs.items():
        A, Bt = pair.factors()
        layer = theirs.base_model.model.get_submodule(path)
        delta = layer.get_delta_weight("new")
        mine = pair.scale * (A @ Bt if "embed" in path else Bt.T @ A)
        mine = mine.T if getattr(layer, "fan_in_fan_out", False) and "embed" not in path else mine
        torch.testing.assert_close(mine.detach(), delta.detach(), **tolerances)


CASES = [
    (how, density, sign) for how in PRUNING for density in (0.3, 0.5, 1.0) for sign in SIGNS[: 1 + ("ties" in how)]
]


@pytest.mark.parametrize(("how", "density", "majority_sign"), [(how, None, "total") for how in PLAIN] + CASES)
def test_equal_ranks_and_scaling_1(how, density, majority_sign, tmp_path):
    pruning = density is not None
    theirs, ours = both(LLAMA, tmp_path, list(WEIGHTS))
    options = {"density": density, "majority_sign_method": majority_sign} if pruning else {}
    add_weighted(theirs, WEIGHTS, combination_type=how, **options)
    options = {"density": density, "majority_sign": majority_sign} if pruning else {}
    combine(ours, WEIGHTS, "new", how=how, seed=5 if how.startswith("dare") else None, **options)
    assert_same(theirs, ours, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("r", [2, 7, 12])
def test_svd_of_a_given_rank(r, tmp_path):
    theirs, ours = both(LLAMA, tmp_path, list(WEIGHTS))
    add_weighted(theirs, WEIGHTS, combination_type="svd", svd_rank=r)
    combine(ours, WEIGHTS, "new", how="svd", r=r)
    assert_same(theirs, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd"])
def test_transposed_layers(how, tmp_path):
    theirs, ours = both(Case("gpt2", FIELDS | {"target_modules": ["c_attn", "c_fc"]}, CONV), tmp_path, list(WEIGHTS))
    options = {"density": 0.4} if how in PRUNING else {}
    add_weighted(theirs, WEIGHTS, combination_type=how, **options)
    combine(ours, WEIGHTS, "new", how=how, **options)
    assert_same(theirs, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["cat", "linear", "ties", "magnitude_prune"])
def test_embeddings(how, tmp_path):
    theirs, ours = both(Case("llama", FIELDS | {"target_modules": ["embed_tokens"]}), tmp_path, list(WEIGHTS))
    options = {"density": 0.4} if how in PRUNING else {}
    add_weighted(theirs, WEIGHTS, combination_type=how, **options)
    combine(ours, WEIGHTS, "new", how=how, **options)
    assert_same(theirs, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"alpha": 3}, {"rank_pattern": {"v_proj": 2}}, {"alpha": 16}])
@pytest.mark.parametrize("how", HOWS)
def test_peft_loads_what_any_scaling_combines_to(how, fields, tmp_path):
    case = Case("llama", FIELDS | fields)
    _, ours = both(case, tmp_path, ["a", "b"])
    with lk.use(ours, "a"):
        alone = logits(ours)
    density = {"density": 1.0} if how in PRUNING else {}
    combine(ours, {"a": 1.0}, "same", how=how, **density)
    lk.save(ours, tmp_path / "same", name="same")
    torch.testing.assert_close(logits(peft_load(case, tmp_path / "same")), alone, atol=2e-5, rtol=1e-4)
    combine(ours, {"a": 0.7, "b": -0.4}, "new", how=how, **({"density": 0.5} if density else {}))
    lk.save(ours, tmp_path / "new", name="new")
    torch.testing.assert_close(logits(peft_load(case, tmp_path / "new")), logits(ours), atol=1e-5, rtol=1e-5)


def test_peft_is_wrong_for_one_adapter_with_rslora(tmp_path):
    """Why a scaling of its own: PEFT's file says alpha = r and keeps use_rslora, so the update grows by sqrt(r)."""
    theirs, ours = both(Case("llama", FIELDS | {"use_rslora": True}), tmp_path, ["a"])
    alone = logits(theirs)
    add_weighted(theirs, {"a": 1.0}, combination_type="svd")
    assert (logits(theirs) - alone).abs().max() > 1e-2
    combine(ours, {"a": 1.0}, "new", how="svd")
    torch.testing.assert_close(logits(ours), alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"a": {"modules_to_save": ["classifier"]}, "b": {"r": 2}},
        {"a": {"bias": "all"}, "b": {"r": 2, "bias": "lora_only"}},
        {"a": {"lora_bias": True}, "b": {"r": 2, "target_modules": ["key", "query"]}},
        {"a": {"r": 3, "target_modules": ["query", "word_embeddings"]}, "b": {"r": 2, "alpha": 7}},
        {"a": {"r": 3, "target_modules": "all-linear"}, "b": {"r": 2, "target_modules": r".*layer\.1.*query"}},
    ],
)
def test_peft_loads_combinations_of_unlike_adapters(fields, tmp_path):
    case = Case("roberta", {"r": 4, "alpha": 8, "target_modules": ["query", "value"]})
    ours = case.base()
    for name, own in fields.items():
        lk.attach(ours, lk.LoRA(**(case.fields | own)), name=name)
        randomise(lk.parameters(ours, name))
    combine(ours, {"a": 0.7, "b": -0.4}, "new")
    lk.save(ours, tmp_path, name="new")
    with lk.use(ours, {"a": 0.7, "b": -0.4}):
        expected = logits(ours)
    torch.testing.assert_close(logits(peft_load(case, tmp_path)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_peft_loads_combined_experts_and_groups(tmp_path):
    """Layers whose pairs are stacks; PEFT reads them by their own layouts."""
    from peft import PeftModel

    for model, fields, x in ((Layers(), CONVS, torch.randn(2, 4, 9)), (Sparse(), EXPERTS, torch.randn(5, 6))):
        base = copy.deepcopy(model)
        with_adapters(model, fields)
        combine(model, {"a": 0.7, "b": -0.4}, "new")
        lk.save(model, tmp_path / type(model).__name__, name="new")
        theirs = PeftModel.from_pretrained(base, str(tmp_path / type(model).__name__)).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-4)


def test_peft_loads_combined_ties_whose_rank_is_not_the_other_layers(tmp_path):
    case = Case("llama", FIELDS)
    ours = tiny.llama(tie_word_embeddings=True)
    for name, targets, r in (("a", ["q_proj", "v_proj", "embed_tokens"], 2), ("b", ["embed_tokens"], 3)):
        lk.attach(ours, lk.LoRA(r=r, alpha=2 * r**3, target_modules=targets, ensure_weight_tying=True), name=name)
        randomise(lk.parameters(ours, name))
    combine(ours, {"a": 0.7, "b": -0.4}, "new")
    lk.save(ours, tmp_path, name="new")
    theirs = peft_load(case, tmp_path, tiny.llama(tie_word_embeddings=True))
    torch.testing.assert_close(logits(theirs), logits(ours), atol=2e-5, rtol=1e-4)
