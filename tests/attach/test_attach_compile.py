"""torch.compile runs an attached model, and a switch between equal ranks compiles nothing anew."""

import adapting
import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

import lorakit as lk


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two(kind, trainable=False, **fields):
    model = tiny.MODELS[kind]()
    for number, name in enumerate("ab"):
        lora = lk.LoRA(r=4, alpha=8 * (number + 1), **fields)  # equal ranks, other scales
        lk.attach(model, lora, name=name, trainable=trainable)
        adapting.grow(model, name, number)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
def test_switch_between_equal_ranks_recompiles_nothing(kind):
    model = two(kind)
    inputs = tiny.batch(model)
    expected = {}
    for name in ("a", "b"):
        lk.use(model, name)
        expected[name] = adapting.logits(model, inputs)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=kind == "llama")
    torch.testing.assert_close(adapting.logits(compiled, inputs), expected["b"], rtol=1e-4, atol=1e-5)
    frames = counter.frame_count
    assert frames > 0
    for name in "abab":
        lk.use(model, name)
        torch.testing.assert_close(adapting.logits(compiled, inputs), expected[name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames


def test_base_under_compile_is_the_base():
    model = two("llama")
    plain = adapting.logits(tiny.llama(), tiny.batch(model))
    lk.use(model, None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(adapting.logits(compiled, tiny.batch(model)), plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch, of its own tensors
def test_trains_under_compile():
    model = two("gpt2", trainable=True, bias="lora_only")
    inputs = tiny.batch(model, labels=True)
    model(**inputs).loss.backward()
    expected = [p.grad.clone() for p in lk.parameters(model, "b")]
    for p in lk.parameters(model, "b"):
        p.grad = None
    torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    for p, theirs in zip(lk.parameters(model, "b"), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-6)


def test_merged_model_compiles_to_the_plain_one():
    model = two("llama")
    lk.merge(model, "a")
    counter, inputs = CompileCounter(), tiny.batch(model)
    torch.compile(model, backend=counter, fullgraph=True)(**inputs)
    plain = CompileCounter()
    torch._dynamo.reset()
    torch.compile(tiny.llama().requires_grad_(False), backend=plain, fullgraph=True)(**inputs)
    assert counter.op_count == plain.op_count


def test_routed_model_runs_under_compile():
    model = two("llama")
    inputs = tiny.batch(model)
    lk.route(model, ["a", None, "b"])
    expected = adapting.logits(model, inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(adapting.logits(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
