"""merge rounds once, unmerge restores every bit, and nothing else may happen in between."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, UsageError


class Leaves(nn.Module):
    """One of each kind of leaf, in any dtype."""

    def __init__(self, dtype):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv, self.table = nn.Linear(24, 16), Conv1D(20, 24), nn.Embedding(30, 24)
        self.to(dtype)

    def forward(self, ids):
        x = self.table(ids)
        return torch.cat([self.linear(x), self.conv(x)], -1)


ALL = ["linear", "conv", "table"]
FIELDS = [
    {"r": 4, "alpha": 8},
    {"r": 4, "alpha": 6, "use_rslora": True},
    {"r": 4, "rank_pattern": {"conv": 2, "table": 3}, "alpha_pattern": {"linear": 5.0}},
]
IDS = torch.arange(30).view(5, 6)


def leaves(dtype, *names, fields=FIELDS[0], adapter_dtype=None):
    model = Leaves(dtype)
    for number, name in enumerate(names):
        lk.attach(model, lk.LoRA(target_modules=ALL, **fields), name=name, seed=number, dtype=adapter_dtype)
        adapting.grow(model, name, number)
    return model


def rounded(base, model, weights):
    """round(W + sum of s B A), in float32, written out."""
    total = base.float().clone()
    for name, (path, strength) in weights.items():
        pair = adapting.host(model).records[name].draft.pairs[path]
        A, Bt = pair.A.detach().float(), pair.Bt.detach().float()
        delta = Bt.T @ A if path == "linear" else A.T @ Bt if path == "conv" else A @ Bt
        total = total + (pair.scale * strength) * delta
    return total.to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"b": -0.3}, {"a": 0.7, "b": 0.5}])
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_merge_adds_in_fp32_and_rounds_once(dtype, weights, fields, adapter_dtype):
    model = leaves(dtype, "a", "b", fields=fields, adapter_dtype=adapter_dtype)
    base = {path: model.get_submodule(path).weight.clone() for path in ALL}
    report = lk.merge(model, weights)
    assert (report.names, report.modules, report.max_logit_difference) == (tuple(weights), 3, None)
    for path in ALL:
        expected = rounded(base[path], model, {name: (path, s) for name, s in weights.items()})
        assert torch.equal(model.get_submodule(path).weight, expected), path
        assert not torch.equal(expected, base[path])
    lk.unmerge(model)
    assert all(torch.equal(model.get_submodule(path).weight, base[path]) for path in ALL)


def test_scale_of_rslora_and_patterns():
    model = leaves(torch.float32, "a", fields={**FIELDS[2], "use_rslora": True, "alpha": 6})
    pairs = adapting.host(model).records["a"].draft.pairs
    assert {path: pair.scale for path, pair in pairs.items()} == {
        "linear": 5.0 / 4**0.5,
        "conv": 6 / 2**0.5,
        "table": 6 / 3**0.5,
    }
    assert {path: pair.A.shape for path, pair in pairs.items()} == {
        "linear": (4, 24),
        "conv": (2, 24),
        "table": (30, 3),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_thousand_cycles_restore_every_bit(dtype):
    model = leaves(dtype, "a", "b")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = model(IDS)
    for number in range(1000):
        lk.merge(model, ("a", "b", {"a": 0.3, "b": 0.3})[number % 3])
        lk.unmerge(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(IDS), out)


@pytest.mark.parametrize("variant", [{}, {"bias": "all"}, {"use_rslora": True, "bias": "lora_only"}, {"head": True}])
@pytest.mark.parametrize("kind", adapting.FIVE)
def test_merged_logits_equal_unmerged(kind, variant):
    fields = dict(variant)
    if fields.pop("head", False):
        fields["modules_to_save"] = [adapting.HEADS[kind]]
    model = tiny.MODELS[kind]()
    before = adapting.snapshot(model)
    lk.attach(model, lk.LoRA(r=4, **fields), name="a")
    adapting.grow(model, "a")
    inputs = tiny.batch(model)
    out, inside = adapting.logits(model, inputs), adapting.snapshot(model)
    report = lk.merge(model, "a", probe=inputs)
    merged = adapting.logits(model, inputs)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)
    assert report.max_logit_difference == float((merged - out).abs().max())
    assert {p: type(m) for p, m in model.named_modules()} == before["classes"]  # nothing is left to pay
    assert list(model.state_dict()) == list(before["state"])
    assert not any("_lk_site" in m.__dict__ for m in model.modules())
    lk.unmerge(model)
    assert torch.equal(adapting.logits(model, inputs), out)
    after = adapting.snapshot(model)
    assert after["classes"] == inside["classes"]
    assert after["parameters"] == inside["parameters"]
    lk.detach(model, "a")
    adapting.assert_same(before, adapting.snapshot(model))


def test_while_merged_other_changes_are_refused():
    model = adapting.attached("roberta", "a", "b")
    inputs, state = tiny.batch(model), tiny.roberta().state_dict()
    lk.use(model, {"a": 0.5})
    on = adapting.logits(model, inputs)
    lk.merge(model)
    merged = adapting.logits(model, inputs)
    for change in (
        lambda: lk.use(model, None),
        lambda: lk.route(model, ["a", "b", None]),
        lambda: lk.attach(model, lk.LoRA(), name="c"),
        lambda: lk.detach(model, "b"),
        lambda: lk.merge(model, "b"),
        lambda: model.load_state_dict(state),
        lambda: model.roberta.load_state_dict({}, strict=False),
        lambda: model.roberta.encoder.layer[0].attention.self.query.load_state_dict({}, strict=False),
    ):
        with pytest.raises(AdapterError, match="merged"):
            change()
    assert torch.equal(adapting.logits(model, inputs), merged)
    assert lk.adapters(model)["a"].strength == 0.5
    lk.unmerge(model)
    assert {name: info.strength for name, info in lk.adapters(model).items()} == {"a": 0.5, "b": 0.0}
    assert torch.equal(adapting.logits(model, inputs), on)
    model.load_state_dict(state, strict=False)
    with pytest.raises(AdapterError, match="nothing is merged"):
        lk.unmerge(model)


def test_without_keep_a_plain_model_is_left():
    model = adapting.attached("llama", "a", "b")
    plain = adapting.explicit("llama", model, {"a": 0.7, "b": 0.5})
    lk.merge(model, {"a": 0.7, "b": 0.5}, keep=False)
    assert lk.adapters(model) == {}
    for (name, p), (other, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (name, p.requires_grad) == (other, q.requires_grad)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert {p: type(m) for p, m in model.named_modules()} == {p: type(m) for p, m in plain.named_modules()}
    assert all(set(m.__dict__) == set(n.__dict__) for m, n in zip(model.modules(), plain.modules(), strict=True))
    model.load_state_dict(plain.state_dict())
    with pytest.raises(AdapterError, match="keep=False"):
        lk.unmerge(model)


TIED = [
    ("gpt2", {"target_modules": ["wte"]}),
    ("gpt2", {"modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": ["wte", "lm_head"]}),
    ("gpt2", {"target_modules": ["wte"], "ensure_weight_tying": True}),
    ("gpt2", {"trainable_token_indices": [0, 7, 95]}),
]


@pytest.mark.parametrize(("kind", "fields"), TIED)
def test_merging_one_of_two_tied_weights_leaves_the_other_alone_and_unmerge_ties_them_again(kind, fields):
    model = tiny.MODELS[kind]()
    base = adapting.snapshot(model)
    lk.attach(model, lk.LoRA(r=4, **fields), name="a")
    adapting.grow(model, "a")
    inputs = tiny.batch(model)
    expected = adapting.logits(model, inputs)
    for _ in range(3):
        lk.merge(model, "a")
        torch.testing.assert_close(adapting.logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
        lk.unmerge(model)
    lk.use(model, None)
    lk.detach(model, "a")
    adapting.assert_same(base, adapting.snapshot(model))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(("kind", "fields"), TIED)
def test_a_final_merge_of_a_tied_weight_is_saved_and_loaded_with_both(kind, fields, tmp_path):
    model = tiny.MODELS[kind]()
    lk.attach(model, lk.LoRA(r=4, **fields), name="a")
    adapting.grow(model, "a")
    inputs = tiny.batch(model)
    expected = adapting.logits(model, inputs)
    lk.merge(model, "a", keep=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(adapting.logits(again, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_cast_while_merged_is_refused_at_unmerge():
    model = leaves(torch.float32, "a")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lk.merge(model, "a")
    model.bfloat16()
    with pytest.raises(AdapterError, match=r"torch\.float32 .* is torch\.bfloat16"):
        lk.unmerge(model)
    model.float()
    lk.unmerge(model)
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_failing_merge_changes_nothing(monkeypatch):
    from lorakit.attach import merge as room

    model = adapting.attached("gpt2", "a", "b")
    lk.use(model, "b")
    before = adapting.snapshot(model)
    with pytest.raises(ValueError, match="bad probe"):
        lk.merge(model, "a", probe={"input_ids": BadProbe()})
    adapting.assert_same(before, adapting.snapshot(model))
    calls, real = [], room._merged_value

    def merged_value(*args):
        calls.append(args)
        if len(calls) > 3:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(room, "_merged_value", merged_value)
    with pytest.raises(MemoryError):
        lk.merge(model, "a")
    adapting.assert_same(before, adapting.snapshot(model))


class BadProbe:
    def __getattr__(self, name):
        raise ValueError("bad probe")


def test_nothing_to_merge():
    model = adapting.attached("gpt2", "a")
    lk.use(model, None)
    for names in (None, {}):
        with pytest.raises(UsageError, match="nothing to merge"):
            lk.merge(model, names)
    lk.route(model, ["a", None])
    with pytest.raises(UsageError, match="nothing to merge"):
        lk.merge(model)
    with pytest.raises(AdapterError, match="unknown adapter"):
        lk.merge(model, "b")


def test_probe_of_a_model_in_training_leaves_its_modes():
    model = adapting.attached("gpt2", "a", dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = {path: module.training for path, module in model.named_modules()}
    report = lk.merge(model, "a", probe=tiny.batch(model)["input_ids"])
    assert report.max_logit_difference < 1e-5
    assert {path: module.training for path, module in model.named_modules()} == modes
