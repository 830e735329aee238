"""Switching: one adapter, several weighed, none; against models whose weights are written out."""

import contextlib
import copy
import io
import pickle
import threading

import adapting
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import AdapterError, UsageError

CASES = ({"a": 1.0}, {"b": 1.0}, {"a": 0.5}, {"a": 0.7, "b": 0.5}, {"b": -1.0, "a": 2.0}, {"a": 0.0}, {})


@pytest.mark.parametrize("kind", adapting.FIVE)
def test_use_equals_weights_written_out(kind):
    model = adapting.attached(kind, "a")
    lk.attach(model, lk.LoRA(r=2, alpha=3, use_rslora=True, target_modules=[adapting.EMBEDDINGS[kind]]), name="b")
    adapting.grow(model, "b", 5)
    inputs = tiny.batch(model)
    for weights in CASES:
        lk.use(model, weights)
        expected = adapting.logits(adapting.explicit(kind, model, weights), inputs)
        torch.testing.assert_close(adapting.logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_use_of_none_is_the_base_bit_for_bit():
    model = tiny.llama()
    inputs = tiny.batch(model)
    base = adapting.logits(model, inputs)
    lk.attach(model, lk.LoRA(r=4, bias="all"), name="a")
    adapting.grow(model, "a")
    for off in (None, {}):
        lk.use(model, "a")
        lk.use(model, off)
        assert torch.equal(adapting.logits(model, inputs), base)
        assert not any("lora_" in key for key in model.state_dict())


def test_replaced_parameters_are_weighed_between_base_and_own():
    model = tiny.roberta()
    base = model.classifier.out_proj.weight.clone(), model.roberta.encoder.layer[0].output.dense.bias.clone()
    for number, name in enumerate("ab"):
        lk.attach(model, lk.LoRA(r=2, bias="all", modules_to_save=["classifier"]), name=name)
        adapting.grow(model, name, number)
    own = {
        name: (
            adapting.host(model).records[name].draft.replaced["classifier.out_proj"]["weight"].detach(),
            adapting.host(model).records[name].draft.replaced["roberta.encoder.layer.0.output.dense"]["bias"].detach(),
        )
        for name in "ab"
    }
    lk.use(model, {"a": 0.25, "b": 1.0})
    found = model.classifier.out_proj.weight, model.roberta.encoder.layer[0].output.dense.bias
    for k in range(2):
        expected = base[k] + 0.25 * (own["a"][k] - base[k]) + (own["b"][k] - base[k])
        torch.testing.assert_close(found[k], expected)
    lk.use(model, "b")
    assert torch.equal(model.classifier.out_proj.weight, own["b"][0])


def test_with_restores_what_was_even_after_an_error():
    model = adapting.attached("gpt2", "a", "b")
    inputs = tiny.batch(model)
    lk.use(model, {"a": 0.7, "b": 0.5})
    before = adapting.logits(model, inputs)
    with lk.use(model, "a"):
        with lk.use(model, None):
            assert not any(info.active for info in lk.adapters(model).values())
        assert lk.adapters(model)["a"].strength == 1.0
    with pytest.raises(ZeroDivisionError), lk.use(model, "a"):
        raise ZeroDivisionError
    assert {name: info.strength for name, info in lk.adapters(model).items()} == {"a": 0.7, "b": 0.5}
    assert torch.equal(adapting.logits(model, inputs), before)


def test_with_restores_what_is_left_after_a_detach_within():
    model = adapting.attached("gpt2", "a", "b")
    lk.use(model, {"a": 0.7, "b": 0.5})
    with lk.use(model, None):
        lk.detach(model, "a")
    assert {name: info.strength for name, info in lk.adapters(model).items()} == {"b": 0.5}
    with lk.use(model, None):
        lk.detach(model, "b")
    assert lk.adapters(model) == {}


@pytest.mark.parametrize("names", [3, ["a"], {"a": float("nan")}, {"a": float("inf")}, {"a": True}, {"a": "1"}])
def test_wrong_selections_are_refused_and_change_nothing(names):
    model = adapting.attached("gpt2", "a")
    with pytest.raises(UsageError):
        lk.use(model, names)
    with pytest.raises(AdapterError, match="unknown adapter"):
        lk.use(model, {"a": 1.0, "c": 1.0})
    assert lk.adapters(model)["a"].active


def test_parameters_stay_the_same_objects_over_switches():
    model = adapting.attached("gpt2", "a", "b")
    mine = lk.parameters(model, "a")
    optimizer = torch.optim.SGD(mine, lr=0.1)
    inputs = tiny.batch(model, labels=True)
    for names in ("b", None, {"b": 0.5, "a": 0.5}, {"a": 2.0}, "a"):
        lk.use(model, names)
        assert [id(p) for p in lk.parameters(model, "a")] == [id(p) for p in mine]
    before = [p.clone() for p in mine]
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(mine, before, strict=True))
    assert model(**inputs).loss < loss


def test_several_adapters_train_at_once():
    model = adapting.attached("llama", "a", "b")
    lk.use(model, {"a": 1.0, "b": 0.5})
    model(**tiny.batch(model, labels=True)).loss.backward()
    plain = adapting.explicit("llama", model, {"a": 1.0, "b": 0.5})
    plain(**tiny.batch(model, labels=True)).loss.backward()
    for name, strength in (("a", 1.0), ("b", 0.5)):
        for path, pair in adapting.host(model).records[name].draft.pairs.items():
            dW = plain.get_submodule(path).weight.grad  # (out, in)
            torch.testing.assert_close(pair.A.grad, strength * pair.scale * pair.Bt @ dW, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(pair.Bt.grad.T, strength * pair.scale * dW @ pair.A.T, rtol=1e-3, atol=1e-6)


def test_parameters_of_a_frozen_adapter_are_refused():
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2), name="a", trainable=False)
    with pytest.raises(AdapterError, match="trainable=True"):
        lk.parameters(model, "a")


@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.half().float()])
@pytest.mark.parametrize("trainable", [True, False])
def test_cast_model_goes_on_with_every_adapter(cast, trainable):
    model = tiny.llama()
    for number, name in enumerate("ab"):
        lk.attach(model, lk.LoRA(r=4), name=name, trainable=trainable, seed=number)
        adapting.grow(model, name, number)
    inputs = tiny.batch(model)
    expected = {}
    for name in "ab":
        lk.use(model, name)
        expected[name] = adapting.logits(model, inputs)
    cast(model)
    for name in "aba":
        lk.use(model, name)
        out = adapting.logits(model, inputs)
        assert out.dtype == model.lm_head.weight.dtype
        torch.testing.assert_close(out.float(), expected[name], rtol=0.1, atol=0.06)  # bfloat16, two layers
        assert model(**inputs).logits.dtype == out.dtype


def test_loaded_by_assignment():
    model = adapting.attached("gpt2", "a", "b")
    inputs = tiny.batch(model)
    state = {key: value * 1.5 if "lora_" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    after = adapting.logits(model, inputs)
    assert {id(p) for p in lk.parameters(model, "b")} == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    lk.use(model, "a")
    lk.use(model, "b")
    assert torch.equal(adapting.logits(model, inputs), after)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("state", ["attached", "off", "weighed", "routed", "merged"])
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_copies_are_whole_and_on_their_own(kind, state, how):
    model = adapting.attached(kind, "a", "b", bias="all")
    inputs = tiny.batch(model)
    begin = {
        "attached": lambda: lk.use(model, "a"),
        "off": lambda: lk.use(model, None),
        "weighed": lambda: lk.use(model, {"a": 0.5, "b": 0.5}),
        "routed": lambda: lk.route(model, ["a", None, "b"]),
        "merged": lambda: lk.merge(model, {"a": 1.0, "b": 0.5}),
    }
    begin[state]()
    out = adapting.logits(model, inputs)
    twin = how(model)
    assert torch.equal(adapting.logits(twin, inputs), out)
    assert lk.adapters(twin) == lk.adapters(model)
    if state == "merged":
        lk.unmerge(twin)
    lk.use(twin, "b")
    adapting.grow(twin, "b", 9)
    assert not torch.equal(adapting.logits(twin, inputs), out)
    assert torch.equal(adapting.logits(model, inputs), out)
    lk.detach(twin, "a")
    lk.detach(twin, "b")
    plain = tiny.MODELS[kind]()
    assert torch.equal(adapting.logits(twin, inputs), adapting.logits(plain, inputs))
    assert {p: type(m) for p, m in twin.named_modules()} == {p: type(m) for p, m in plain.named_modules()}


def test_threads_that_switch_leave_a_whole_state():
    model = adapting.attached("gpt2", "a", "b")
    inputs = tiny.batch(model)
    expected = {}
    for name in ("a", "b", None):
        lk.use(model, name)
        expected[name] = adapting.logits(model, inputs)
    faults = []

    def switch(names):
        for _ in range(50):
            for name in names:
                with contextlib.suppress(RuntimeError):
                    lk.use(model, name)
        if lk.adapters(model).keys() != {"a", "b"}:
            faults.append(names)

    threads = [threading.Thread(target=switch, args=(names,)) for names in (["a", None], ["b", "a"], [None, "b"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for name, out in expected.items():
        lk.use(model, name)
        assert torch.equal(adapting.logits(model, inputs), out)


def test_threads_that_run_models_of_their_own_do_not_meet():
    models = {name: adapting.attached("gpt2", "a", "b") for name in ("a", "b", None)}
    inputs = tiny.batch(models["a"])
    alone = {}
    for name, model in models.items():
        with lk.use(model, name):
            alone[name] = adapting.logits(model, inputs)
    found = {}

    def run(name):
        for _ in range(10):
            with lk.use(models[name], name):
                found[name] = adapting.logits(models[name], inputs)

    threads = [threading.Thread(target=run, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], alone[name]) for name in models)


def test_adapter_switched_on_in_inference_mode_trains():
    model = adapting.attached("llama", "a", "b")
    with torch.inference_mode():
        lk.use(model, "a")
        model(**tiny.batch(model))
    model(**tiny.batch(model, labels=True)).loss.backward()
    assert all(p.grad is not None for p in lk.parameters(model, "a"))
