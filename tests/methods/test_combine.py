"""lorakit.combine against brute force: full updates in float64, and lorakit.use with several adapters."""

import itertools

import pytest
import tiny
import torch
from adapting import explicit, host, logits
from combining import densities, llama, outputs, updates, with_adapters
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.combine import HOWS, combine

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def summed(model, weights):
    total = {}
    for name, weight in weights.items():
        for path, delta in updates(model, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


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


@pytest.mark.parametrize("how", HOWS)
def test_weights_that_overflow_are_refused_and_nothing_changes(how):
    model = llama("ab")
    before = list(lk.adapters(model))
    with pytest.raises(AdapterError, match=r"numbers that torch\.float32 cannot hold"):
        combine(model, {"a": 1e308, "b": 1e308}, "new", how=how, **densities(how, 0.5))
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
