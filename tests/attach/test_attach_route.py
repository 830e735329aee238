"""Rows of one batch with adapters of their own: each as it is alone."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, UsageError

ROWS = ["a", None, "b", "a"]
# DeBERTa projects its relative positions once for all rows, by the same layers as queries and keys
TARGETS = {"deberta": ["value_proj", "dense"]}


def model_of(kind, **fields):
    model = tiny.MODELS[kind]()
    for name, rank in (("a", 4), ("b", 2)):
        target = TARGETS.get(kind, "all-linear")
        lk.attach(model, lk.LoRA(**({"r": rank, "alpha": 6, "target_modules": target} | fields)), name=name, seed=rank)
        adapting.grow(model, name, rank)
    return model


def row_of(inputs, row):
    return {key: value[row : row + 1] for key, value in inputs.items()}


def check_rows(model, inputs, **how):
    alone = []
    for row, name in enumerate(ROWS):
        lk.use(model, name)
        alone.append(adapting.logits(model, row_of(inputs, row)))
    lk.use(model, None)
    base = adapting.logits(model, inputs)
    with lk.route(model, ROWS, **how):
        together = adapting.logits(model, inputs)
        recorded = model(**inputs).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorded, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, base, atol=1e-4)
    assert torch.equal(adapting.logits(model, inputs), base)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", adapting.FIVE)
def test_each_row_as_alone(kind, strict):
    model = model_of(kind)
    check_rows(model, tiny.batch(model, rows=4), strict=strict)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert", "t5"])
def test_bias_and_head_replaced_per_row(kind):
    head = {"modules_to_save": ["classifier"]} if kind in ("roberta", "bert") else {}
    model = model_of(kind, bias="all" if kind != "t5" else "none", **head)
    check_rows(model, tiny.batch(model, rows=4))


@pytest.mark.parametrize("kind", ["roberta", "llama", "t5"])
def test_embeddings_per_row(kind):
    model = model_of(kind, target_modules=[adapting.EMBEDDINGS[kind]])
    check_rows(model, tiny.batch(model, rows=4))


@pytest.mark.parametrize(("kind", "target"), [("gpt2", "wpe"), ("deberta", "query_proj")])
def test_a_layer_that_all_rows_share_is_an_error_not_a_mixture(kind, target):
    model = model_of(kind, target_modules=[target])
    inputs = tiny.batch(model, rows=4, length=8)
    with lk.route(model, ROWS), pytest.raises(AdapterError, match="one thing for all rows"):
        model(**inputs)


@pytest.mark.parametrize("names", [ROWS, ["a", "b", None]])
def test_tokens_of_a_packed_row(names):
    model = model_of("llama", target_modules=["q_proj", "down_proj"])
    packed = torch.randn(1, len(names), 32)
    leaf = model.model.layers[0].self_attn.q_proj
    expected = []
    for position, name in enumerate(names):
        lk.use(model, name)
        expected.append(leaf(packed[:, position : position + 1]))
    with lk.route(model, names, per="token"):
        torch.testing.assert_close(leaf(packed), torch.cat(expected, 1))
        torch.testing.assert_close(leaf(packed[0]), torch.cat(expected, 1)[0])
    with lk.route(model, names), pytest.raises(AdapterError, match="received 1"):
        leaf(packed)


def test_flattened_rows():
    model = model_of("gpt2", target_modules=["c_attn"])
    leaf, x = model.transformer.h[0].attn.c_attn, torch.randn(4, 5, 32)
    with lk.route(model, ROWS):
        torch.testing.assert_close(leaf(x.view(20, 32)).view(4, 5, -1), leaf(x))


@pytest.mark.parametrize("rows", [3, 5, 6])
def test_other_numbers_of_rows_are_an_error(rows):
    model = model_of("gpt2")
    with lk.route(model, ROWS), pytest.raises(AdapterError, match=f"given 4 rows, but a layer received {rows}"):
        model(**tiny.batch(model, rows=rows))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_strict_low_rank_part_has_the_bits_it_has_alone(kind):
    model = model_of(kind)
    leaf = model.get_submodule("transformer.h.0.mlp.c_fc" if kind == "gpt2" else "model.layers.0.mlp.up_proj")
    with torch.no_grad():  # a base of zeros leaves the low-rank part alone
        for parameter in (leaf._parameters["weight"], leaf._parameters.get("bias")):
            if parameter is not None:
                parameter.zero_()
        x = torch.randn(4, 7, 32)
        with lk.route(model, ROWS, strict=True):
            together = leaf(x)
        for row, name in enumerate(ROWS):
            with lk.route(model, [name], strict=True):
                assert torch.equal(leaf(x[row : row + 1])[0], together[row])
        assert not together[1].any()
        assert together[0].any()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generated_rows_equal_each_row_alone(kind, beams):
    model = model_of(kind)
    lengths = [7, 4, 5, 6]
    ids = tiny.batch(model, rows=4)["input_ids"]
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):  # padded on the left
        ids[row, : 7 - length], mask[row, : 7 - length] = 0, 0
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    new = 6
    with lk.route(model, ROWS):
        together = model.generate(input_ids=ids, attention_mask=mask, **how)
    for row, name in enumerate(ROWS):
        lk.use(model, name)
        own = {"input_ids": ids[row : row + 1, 7 - lengths[row] :]}
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        alone = model.generate(**own, **how)
        assert together[row, -new:].tolist() == alone[0, -new:].tolist()


def test_gradients_reach_each_adapter_from_its_own_rows():
    model = model_of("llama")
    inputs = tiny.batch(model, rows=4)
    with lk.route(model, ROWS):
        model(**inputs).logits.square().sum().backward()
    together = {name: [p.grad.clone() for p in lk.parameters(model, name)] for name in "ab"}
    for name in "ab":
        rows = [row for row, other in enumerate(ROWS) if other == name]
        model.zero_grad(set_to_none=True)
        for p in lk.parameters(model, name):
            p.grad = None
        lk.use(model, name)
        model(**{key: value[rows] for key, value in inputs.items()}).logits.square().sum().backward()
        for p, grad in zip(lk.parameters(model, name), together[name], strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-3)


def test_state_after_an_error_within():
    model = model_of("gpt2")
    lk.use(model, "b")
    inputs = tiny.batch(model, rows=4)
    before = adapting.logits(model, inputs)
    with pytest.raises(AdapterError), lk.route(model, ROWS):
        model(**tiny.batch(model, rows=3))
    assert torch.equal(adapting.logits(model, inputs), before)
    with pytest.raises(RuntimeError), lk.route(model, ROWS):
        model.transformer.h[0].attn.c_attn(torch.ones(4, 31))  # the base's own forward fails
    assert torch.equal(adapting.logits(model, inputs), before)


def test_detach_within_a_route_ends_it():
    model = model_of("gpt2")
    inputs = tiny.batch(model, rows=4)
    with lk.use(model, None):
        base = adapting.logits(model, inputs)
    lk.route(model, ROWS)
    lk.detach(model, "a")
    assert torch.equal(adapting.logits(model, inputs), base)
    assert not lk.adapters(model)["b"].active


def test_layer_that_cannot_take_rows_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) * self.gain

    model = nn.ModuleDict({"odd": Odd(), "linear": nn.Linear(4, 4)})
    lk.attach(model, lk.LoRA(r=2, target_modules=["linear"], exclude_modules=["odd.linear"], modules_to_save=["odd"]))
    with lk.route(model, ["default", None]), pytest.raises(AdapterError, match="one adapter at a time"):
        model["odd"](torch.ones(2, 4))


def test_wrong_routes_are_refused():
    model = model_of("gpt2")
    for rows in ("a", [], ()):
        with pytest.raises(UsageError, match="a list with one adapter name"):
            lk.route(model, rows)
    with pytest.raises(UsageError, match="'row' or 'token'"):
        lk.route(model, ROWS, per="beam")
    with pytest.raises(AdapterError, match="unknown adapter 'c'"):
        lk.route(model, ["a", "c"])
    assert lk.adapters(model)["b"].active
