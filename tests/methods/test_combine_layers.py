"""lorakit.combine on every kind of layer, on what is trained in full beside the pairs, and through files."""

import pytest
import tiny
import torch
from adapting import host, logits
from combining import CONVS, EXPERTS, UNLIKE, Layers, Sparse, densities, llama, outputs, with_adapters
from torch import nn

import lorakit as lk
from lorakit.core.delta import expert_delta
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.combine import HOWS, combine

CLOSE = {"atol": 1e-5, "rtol": 1e-4}

# -- kinds of layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_convolutions_and_their_groups(how):
    model = with_adapters(Layers(), CONVS)
    x = torch.randn(2, 4, 9)
    combine(model, {"a": 1.0}, "alone", how=how, **densities(how, 1.0))
    torch.testing.assert_close(outputs(model, x, "alone"), outputs(model, x, "a"), **CLOSE)
    rank = {"r": 6} if how == "svd" else {}
    combine(model, {"a": 0.7, "b": -0.4}, "both", how=how, **densities(how, 0.5), **rank)
    assert outputs(model, x, "both").isfinite().all()
    if how in ("cat", "svd"):
        torch.testing.assert_close(outputs(model, x, "both"), outputs(model, x, {"a": 0.7, "b": -0.4}), **CLOSE)


def test_a_grouped_convolution_takes_a_multiple_of_its_groups_as_rank():
    model = with_adapters(Layers(), CONVS)
    with pytest.raises(UsageError, match="2 groups: r must be a multiple of that, not 3"):
        combine(model, {"a": 1.0, "b": 1.0}, "new", how="svd", r=3)


def test_factors_that_reach_across_the_groups_join_others_that_do_not():
    """PEFT's files have such ones."""
    model = with_adapters(Layers(), CONVS)
    pair = host(model).records["b"].draft.pairs["grouped"]
    lk.use(model, None)
    pair.A = torch.randn(2, 6, 3, 3) * 0.3
    host(model).records["b"].slots.clear()
    x = torch.randn(2, 4, 9)
    combine(model, {"a": 0.7, "b": -0.4}, "both")
    torch.testing.assert_close(outputs(model, x, "both"), outputs(model, x, {"a": 0.7, "b": -0.4}), **CLOSE)


@pytest.mark.parametrize("how", HOWS)
def test_experts_each_for_itself(how, tmp_path):
    model = with_adapters(Sparse(), EXPERTS)
    x = torch.randn(5, 6)
    combine(model, {"a": 1.0}, "alone", how=how, **densities(how, 1.0))
    torch.testing.assert_close(outputs(model, x, "alone"), outputs(model, x, "a"), **CLOSE)
    combine(model, {"a": 0.7, "b": -0.4}, "both", how=how, **densities(how, 0.5))
    lk.save(model, tmp_path, name="both")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "both"))
    if how == "cat":
        torch.testing.assert_close(outputs(model, x, "both"), outputs(model, x, {"a": 0.7, "b": -0.4}), **CLOSE)


def test_svd_of_experts_is_one_of_each():
    model = with_adapters(Sparse(), EXPERTS)
    combine(model, {"a": 0.7, "b": -0.4}, "new", how="svd", r=2)

    def delta(name):
        pair = host(model).records[name].draft.raw["experts"]["down"]
        return expert_delta(pair.A.detach(), pair.Bt.detach(), 3, pair.scale, transposed=False).double()

    U, S, Vh = torch.linalg.svd(0.7 * delta("a") - 0.4 * delta("b"), full_matrices=False)
    expected = U[:, :, :2] * S[:, None, :2] @ Vh[:, :2]
    torch.testing.assert_close(delta("new"), expected, **CLOSE)


def test_attention_layers():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    model = with_adapters(Attends(), {n: {"r": r, "target_modules": ["attn"]} for n, r in (("a", 2), ("b", 3))})
    x = torch.randn(2, 4, 8)
    combine(model, {"a": 0.7, "b": -0.4}, "new")
    torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, {"a": 0.7, "b": -0.4}), **CLOSE)


def test_fused_parts_and_starts_taken_out_of_the_base(tmp_path):
    parts = {"enable_lora": {"c_attn": [True, False, True]}, "target_modules": ["c_attn"]}
    fields = {"a": {"r": 2} | parts, "b": {"r": 3, "target_modules": ["c_attn", "c_fc"], "init": "pissa"}}
    model = with_adapters(tiny.gpt2(), fields, std=0.1)
    x, weights = tiny.batch(model), {"a": 0.7, "b": -0.4}
    combine(model, weights, "new")
    torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, weights), **CLOSE)
    combine(model, {"b": 1.0}, "same", how="linear")
    torch.testing.assert_close(outputs(model, x, "same"), outputs(model, x, "b"), **CLOSE)
    lk.save(model, tmp_path, name="new")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "new"))


# -- what is trained in full -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cat", "ties"])
def test_heads_and_biases_are_weighed_as_use_does(how, tmp_path):
    common = {"r": 2, "target_modules": ["query"]}
    fields = {"a": common | {"modules_to_save": ["classifier"]}, "b": common | {"bias": "all"}}
    model = with_adapters(tiny.roberta(), fields)
    x, weights = tiny.batch(model), {"a": 0.7, "b": -0.4}
    combine(model, weights, "new", how=how, **densities(how, 1.0))
    new = host(model).records["new"].draft.replaced
    with lk.use(model, weights):
        for path, group in new.items():
            for name, tensor in group.items():
                torch.testing.assert_close(tensor, getattr(model.get_submodule(path), name).detach(), **CLOSE)
    if how == "cat":
        torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, weights), **CLOSE)
    assert "classifier.out_proj" in new
    assert new["roberta.encoder.layer.0.attention.self.key"].keys() == {"bias"}
    lk.save(model, tmp_path, name="new")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "new"))


def test_token_rows_are_weighed_as_use_does(tmp_path):
    common = {"r": 2, "target_modules": ["q_proj"]}
    fields = {n: common | {"trainable_token_indices": rows} for n, rows in (("a", [3, 7]), ("b", [5, 3]))}
    model = with_adapters(tiny.llama(), fields)
    x, weights = tiny.batch(model, rows=20), {"a": 0.7, "b": -0.4}
    combine(model, weights, "new")
    torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, weights), **CLOSE)
    combine(model, {"b": 1.0}, "same", how="svd")
    assert torch.equal(host(model).records["same"].draft.tokens["model.embed_tokens"].rows, rows_of(model, "b"))
    lk.save(model, tmp_path, name="new")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "new"))


def rows_of(model, name):
    return host(model).records[name].draft.tokens["model.embed_tokens"].rows


def test_biases_of_b_are_weighed(tmp_path):
    fields = {
        "a": {"r": 2, "target_modules": ["query"], "lora_bias": True},
        "b": {"r": 3, "target_modules": ["query", "value"], "use_rslora": True, "lora_bias": True},
        "c": {"r": 2, "target_modules": ["key"]},
    }
    model = with_adapters(tiny.roberta(), fields)
    x, weights = tiny.batch(model), {"a": 0.7, "b": -0.4, "c": 1.0}
    for how in ("cat", "svd"):
        combine(model, weights, how, how=how, r=None if how == "cat" else 5)
        torch.testing.assert_close(outputs(model, x, how), outputs(model, x, weights), **CLOSE)
    lk.save(model, tmp_path, name="cat")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "cat"))
    with pytest.raises(
        AdapterError, match=r"'a' has a lora_bias at .*query: combine it by cat, svd, linear, not 'ties'"
    ):
        combine(model, weights, "new", how="ties", density=0.5)


def test_ties_of_embedding_and_head(tmp_path):
    fields = {n: {"r": r, "target_modules": ["wte"], "ensure_weight_tying": True} for n, r in (("a", 2), ("b", 3))}
    fields["c"] = {"r": 2, "target_modules": ["c_attn"]}
    fields["d"] = {"r": 2, "target_modules": ["wte"]}
    model = with_adapters(tiny.gpt2(), fields)
    x, weights = tiny.batch(model), {"a": 0.7, "b": -0.4, "c": 1.0}
    combine(model, weights, "new")
    torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, weights), **CLOSE)
    lk.save(model, tmp_path, name="new")
    lk.load(model, tmp_path, name="again")
    assert torch.equal(outputs(model, x, "again"), outputs(model, x, "new"))
    with pytest.raises(AdapterError, match=r"ties .* \(ensure_weight_tying\), and 'd' updates it untied"):
        combine(model, {"a": 1.0, "d": 1.0}, "other")


# -- tensors, files ----------------------------------------------------------------------------------------------------------


def test_the_widest_dtype_stays_and_the_sources_are_not_touched():
    model = with_adapters(tiny.llama(), {n: UNLIKE[n] for n in "ab"}, dtypes={"a": torch.bfloat16, "b": torch.float32})
    before = {n: [t.detach().clone() for t in host(model).records[n].tensors()] for n in "ab"}
    combine(model, {"a": 1.0}, "alone", trainable=True)
    combine(model, {"a": 1.0, "b": 1.0}, "both")
    dtypes = {path: pair.A.dtype for path, pair in host(model).records["both"].draft.pairs.items()}
    assert dtypes["model.layers.0.self_attn.q_proj"] == torch.float32
    assert dtypes["model.layers.0.self_attn.v_proj"] == torch.bfloat16  # b has none there
    for parameter in lk.parameters(model, "alone"):
        assert parameter.dtype == torch.bfloat16
        with torch.no_grad():
            parameter.zero_()
    for name, tensors in before.items():
        assert all(map(torch.equal, host(model).records[name].tensors(), tensors))


@pytest.mark.parametrize("how", HOWS)
def test_what_is_saved_is_what_is_loaded(how, tmp_path):
    model = llama()
    x = tiny.batch(model)
    combine(model, {"a": 0.7, "b": -0.4, "c": 1.1}, "new", how=how, **densities(how, 0.5))
    lk.save(model, tmp_path, name="new")
    fresh = tiny.llama()
    lk.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, x), outputs(model, x, "new"))


def test_targets_where_one_path_ends_as_another(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"body": nn.ModuleDict({"0": nn.Linear(4, 4)}), "0": nn.Linear(4, 4)})

        def forward(self, x):
            return self.body["0"](self.body["body"]["0"](x))

    model = with_adapters(Two(), {"a": {"r": 2, "target_modules": r"body\.0"}})
    combine(model, {"a": 2.0}, "new")
    assert host(model).records["new"].method.targets(model) == ["body.0"]


def test_training_a_combination_goes_on():
    model = llama("ab")
    report = combine(model, {"a": 1.0, "b": 1.0}, "new", how="svd", trainable=True)
    assert report.trainable == sum(p.numel() for p in lk.parameters(model, "new")) > 0
    model(**tiny.batch(model, labels=True)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lk.parameters(model, "new"))
