"""The last block at the position that the head reads: loss and gradients are those of the whole model."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.data import Encoded
from lorakit.data.pack import collate_packed
from lorakit.train.loss import objective_for
from lorakit.train.packed import packed_objective, packing_for
from lorakit.train.prune import HEADS, last_block_pruned, pruned_objective

CLASSIFY = objective_for("sequence-classification")


def llama(**changes):
    from transformers import LlamaForSequenceClassification

    return of(LlamaForSequenceClassification, tiny.llama(), **changes)


def gpt2(**changes):
    from transformers import GPT2ForSequenceClassification

    return of(GPT2ForSequenceClassification, tiny.gpt2(), **changes)


def xlm_roberta():
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(**tiny._encoder() | {"max_position_embeddings": 66, "pad_token_id": 1})
    torch.manual_seed(0)
    return XLMRobertaForSequenceClassification(config).eval()


def of(kind, like, **changes):
    torch.manual_seed(0)
    config = like.config
    for key, value in {"num_labels": tiny.LABELS, "pad_token_id": 0, **changes}.items():
        setattr(config, key, value)
    return kind(config).eval()


MODELS = {"bert": tiny.bert, "roberta": tiny.roberta, "xlm-roberta": xlm_roberta, "llama": llama, "gpt2": gpt2}


def batch(model, *, padded=True):
    """Rows of 9, 5 and 1 tokens, padded on the right."""
    found = tiny.batch(model, rows=3, length=9, labels=False)
    if padded:
        for row, length in enumerate((9, 5, 1)):
            found["input_ids"][row, length:] = model.config.pad_token_id
            found["attention_mask"][row, length:] = 0
    found["labels"] = torch.tensor([0, 2, 1])
    return found


def attached(build, attention="sdpa", targets="all-linear", **changes):
    model = build(**changes)
    model.config._attn_implementation = attention
    lk.attach(model, lk.LoRA(r=4, target_modules=targets), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def step(model, objective, inputs):
    part = objective.loss(model, inputs)
    part.total.backward()
    grads = [parameter.grad.clone() for parameter in lk.parameters(model, "default")]
    model.zero_grad(set_to_none=True)
    return part, grads


def check_same(model, inputs):
    """Ours against the whole model's, in double."""
    exact = copy.deepcopy(model).double()
    check_near(step(model, pruned_objective(CLASSIFY, model), inputs), step(exact, CLASSIFY, inputs))


def check_near(found, exact):
    """Single precision against double: as near as it comes. (Double against double below is far nearer.)"""
    (ours, grads), (plain, expected) = found, exact
    assert ours.targets == plain.targets
    assert abs(float((ours.total - plain.total).detach())) <= 1e-6 * float(plain.total.detach())
    largest = max(float(grad.abs().max()) for grad in expected)
    assert largest > 0
    for grad, other in zip(grads, expected, strict=True):
        assert torch.allclose(grad.double(), other, rtol=0, atol=2e-6 * largest)


@pytest.fixture
def narrow(monkeypatch):
    """The shapes of what the last block's MLP is given."""

    def watch(model):
        shapes = []
        last = {"bert": lambda m: m.bert.encoder.layer, "roberta": lambda m: m.roberta.encoder.layer}
        last |= {"llama": lambda m: m.model.layers, "gpt2": lambda m: m.transformer.h}
        last |= {"xlm-roberta": last["roberta"]}
        block = last[model.config.model_type](model)[-1]
        child = block.intermediate if hasattr(block, "intermediate") else block.mlp
        child.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        return shapes

    return watch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, padded, attention, narrow):
    model = attached(MODELS[name], attention)
    model.config.model_type = name
    shapes = narrow(model)
    check_same(model, batch(model, padded=padded))
    assert shapes == [(3, 1, 32), (3, 9, 32)]  # ours, the whole one


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows(name, narrow):
    """Two examples in one row and one in another: the encoders' heads read three positions, each with its own mask."""
    model = attached(MODELS[name])
    pad, draw = model.config.pad_token_id, torch.Generator().manual_seed(4)
    items = [
        Encoded(torch.randint(3, tiny.VOCAB, (length,), generator=draw).tolist(), label, 0)
        for length, label in ((4, 0), (3, 2), (6, 1))
    ]
    inputs = collate_packed(items, [[0, 1], [2]], pad_id=pad, task="sequence-classification")
    exact = copy.deepcopy(model).double()
    whole, ours = (
        packed_objective(CLASSIFY, packing_for(one, "sequence-classification", pad_id=pad)) for one in (exact, model)
    )
    model.config.model_type = name
    shapes = narrow(model)
    check_near(step(model, pruned_objective(ours, model), inputs), step(exact, whole, inputs))
    assert shapes[-1] == ((2, 2, 32) if "bert" in name else (2, 7, 32))


@pytest.mark.parametrize("name", MODELS)
def test_float64_agrees_far_below_rounding(name):
    """A position too many or a mask wrong would show here, whatever single precision hides."""
    model = attached(MODELS[name]).double()
    inputs = batch(model)
    (plain, grads), (ours, found) = (step(model, one, inputs) for one in (CLASSIFY, pruned_objective(CLASSIFY, model)))
    assert abs(float((ours.total - plain.total).detach())) < 1e-13
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(grads, found, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padding_token_inside_a_row_that_has_no_padding(name):
    """transformers takes the rightmost token that is not the padding's, though no mask is given."""
    model = attached(MODELS[name])
    inputs = batch(model, padded=False)
    inputs["input_ids"][0, 6:] = model.config.pad_token_id
    inputs["input_ids"][1, 2] = model.config.pad_token_id
    check_same(model, inputs)
    check_same(model, {key: value for key, value in inputs.items() if key != "attention_mask"})


def test_a_row_of_padding_tokens_alone():
    model = attached(llama)
    inputs = batch(model, padded=False)
    inputs["input_ids"][1] = model.config.pad_token_id
    check_same(model, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_under_gradient_checkpointing(name):
    model = attached(MODELS[name], **({"use_cache": False} if name in ("llama", "gpt2") else {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch(model)
    model.train()
    plain, grads = step(model, CLASSIFY, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours, found = step(model, pruned_objective(CLASSIFY, model), inputs)
    assert torch.allclose(ours.total, plain.total, rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads, found, strict=True))


def test_the_basees_dropout_is_drawn_again_but_seeded():
    model = attached(tiny.bert).train()
    objective, losses = pruned_objective(CLASSIFY, model), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(objective.loss(model, batch(model)).total.detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_before_afterwards_an_exception_included(name):
    model = attached(MODELS[name])
    before = {path: (type(one), dict(one.__dict__)) for path, one in model.named_modules()}
    step(model, pruned_objective(CLASSIFY, model), batch(model))
    with pytest.raises((TypeError, ValueError)), last_block_pruned(model, batch(model)):
        model()
    after = {path: (type(one), dict(one.__dict__)) for path, one in model.named_modules()}
    assert before.keys() == after.keys()
    for path, (kind, state) in before.items():
        assert after[path][0] is kind
        assert after[path][1].keys() == state.keys()


def test_what_is_not_known_is_left_alone():
    for model in (tiny.deberta(), tiny.llama(), tiny.t5()):
        assert pruned_objective(CLASSIFY, model) is CLASSIFY

    class Own(type(tiny.bert())):
        """A model whose forward is somebody's own, whatever it inherits."""

    model = tiny.bert()
    model.__class__ = Own
    assert pruned_objective(CLASSIFY, model) is CLASSIFY


def spoil_hook(model):
    model.bert.encoder.layer[-1].register_forward_hook(lambda *_: None)


def spoil_forward(model):
    inner = model.bert.encoder.layer[-1].attention.self
    inner.forward = inner.forward


def spoil_read(model):
    model.config.output_hidden_states = True


@pytest.mark.parametrize("spoil", [spoil_hook, spoil_forward, spoil_read])
def test_a_block_that_is_not_its_class_alone_runs_whole(spoil, narrow):
    model = attached(tiny.bert)
    spoil(model)
    shapes = narrow(model)
    check_same(model, batch(model))
    assert set(shapes) == {(3, 9, 32)}


def test_every_name_is_a_model_of_transformers():
    import importlib

    for name in HEADS:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), cls), type)
