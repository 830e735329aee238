"""lorakit.combine against brute force: full updates in float64, and lorakit.use with several adapters."""

import itertools

import pytest
import tiny
import torch
from adapting import explicit, host, logits
from combining import CONVS, EXPERTS, Layers, Sparse, with_adapters
from torch import nn

import lorakit as lk
from lorakit.core.delta import expert_delta
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.combine import HOWS, combine

PRUNING = [how for how in HOWS if how not in ("cat", "svd", "linear")]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
UNLIKE = {  # ranks, scalings, layers, rsLoRA: nothing is alike
    "a": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "b": {"r": 3, "alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "c": {
        "r": 2,
        "alpha": 7,
        "target_modules": ["v_proj", "q_proj"],
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"v_proj": 3},
    },
}


def llama(names="abc"):
    return with_adapters(tiny.llama(), {name: UNLIKE[name] for name in names})


def outputs(model, x, names):
    with torch.no_grad(), lk.use(model, names):
        return model(**x).logits if isinstance(x, dict) else model(x)


def updates(model, name):
    """path -> the full update of each pair of an adapter, float64, (out, in); an embedding's as (dim, vocab)."""
    found = {}
    for path, pair in host(model).records[name].draft.pairs.items():
        A, Bt = (factor.detach().double() for factor in pair.factors())
        embedding = isinstance(model.get_submodule(path), nn.Embedding)
        found[path] = pair.scale * ((A @ Bt).T if embedding else Bt.T @ A.flatten(1))
    return found


def summed(model, weights):
    total = {}
    for name, weight in weights.items():
        for path, delta in updates(model, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def densities(how, density):
    return {"density": density} if how in PRUNING else {}


# -- one adapter with weight 1 is itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "abc")
@pytest.mark.parametrize("how", ["cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_one_adapter_with_weight_1_is_itself_bit_for_bit(how, name):
    model = llama()
    x = tiny.batch(model)
    combine(model, {name: 1.0}, "new", how=how, **densities(how, 1.0))
    assert torch.equal(outputs(model, x, "new"), outputs(model, x, name))


@pytest.mark.parametrize("name", "abc")
@pytest.mark.parametrize("how", [how for how in HOWS if how.endswith("svd")])
def test_one_adapter_with_weight_1_is_itself_to_rounding_through_an_svd(how, name):
    model = llama()
    x = tiny.batch(model)
    combine(model, {name: 1.0}, "new", how=how, **densities(how, 1.0))
    torch.testing.assert_close(outputs(model, x, "new"), outputs(model, x, name), **CLOSE)
    ranks = {path: pair.A.shape for path, pair in host(model).records["new"].draft.pairs.items()}
    assert ranks == {path: pair.A.shape for path, pair in host(model).records[name].draft.pairs.items()}


def test_a_scaling_that_is_no_quotient_of_whole_numbers_survives_to_the_last_bit():
    for r, alpha, rslora in itertools.product((1, 3, 7, 12), (0.1, 5, 16, -3.7), (False, True)):
        model = nn.Sequential(nn.Linear(16, 16))
        with_adapters(model, {"a": {"r": r, "alpha": alpha, "target_modules": ["0"], "use_rslora": rslora}})
        combine(model, {"a": 1.0}, "new")
        x = torch.randn(4, 16)
        assert torch.equal(outputs(model, x, "new"), outputs(model, x, "a"))


# -- the weighted sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [{"a": 0.7, "b": -0.4}, {"c": -1.5, "a": 1, "b": 2.0}, {"a": 0.0, "b": 1.0}, {"b": 0}]
)
def test_cat_is_what_use_computes_and_the_sum_of_the_updates(weights):
    model = llama()
    x = tiny.batch(model)
    report = combine(model, weights, "new")
    assert (report.name, report.trainable, lk.adapters(model)["new"].active) == ("new", 0, True)
    torch.testing.assert_close(logits(model, x), outputs(model, x, weights), **CLOSE)
    torch.testing.assert_close(logits(model, x), logits(explicit("llama", model, weights), x), **CLOSE)
    for path, delta in summed(model, weights).items():
        torch.testing.assert_close(updates(model, "new")[path], delta, atol=1e-5, rtol=1e-5)


def test_cat_s_rank_is_the_sum_of_the_ranks_at_each_layer():
    model = llama()
    combine(model, {"a": 1.0, "b": 1.0, "c": 1.0}, "new")
    method, draft = host(model).records["new"].method, host(model).records["new"].draft
    expected = {"q_proj": 4 + 3 + 2, "v_proj": 4 + 5, "up_proj": 3, "embed_tokens": 4}
    for path, pair in draft.pairs.items():
        r = expected[path.rpartition(".")[2]]
        assert method.rank(path) == pair.Bt.shape[0] == r
        assert method.scaling(path) == pair.scale


@pytest.mark.parametrize("r", [None, 1, 3, 9])
def test_svd_is_the_best_approximation_of_the_full_sum(r):
    model, weights = llama(), {"a": 0.7, "b": -0.4, "c": 1.1}
    combine(model, weights, "new", how="svd", r=r)
    ranks = {"q_proj": 9, "v_proj": 9, "up_proj": 3, "embed_tokens": 4}
    default = {"q_proj": 4, "v_proj": 5, "up_proj": 3, "embed_tokens": 4}
    for path, delta in summed(model, weights).items():
        last = path.rpartition(".")[2]
        k = default[last] if r is None else min(r, ranks[last])
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        assert host(model).records["new"].draft.pairs[path].Bt.shape[0] == k
        torch.testing.assert_close(updates(model, "new")[path], U[:, :k] * S[:k] @ Vh[:k], atol=2e-5, rtol=1e-4)


def test_svd_forms_no_full_update(monkeypatch):
    model = nn.Sequential(nn.Linear(300, 400))
    with_adapters(model, {name: {"r": 4, "target_modules": ["0"]} for name in "ab"})
    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **more: seen.append(matrix.shape) or svd(matrix, **more))
    combine(model, {"a": 1.0, "b": 1.0}, "new", how="svd")
    assert seen == [(1, 8, 8)]


# -- pruning and electing, by hand -----------------------------------------------------------------------------------------


def by_hand(tensors, weights, how, density):
    """TIES and pruning by magnitude, entry by entry."""
    trimmed = []
    for tensor in tensors:
        limit = tensor.abs().flatten().sort(descending=True).values[int(density * tensor.numel()) - 1]
        trimmed.append(torch.where(tensor.abs() >= limit, tensor, 0.0))
    out = torch.zeros_like(trimmed[0])
    for index in itertools.product(*map(range, out.shape)):
        values = [tensor[index].item() for tensor in trimmed]
        entries = [(value, weight) for value, weight in zip(values, weights, strict=True) if value != 0]
        if how.startswith("ties"):
            sign = 1 if sum(values) >= 0 else -1
            entries = [(value, weight) for value, weight in entries if value * sign > 0]
        total = sum(value * weight for value, weight in entries)
        out[index] = total / max(len(entries), 1) if how.startswith("ties") else total
    return out


@pytest.mark.parametrize("how", ["ties_svd", "magnitude_prune_svd"])
def test_on_updates_with_unlike_ranks_and_scalings(how):
    model, weights = llama(), {"a": 0.7, "b": -0.4, "c": 1.1}
    combine(model, weights, "new", how=how, density=0.4, r=32)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        found = [(updates(model, name)[path], w) for name, w in weights.items() if path in updates(model, name)]
        expected = by_hand([delta for delta, _ in found], [w for _, w in found], how, 0.4)
        torch.testing.assert_close(updates(model, "new")[path], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["ties", "magnitude_prune", "linear"])
def test_on_factors_with_unlike_ranks_and_scalings(how):
    """Each factor takes the root of its scaling, smaller ranks are filled up with zeros, and the rule acts on either."""
    model, weights = llama(), {"a": 0.7, "b": -0.4, "c": 1.1}
    combine(model, weights, "new", how=how, **densities(how, 0.5))
    path, density = "model.layers.0.self_attn.q_proj", 1.0 if how == "linear" else 0.5
    pairs = [host(model).records[name].draft.pairs[path] for name in weights]
    halves = []
    for field, sign in (("A", True), ("Bt", False)):
        trimmed = []
        for pair in pairs:
            own = getattr(pair, field).detach().double() * pair.scale**0.5
            own = by_hand([own], [1.0], "magnitude_prune", density)
            trimmed.append(nn.functional.pad(own, (0, 0, 0, 4 - own.shape[0])))
        roots = [abs(w) ** 0.5 * (-1 if sign and w < 0 else 1) for w in weights.values()]
        halves.append(by_hand(trimmed, roots, how, 1.0))
    torch.testing.assert_close(updates(model, "new")[path], halves[1].T @ halves[0], atol=1e-5, rtol=1e-4)


def test_a_larger_scaling_wins_the_election():
    """The same factor with opposite signs: the adapter that acts four times as strongly decides (PEFT's are even)."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name, alpha, sign in (("weak", 1, 1.0), ("strong", 4, -1.0)):
        lk.attach(model, lk.LoRA(r=1, alpha=alpha, target_modules=["0"]), name=name)
        pair = host(model).records[name].draft.pairs["0"]
        with torch.no_grad():
            pair.A.fill_(sign)
            pair.Bt.fill_(1.0)
    combine(model, {"weak": 1.0, "strong": 1.0}, "ties", how="ties", density=1.0)
    combine(model, {"weak": 1.0, "strong": 1.0}, "full", how="ties_svd", density=1.0)
    assert (updates(model, "ties")["0"] < 0).all()
    torch.testing.assert_close(updates(model, "full")["0"], torch.full((4, 4), -4.0).double(), **CLOSE)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties_svd"])
def test_dare_draws_from_its_seed_alone_and_keeps_the_expected_update(how):
    model = llama("ab")
    made = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        combine(model, {"a": 1.0, "b": 1.0}, f"n{number}", how=how, density=0.5, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        made.append(updates(model, f"n{number}")["model.layers.0.self_attn.q_proj"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])

    wide = nn.Sequential(nn.Linear(200, 200))
    with_adapters(wide, {"a": {"r": 8, "target_modules": ["0"]}})
    with torch.no_grad():
        for pair in host(wide).records["a"].draft.pairs.values():
            pair.A.fill_(1.0)
            pair.Bt.fill_(1.0)
    combine(wide, {"a": 1.0}, "thinned", how="dare_linear", density=0.25, seed=0)
    A = host(wide).records["thinned"].draft.pairs["0"].A
    assert set(A.unique().tolist()) == {0.0, 4.0}  # dropped, or divided by the density
    assert A.mean().item() == pytest.approx(1.0, abs=0.2)


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


# -- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1.0}, {"how": "tie", "density": 0.5}, "Did you mean 'ties'"),
        ({"a": 1.0}, {"how": "linear_svd"}, "how must be one of"),
        ({"a": 1.0}, {"how": None}, "how must be one of"),
        ({"a": 1.0}, {"how": "ties"}, "needs density"),
        ({"a": 1.0}, {"how": "ties", "density": 0.0}, r"density must be in \(0, 1\], not 0.0"),
        ({"a": 1.0}, {"how": "ties", "density": 1.5}, r"\(0, 1\]"),
        ({"a": 1.0}, {"how": "ties", "density": float("nan")}, r"\(0, 1\]"),
        ({"a": 1.0}, {"how": "ties", "density": "half"}, r"a number in \(0, 1\]"),
        ({"a": 1.0}, {"how": "cat", "density": 0.5}, "prunes nothing"),
        ({"a": 1.0}, {"how": "cat", "r": 4}, "r goes with svd"),
        ({"a": 1.0}, {"how": "svd", "r": 0}, "at least 1"),
        ({"a": 1.0}, {"how": "svd", "r": 2.0}, "whole number"),
        ({"a": 1.0, "b": 1.0}, {"how": "svd", "r": 8}, "r=8 is more than .*: 7 is the sum of the ranks"),
        ({"a": 1.0}, {"how": "ties_svd", "density": 0.5, "r": 33}, "32 is the smaller side"),
        ({"a": 1.0}, {"how": "ties", "density": 0.5, "majority_sign": "most"}, "total, frequency"),
        ({"a": 1.0}, {"majority_sign": "frequency"}, "elects no sign"),
        ({"a": 1.0}, {"seed": 3}, "draws nothing"),
        ({"a": 1.0}, {"how": "dare_ties", "density": 0.5, "seed": "x"}, "seed must be a whole number"),
        ({}, {}, "weights is a mapping"),
        ("a", {}, "weights is a mapping"),
        ({"a": float("inf")}, {}, "finite number"),
        ({"a": "1"}, {}, "finite number"),
    ],
)
def test_arguments_that_make_no_sense(weights, options, message):
    model = llama("ab")
    before = list(lk.adapters(model))
    with pytest.raises(UsageError, match=message):
        combine(model, weights, "new", **options)
    assert list(lk.adapters(model)) == before


def test_names_that_cannot_be():
    model = llama("ab")
    with pytest.raises(AdapterError, match=r"unknown adapter 'x'\. Attached: 'a', 'b'"):
        combine(model, {"a": 1.0, "x": 1.0}, "new")
    with pytest.raises(AdapterError, match="'b' is attached already"):
        combine(model, {"a": 1.0}, "b")
    with pytest.raises(UsageError, match="non-empty string"):
        combine(model, {"a": 1.0}, "")
    with pytest.raises(AdapterError, match="no adapter is attached"):
        combine(tiny.llama(), {"a": 1.0}, "new")
    lk.merge(model, "a")
    with pytest.raises(AdapterError, match="merged into the base"):
        combine(model, {"a": 1.0}, "new")


def test_adapters_that_do_not_combine_are_refused_by_name_and_nothing_changes():
    fields = {
        "dora": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
        "plain": {"r": 2, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3]},
        "broken": {"r": 2, "target_modules": ["v_proj"]},
    }
    model = with_adapters(tiny.llama(), fields)
    with torch.no_grad():
        lk.parameters(model, "broken")[0][0, 0] = float("nan")
    lk.use(model, "plain")
    cases = [
        ({"plain": 1.0, "dora": 1.0}, "'dora' has DoRA magnitudes at model.layers.0.self_attn.q_proj"),
        ({"plain": 1.0, "head": 1.0}, "trains lm_head in full"),
        ({"plain": 1.0, "tokens": 1.0}, "model.embed_tokens: some of its rows are trained in full"),
        ({"plain": 1.0, "broken": 1.0}, "'broken' has infinite values or NaN at model.layers.0.self_attn.v_proj"),
    ]
    for weights, message in cases:
        with pytest.raises(AdapterError, match=message):
            combine(model, weights, "new")
        assert list(lk.adapters(model)) == list(fields)
        assert lk.adapters(model)["plain"].active
