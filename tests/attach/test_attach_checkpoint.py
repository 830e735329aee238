"""Gradient checkpointing: the same gradients, and a switch between forward and backward raises."""

import adapting
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import AdapterError

KINDS = ("gpt2", "roberta", "llama", "t5")


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model.train()


def quiet(model):
    """Training mode without the model's own dropout, so that runs can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(getattr(module, "dropout_prob", None), float):
            module.dropout_prob = 0.0
    return model


def gradients(model, name="a", seed=0):
    for p in lk.parameters(model, name):
        p.grad = None
    torch.manual_seed(seed)
    model(**tiny.batch(model, labels=True)).loss.backward()
    return [p.grad.clone() for p in lk.parameters(model, name)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_without(kind, reentrant, dropout):
    model = quiet(adapting.attached(kind, "a", dropout=dropout, bias="lora_only" if kind != "t5" else "none")).train()
    expected = gradients(model)
    for ours, theirs in zip(gradients(checkpointed(model, reentrant)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


SWITCHES = {
    "other": lambda model: lk.use(model, "b"),
    "none": lambda model: lk.use(model, None),
    "weighed": lambda model: lk.use(model, {"a": 0.5, "b": 0.5}),
    "routed": lambda model: lk.route(model, ["a", "b", None]),
    "strength": lambda model: lk.use(model, {"a": 0.5}),
}


@pytest.mark.parametrize("forward_again", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_switch_between_forward_and_backward_raises(kind, switch, reentrant, forward_again):
    model = checkpointed(adapting.attached(kind, "b", "a"), reentrant)
    loss = model(**tiny.batch(model, labels=True)).loss
    SWITCHES[switch](model)
    if forward_again:
        model(**tiny.batch(model, labels=True))
    with pytest.raises(AdapterError, match="between a forward pass and its backward pass"):
        loss.backward()
    lk.use(model, "a")  # and the model trains on
    assert all(grad.isfinite().all() for grad in gradients(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_switch_away_and_back_raises_or_is_right(reentrant):
    model = checkpointed(quiet(adapting.attached("llama", "b", "a")), reentrant)
    loss = model(**tiny.batch(model, labels=True)).loss
    lk.use(model, "b")
    lk.use(model, "a")
    with pytest.raises(AdapterError, match="between a forward pass and its backward pass"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_in_turn_train_under_checkpointing(reentrant):
    model = quiet(adapting.attached("llama", "a", "b")).train()
    expected = {}
    for name in "ab":
        lk.use(model, name)
        expected[name] = gradients(model, name)
    checkpointed(model, reentrant)
    for name in "abba":
        lk.use(model, name)
        adapting.logits(model.eval(), tiny.batch(model))
        model.train()
        for ours, theirs in zip(gradients(model, name), expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_in_another_thread_than_the_switch(reentrant):
    import threading

    model = checkpointed(adapting.attached("llama", "a", "b"), reentrant)
    gradients(model, "b")
    lk.use(model, "a")
    lk.use(model, "b")
    gradients(model, "b")  # this thread's sequence numbers are far ahead of the other's
    faults = []

    def train():
        try:
            gradients(model, "b")
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not faults
    gradients(model, "b")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_checkpointing_a_switch_between_is_harmless(kind, switch):
    model = adapting.attached(kind, "b", "a", bias="lora_only" if kind != "t5" else "none")
    expected = gradients(model)
    for p in lk.parameters(model, "a"):
        p.grad = None
    loss = model(**tiny.batch(model, labels=True)).loss
    SWITCHES[switch](model)
    if switch != "routed":
        model(**tiny.batch(model))
    loss.backward()
    for p, theirs in zip(lk.parameters(model, "a"), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs)


def test_merge_between_forward_and_backward_is_no_silent_error():
    model = adapting.attached("llama", "a")
    loss = model(**tiny.batch(model, labels=True)).loss
    lk.merge(model, "a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
