"""attach and detach are each other's inverse: keys, bits, classes, flags and every module's `__dict__`."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.attach import host as host_module
from lorakit.errors import AdapterError, TargetError, UsageError

METHODS = {
    "plain": {},
    "bias_all": {"bias": "all"},
    "bias_own": {"bias": "lora_only"},
    "dropout": {"dropout": 0.1},
    "rslora": {"use_rslora": True, "init": "gaussian"},
}


def method(kind, variant):
    if variant == "embedding":
        return lk.LoRA(r=4, target_modules=[adapting.EMBEDDINGS[kind]])
    if variant == "head":
        return lk.LoRA(r=4, modules_to_save=[adapting.HEADS[kind]])
    return lk.LoRA(r=4, **METHODS[variant])


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("variant", [*METHODS, "embedding", "head"])
@pytest.mark.parametrize("kind", adapting.FIVE)
def test_attach_then_detach_is_nothing(kind, variant, trainable):
    model = tiny.MODELS[kind]()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)  # flags that nobody would guess
    inputs = tiny.batch(model)
    before, base = adapting.snapshot(model), adapting.logits(model, inputs)

    lk.attach(model, method(kind, variant), name="a", trainable=trainable)
    assert torch.equal(adapting.logits(model, inputs), base)
    assert type(model) is before["classes"][""]
    assert [key for key in model.state_dict() if "lora_" not in key] == list(before["state"])
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" not in n} == {False}
    if not trainable:
        assert list(model.state_dict()) == list(before["state"])
        assert not any(p.requires_grad for p in model.parameters())
    adapting.grow(model, "a")
    assert not torch.equal(adapting.logits(model, inputs), base)

    lk.detach(model, "a")
    adapting.assert_same(before, adapting.snapshot(model))
    assert torch.equal(adapting.logits(model, inputs), base)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "llama", "deberta"])
def test_fresh_adapter_changes_no_bit_where_gradients_are_recorded(kind):
    model = tiny.MODELS[kind]()
    inputs = tiny.batch(model)
    base = model.requires_grad_(False)(**inputs).logits
    lk.attach(model, lk.LoRA(r=4, bias="all"), name="a")
    out = model(**inputs).logits
    assert out.requires_grad
    assert torch.equal(out, base)


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("kind", adapting.FIVE)
def test_two_adapters_detach_in_either_order(kind, first):
    model = tiny.MODELS[kind]()
    inputs, before = tiny.batch(model), adapting.snapshot(model)
    lk.attach(model, lk.LoRA(r=4, bias="all"), name="a")
    adapting.grow(model, "a")
    only_a = adapting.logits(model, inputs)
    lk.attach(model, method(kind, "embedding"), name="b")
    adapting.grow(model, "b")
    only_b = adapting.logits(model, inputs)
    second = "b" if first == "a" else "a"
    lk.detach(model, first)
    assert list(lk.adapters(model)) == [second]
    lk.use(model, second)
    assert torch.equal(adapting.logits(model, inputs), only_b if second == "b" else only_a)
    lk.detach(model, second)
    adapting.assert_same(before, adapting.snapshot(model))
    assert lk.adapters(model) == {}


def test_detach_of_one_of_a_weighed_pair_leaves_the_other_on():
    model = adapting.attached("llama", "a", "b")
    lk.use(model, {"a": 0.5, "b": 2.0})
    lk.detach(model, "a")
    info = lk.adapters(model)["b"]
    assert (info.active, info.strength) == (True, 2.0)


def test_attach_with_an_adapter_on_a_part_only_touches_that_part():
    model = tiny.gpt2()
    report = lk.attach(model, lk.LoRA(r=2, target_modules=["c_attn"], layers_to_transform=1), name="a")
    assert report.modules == ("transformer.h.1.attn.c_attn",)
    assert report.trainable == 2 * (32 + 96)
    assert report.total == sum(p.numel() for p in model.parameters())
    changed = [p for p, m in model.named_modules() if "_lk_site" in m.__dict__]
    assert changed == ["transformer.h.1.attn.c_attn"]


def fails(model, monkeypatch, how):
    if how == "target":
        return pytest.raises(TargetError), lk.LoRA(target_modules=["nowhere"]), "new"
    if how == "kind":
        return pytest.raises(TargetError, match="takes no low-rank update"), lk.LoRA(target_modules=["mlp"]), "new"
    if how == "taken":
        return pytest.raises(AdapterError, match="attached already"), lk.LoRA(), "old"
    if how == "name":
        return pytest.raises(UsageError, match="non-empty"), lk.LoRA(), ""
    if how == "device":
        elsewhere(monkeypatch)
        return pytest.raises(MemoryError), lk.LoRA(bias="all"), "new"
    monkeypatch.setattr(host_module, "wear", after(3, host_module.wear))
    return pytest.raises(MemoryError), lk.LoRA(bias="all"), "new"


def elsewhere(monkeypatch):
    """The leaves are on another device than the adapter, and that one has no memory left."""
    monkeypatch.setattr(host_module, "_device", lambda leaf: torch.device("cuda"))
    monkeypatch.setattr(host_module, "_moved", full)


def full(*_):
    raise MemoryError


def after(number, real):
    calls = []

    def wear(*args):
        calls.append(args)
        if len(calls) == number:
            raise MemoryError
        real(*args)

    return wear


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("how", ["target", "kind", "taken", "name", "device", "wear"])
def test_failing_attach_leaves_all_as_it_was(how, resident, monkeypatch):
    model = adapting.attached("llama", "old") if resident or how == "taken" else tiny.llama()
    before, inputs = adapting.snapshot(model), tiny.batch(model)
    base, names = adapting.logits(model, inputs), list(lk.adapters(model))
    with monkeypatch.context() as patch:
        raising, lora, name = fails(model, patch, how)
        with raising:
            lk.attach(model, lora, name=name)
    adapting.assert_same(before, adapting.snapshot(model))
    assert list(lk.adapters(model)) == names
    assert torch.equal(adapting.logits(model, inputs), base)
    lk.attach(model, lk.LoRA(), name="next")  # and the model still takes one


def test_failing_switch_leaves_the_other_adapter_on(monkeypatch):
    model = adapting.attached("gpt2", "a", "b")
    inputs = tiny.batch(model)
    on = adapting.logits(model, inputs)
    with monkeypatch.context() as patch:
        elsewhere(patch)
        with pytest.raises(MemoryError):
            lk.use(model, "a")
    assert lk.adapters(model)["b"].active
    assert torch.equal(adapting.logits(model, inputs), on)


def test_wrong_arguments_are_named():
    model = tiny.gpt2()
    with pytest.raises(UsageError, match="expects a method"):
        lk.attach(model, {"r": 8})
    with pytest.raises(UsageError, match=r"torch\.nn\.Module, not str"):
        lk.attach("gpt2", lk.LoRA())
    with pytest.raises(UsageError, match=r"floating-point torch\.dtype"):
        lk.attach(model, lk.LoRA(), dtype=torch.int8)
    for verb in (lambda: lk.use(model, None), lambda: lk.detach(model, "a"), lambda: lk.parameters(model, "a")):
        with pytest.raises(AdapterError, match=r"Call lorakit\.attach"):
            verb()
    lk.attach(model, lk.LoRA(), name="a")
    with pytest.raises(AdapterError, match=r"unknown adapter 'b'\. Attached: 'a'"):
        lk.detach(model, "b")
    with pytest.raises(AdapterError, match="attached to its part 'inner'"):
        lk.use(nn.ModuleDict({"inner": model}), None)
    with pytest.raises(AdapterError, match="one and the same module"):
        lk.attach(model.transformer, lk.LoRA(), name="b")
    lk.detach(model, "a")


def test_leaf_of_another_library_is_refused():
    class Foreign(nn.Linear):  # loralib's layers look so
        def __init__(self):
            super().__init__(4, 4)
            self.lora_A = nn.Parameter(torch.zeros(2, 4))

    model = nn.ModuleDict({"layer": Foreign()})
    before = adapting.snapshot(model)
    with pytest.raises(AdapterError, match="lora_A already"):
        lk.attach(model, lk.LoRA(r=2))
    adapting.assert_same(before, adapting.snapshot(model))


def test_leaf_without_a_weight_of_its_own_is_refused():
    model = nn.ModuleDict({"layer": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(TargetError, match="no weight parameter of its own"):
        lk.attach(model, lk.LoRA(r=2))


def test_input_given_by_name():
    for leaf, name, x in (
        (nn.Linear(4, 4), "input", torch.randn(2, 4)),
        (nn.Embedding(5, 4), "input", torch.tensor([1, 2])),
    ):
        model = nn.ModuleDict({"layer": leaf})
        lk.attach(model, lk.LoRA(r=2, target_modules=["layer"]), name="a")
        adapting.grow(model, "a")
        assert torch.equal(leaf(**{name: x}), leaf(x))


def test_scaled_embedding_scales_its_update_and_merges_alike():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    leaf = BartScaledWordEmbedding(11, 6, 0, embed_scale=3.0)
    model = nn.ModuleDict({"layer": leaf})
    lk.attach(model, lk.LoRA(r=2, target_modules=["layer"]), name="a")
    adapting.grow(model, "a")
    ids = torch.arange(11)
    unmerged = leaf(ids)
    lk.merge(model, "a")
    torch.testing.assert_close(leaf(ids), unmerged)
