"""Fused layers in whole models: the same outputs and gradients as the plain path, and the node count that shows they run."""

import copy

import adapting
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.core import kernels

FUSED = {
    "llama": (2, 2),
    "gpt2": (0, 2),
    "bert": (2, 0),
    "roberta": (2, 0),
    "t5": (6, 0),
    "deberta": (0, 0),
}  # groups, MLPs


@pytest.fixture
def reference(monkeypatch):
    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "fused", False)
            return function()

    return run


def model_of(kind, **fields):
    model = tiny.MODELS[kind]()
    lk.attach(model, lk.LoRA(r=3, alpha=7, target_modules="all-linear", **fields), name="a")
    adapting.grow(model, "a")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train(kind == "gpt2")  # the others draw dropout in training, and only GPT-2 is fused there alone


def gradients(model):
    inputs = tiny.batch(model)
    logits = model(**inputs).logits
    logits.float().square().sum().backward()
    nodes = names(logits.grad_fn)
    found = [logits.detach(), *(parameter.grad.clone() for parameter in lk.parameters(model, "a"))]
    for parameter in lk.parameters(model, "a"):
        parameter.grad = None
    return found, nodes


def names(root):
    seen, waiting, found = set(), [root], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node.name())
        waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_reference(kind, dtype, reference):
    model = model_of(kind).to(dtype)
    fused, nodes = gradients(model)
    expected, plain = reference(lambda: gradients(model))
    truth, _ = reference(lambda: gradients(copy.deepcopy(model).double()))
    groups, mlps = FUSED[kind]
    assert sum("LowRankSiblings" in name for name in nodes) >= groups
    assert sum("LowRankMLP" in name for name in nodes) == mlps
    assert not any("LowRank" in name for name in plain)
    as_right(fused, expected, truth, dtype)


def as_right(fused, expected, truth, dtype):
    """The fused path is as near to float64 as the plain one, tensor by tensor (both round, in another order)."""
    eps = torch.finfo(dtype).eps
    for one, other, exact in zip(fused, expected, truth, strict=True):
        size = exact.abs().max()
        ours, theirs = ((found - exact).abs().max() / size for found in (one, other))
        assert ours <= 8 * theirs + 128 * eps


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"init": "pissa"}])
def test_variants_equal_reference(fields, reference):
    model = model_of("llama", **fields)
    fused, _ = gradients(model)
    expected, _ = reference(lambda: gradients(model))
    truth, _ = reference(lambda: gradients(copy.deepcopy(model).double()))
    as_right(fused, expected, truth, torch.float32)


def test_a_forward_that_calls_one_sibling_alone_dissolves_the_group_and_stays_right(reference):
    class Parent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.both = True

        def forward(self, x):
            y = self.one(x)
            return y + self.two(x) if self.both else y

    model = Parent()
    lk.attach(model, lk.LoRA(r=2, target_modules=["one", "two"]), name="a")
    adapting.grow(model, "a")
    x = torch.randn(4, 8)
    both = model(x)
    assert any("LowRankSiblings" in name for name in names(both.grad_fn))
    model.both = False
    first = model(x)
    again = model(torch.randn(4, 8))  # the second layer's output was not fetched
    torch.testing.assert_close(first, reference(lambda: model(x)))
    model.both = True
    assert not any("LowRankSiblings" in name for name in names(model(x).grad_fn))
    torch.testing.assert_close(model(x), both)
    assert again.shape == (4, 8)


def test_an_input_changed_in_place_between_two_siblings_is_seen(reference):
    class Parent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            y = self.one(x)
            with torch.no_grad():
                x.data_ptr()
                x += 1
            return y.detach() + self.two(x)

    model = Parent()
    lk.attach(model, lk.LoRA(r=2, target_modules=["one", "two"]), name="a")
    adapting.grow(model, "a")
    x = torch.randn(4, 8)
    expected = reference(lambda: model(x.clone()))
    torch.testing.assert_close(model(x.clone()), expected)


def test_only_some_of_the_siblings_adapted_and_an_adapter_off_among_them():
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj", "v_proj"]), name="qv")
    lk.attach(model, lk.LoRA(r=2, target_modules=["k_proj"]), name="k")
    adapting.grow(model, "qv")
    adapting.grow(model, "k")
    inputs = tiny.batch(model)
    for names_on in ("qv", "k", {"qv": 0.5, "k": 2.0}, None):
        lk.use(model, names_on)
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_merge_detach_and_copies_leave_no_trace_of_the_fused_classes():
    model = tiny.llama()
    classes = {path: type(module) for path, module in model.named_modules()}
    lk.attach(model, lk.LoRA(r=2), name="a")
    assert type(model.model.layers[0].mlp) is not classes["model.layers.0.mlp"]
    twin = copy.deepcopy(model)
    inputs = tiny.batch(model)
    torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits)
    lk.merge(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == classes
    lk.unmerge(model)
    assert type(model.model.layers[0].mlp) is not classes["model.layers.0.mlp"]
    for one in (model, twin):
        lk.detach(one, "a")
        assert {path: type(module) for path, module in one.named_modules()} == classes


def test_a_hook_on_a_layer_of_the_feed_forward_part_is_heard():
    model = model_of("llama")
    heard = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    _, nodes = gradients(model)
    assert heard
    assert sum("LowRankMLP" in name for name in nodes) == 1
    handle.remove()


def test_an_unknown_kernel_name_is_told(monkeypatch):
    monkeypatch.setenv("LORAKIT_KERNELS", "fast")
    with pytest.raises(ValueError, match="expected one of fused, reference"):
        kernels.asked()


def test_a_shallow_copy_of_a_sibling_computes_alone():
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj", "k_proj"]), name="a")
    adapting.grow(model, "a")
    leaf = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, leaf.in_features)
    with torch.no_grad():
        expected = leaf(x)
    torch.testing.assert_close(copy.copy(leaf)(x), expected)
