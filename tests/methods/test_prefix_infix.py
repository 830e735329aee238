"""The infix of prefix-layer tuning: keys and values that a prompt's last token, and what follows it, sees."""

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt import ends

BUILD = {"gpt2": partial(tiny.gpt2, initializer_range=0.3), "llama": partial(tiny.llama, initializer_range=0.3)}
ONE_LAYER = {"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
PRE, BACK = 3, 2
families = pytest.mark.parametrize("family", BUILD)
attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def filled(model: nn.Module, method: PrefixTuning, rows: slice = slice(None), name: str = "default") -> nn.Module:
    """The method with keys and values from one seed, of which it takes `rows`."""
    lk.attach(model, method, name=name)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lk.parameters(model, name):
            parameter.copy_(torch.randn(PRE + BACK, parameter.shape[1], generator=draw)[rows])
    return model


def inputs() -> Tensor:
    return torch.randint(3, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(5))


@families
@attention
@torch.no_grad()
def test_tokens_before_the_prompts_last_do_not_see_it(family: str, attention: str) -> None:
    x, lengths = inputs(), torch.tensor([4, 6])
    model = filled(BUILD[family](attn_implementation=attention), PrefixTuning(PRE, BACK))
    without = filled(BUILD[family](attn_implementation=attention), PrefixTuning(PRE), slice(PRE))(x).logits
    with ends(model, lengths):
        got = model(x).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, : length - 1], without[row, : length - 1], **CLOSE)
        assert (got[row, length - 1 :] - without[row, length - 1 :]).abs().amin(0).max() > 1e-3


@families
@attention
@torch.no_grad()
def test_the_others_see_it_as_a_prefix_without_positions(family: str, attention: str) -> None:
    """In one layer an output depends on what its own token sees alone: it is that of a longer prefix, seen by all."""
    x, lengths = inputs(), torch.tensor([1, 5])
    make = partial(BUILD[family], attn_implementation=attention, **ONE_LAYER[family])
    model = filled(make(), PrefixTuning(PRE, BACK))
    longer = filled(make(), PrefixTuning(PRE + BACK))
    expected = longer(x, position_ids=torch.arange(8)[None] - BACK).logits  # which it moves by PRE + BACK
    with ends(model, lengths):
        got = model(x, attention_mask=torch.ones_like(x)).logits
        padded = model(
            torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1),
            attention_mask=torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)], 1),
            position_ids=(torch.arange(11)[None] - 3).clamp(min=0),
        ).logits[:, 3:]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, length - 1 :], expected[row, length - 1 :], **CLOSE)
        torch.testing.assert_close(padded[row, length - 1 :], expected[row, length - 1 :], **CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_all_tokens_of_an_encoder_see_it(family: str) -> None:
    x, origin = inputs(), 2 if family == "roberta" else 0
    model = filled(tiny.MODELS[family](), PrefixTuning(PRE, BACK))
    longer = filled(tiny.MODELS[family](), PrefixTuning(PRE + BACK))
    positions = torch.arange(8).expand(2, -1) + origin + BACK
    expected = longer(x, position_ids=positions - BACK).logits
    torch.testing.assert_close(model(x, position_ids=positions).logits, expected, **CLOSE)


@families
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation_with_a_cache_is_generation_by_whole_forwards(family: str, beams: int) -> None:
    model = filled(BUILD[family](), PrefixTuning(PRE, BACK))
    x = inputs()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    cached = model.generate(x, attention_mask=torch.ones_like(x), **settings)
    with ends(model, torch.tensor([8, 8])):
        whole = model.generate(x, attention_mask=torch.ones_like(x), use_cache=False, **settings)
    assert torch.equal(cached, whole)
    left = torch.cat([torch.zeros(2, 2, dtype=torch.long), x], 1)
    got = model.generate(left, attention_mask=(torch.arange(10) >= 2).long().expand(2, -1), **settings)
    assert torch.equal(got[:, 10:], cached[:, 8:])


@families
@pytest.mark.parametrize("more", [{}, {"reparametrise": True, "hidden": 8}], ids=["plain", "mlp"])
def test_trains_with_checkpointing_and_comes_back(family: str, more: dict[str, Any], tmp_path: Any) -> None:
    model = BUILD[family]()
    for dropout in (one for one in model.modules() if isinstance(one, nn.Dropout)):
        dropout.p = 0.0
    method = PrefixTuning(PRE, BACK, **more)
    lk.attach(model, method, seed=1)
    x = inputs()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with ends(model, torch.tensor([3, 5])):
            loss = model(x, labels=x, use_cache=False).loss
        loss.backward()  # what is computed again is computed outside of `ends`
        grads.append([parameter.grad.clone() for parameter in lk.parameters(model, "default")])
    for one, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, one, **CLOSE)
    model.eval()
    lk.save(model, tmp_path)
    other = BUILD[family]()
    lk.load(other, tmp_path)
    assert torch.equal(other(x).logits, model(x).logits)
    assert not (tmp_path / "adapter_config.json").exists()  # PEFT has no infix
