"""What prefixes and prompts refuse, and what steps aside for them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.attach.alone import by_token, taken
from lorakit.errors import AdapterError, TargetError, UsageError
from lorakit.methods.body import cache_name, cache_of, named
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt import ends
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.methods.prompt_tuning import PromptTuning
from lorakit.methods.warp import Warp


@pytest.mark.parametrize(
    ("family", "method", "says"),
    [
        ("deberta", PrefixTuning(4), "does not take"),
        ("t5", PrefixTuning(4), "both"),
        ("t5", PromptTuning(4), "both"),
        ("bert", Warp(), "language-model head"),
        ("gpt2", PromptTuning(64), "64 positions"),
        ("llama", PrefixTuning(64), "64 positions"),
        ("roberta", PromptEmbedding(60, 4), "64 positions"),
        ("deberta", PTuning(64), "64 positions"),
        ("gpt2", PromptTuning(2, tokens=[500]), "vocabulary"),
        ("gpt2", PrefixTuning(1, tokens=[-1]), "vocabulary"),
        ("bert", PrefixTuning(1, tokens=[5]), "encoder"),
    ],
)
def test_what_a_model_cannot_take_is_refused_at_attach(family: str, method: Any, says: str) -> None:
    model = tiny.MODELS[family]()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((TargetError, UsageError), match=says):
        lk.attach(model, method)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not lk.adapters(model)


def test_no_transformers_model_is_refused() -> None:
    with pytest.raises(TargetError, match="transformers"):
        lk.attach(nn.Sequential(nn.Linear(4, 4)), PromptTuning(2))


@pytest.mark.parametrize(
    "wrong",
    [
        partial(PromptTuning, 0),
        partial(PromptTuning, True),
        partial(PromptTuning, 2.0),
        partial(PromptTuning, init="zeros"),
        partial(PromptTuning, modules_to_save="classifier"),
        partial(PromptEmbedding, 0, 0),
        partial(PromptEmbedding, -1, 3),
        partial(PrefixTuning, 0),
        partial(PrefixTuning, 3, hidden=5),
        partial(PrefixTuning, 3, tokens=[1, 2]),
        partial(PrefixTuning, 3, tokens=7),
        partial(PrefixTuning, 3, 10**30),
        partial(PromptTuning, 2, tokens=7),
        partial(PromptTuning, 2, tokens="ab"),
        partial(PTuning, 3, "gru"),
        partial(PTuning, 3, layers=0),
        partial(Warp, 1),
        partial(Warp, 2, init="mask"),
        partial(Warp, 2, True),
        partial(Warp, 2, verbaliser=[1, 2, 3]),
        partial(Warp, 2, verbaliser=7),
        partial(Warp, 2, verbaliser="ab"),
    ],
    ids=repr,
)
def test_wrong_settings(wrong: Any) -> None:
    with pytest.raises(UsageError):
        wrong()


@pytest.mark.parametrize("prompt", [PromptTuning(2), PromptEmbedding(2, 0), Warp()], ids=repr)
def test_an_infix_and_a_prompt_do_not_count_each_others_tokens(prompt: Any) -> None:
    for methods in ([PrefixTuning(2, 2), prompt], [prompt, PrefixTuning(2, 2)]):
        with pytest.raises(UsageError, match="the infix of prefix tuning"):
            lk.attach(tiny.llama(), methods)
    lk.attach(tiny.llama(), [PrefixTuning(2), prompt])


@pytest.mark.parametrize("method", [PrefixTuning(2, 2), PromptEmbedding(3, 2)], ids=repr)
@torch.no_grad()
def test_without_the_cache_generation_is_told_where_the_prompt_ends(method: Any) -> None:
    model = tiny.gpt2(initializer_range=0.3)
    lk.attach(model, method, seed=0)
    for parameter in lk.parameters(model, "default"):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    how: dict[str, Any] = {**tiny.batch(model), "max_new_tokens": 6, "do_sample": False}
    with ends(model, torch.tensor([7, 7, 7])):
        assert torch.equal(model.generate(**how, use_cache=False), model.generate(**how))  # type: ignore[operator]


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3), PromptEmbedding(2, 1)], ids=repr)
def test_they_are_on_or_off_one_at_a_time_and_for_all_rows(method: Any) -> None:
    model = tiny.llama()
    x = tiny.batch(model)["input_ids"]
    base = model(x).logits
    lk.attach(model, lk.LoRA(r=2), name="lora")
    lk.attach(model, method, name="a")
    lk.attach(model, PromptTuning(2), name="b")
    with pytest.raises(AdapterError, match="stands first"):
        lk.use(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(AdapterError, match=r"no strength of 0\.5"):
        lk.use(model, {"a": 0.5})
    with pytest.raises(AdapterError, match="one adapter at a time"):
        lk.route(model, ["a", None, "lora"])
    lk.use(model, {"a": 0.0})
    assert torch.equal(model(x).logits, base)
    assert by_token(model)
    lk.use(model, {"a": 1.0, "lora": 0.5})  # beside what adds no token, a fresh LoRA
    both = model(x).logits
    lk.use(model, "a")
    torch.testing.assert_close(model(x).logits, both)
    assert not by_token(model)
    assert taken(model) == 3
    with pytest.raises(lk.LorakitError, match="cannot be merged"):
        lk.merge(model, "a")


@pytest.mark.parametrize("beside", [PrefixTuning(3), PromptEmbedding(2, 2), PromptTuning(3)], ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta", "bert"])
def test_beside_lora_as_one_adapter(family: str, beside: Any, tmp_path: Any) -> None:
    model = tiny.MODELS[family]()
    batch, keys = tiny.batch(model, labels=True), {path: type(one) for path, one in model.named_modules()}
    base = model(**batch).logits
    lk.attach(model, [lk.LoRA(r=2), beside], name="both", seed=1)
    optimizer = torch.optim.Adam(lk.parameters(model, "both"), 0.01)
    first = model(**batch).loss
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < first
    trained = model(**batch).logits
    lk.save(model, tmp_path, name="both")
    again = tiny.MODELS[family]()
    lk.load(again, tmp_path)
    torch.testing.assert_close(again(**batch).logits, trained, rtol=0, atol=1e-6)
    lk.detach(model, "both")
    assert torch.equal(model(**batch).logits, base)
    assert {path: type(one) for path, one in model.named_modules()} == keys


def test_flash_attention_and_a_static_cache_are_refused() -> None:
    model = tiny.llama()
    x = tiny.batch(model)["input_ids"]
    lk.attach(model, PromptTuning(2))
    with pytest.raises(AdapterError, match="static"):
        model.generate(
            x, max_new_tokens=2, cache_implementation="static", pad_token_id=0, attention_mask=torch.ones_like(x)
        )
    lk.attach(model, PrefixTuning(2), name="p")
    with pytest.raises(AdapterError, match="static"):
        model.generate(
            x, max_new_tokens=2, cache_implementation="static", pad_token_id=0, attention_mask=torch.ones_like(x)
        )
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(AdapterError, match="'sdpa' or 'eager'"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
        )


def test_right_padded_prompts_with_an_infix_do_not_go_on_from_a_cache() -> None:
    model = tiny.llama()
    lk.attach(model, PromptEmbedding(1, 2))
    x = tiny.batch(model)["input_ids"]
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    cache = cache_of(model(x, attention_mask=mask, use_cache=True))
    with pytest.raises(AdapterError, match="left"):
        model(x[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=cache)


@pytest.mark.parametrize("method", [PromptEmbedding(1, 2), PrefixTuning(prefix_length=1, infix_length=2)])
def test_a_prompt_in_pieces_is_refused_with_an_infix(method: Any) -> None:
    """Behind which piece the infix stands cannot be told."""
    model = tiny.llama()
    lk.attach(model, method)
    x = tiny.batch(model)["input_ids"]
    cache = cache_of(model(x[:, :3], use_cache=True))
    with pytest.raises(AdapterError, match="still prompt"):
        model(x[:, 3:], past_key_values=cache)
    cache = cache_of(model(x[:, :3], use_cache=True))
    assert model(x[:, 3:4], past_key_values=cache).logits.shape[1] == 1


@pytest.mark.parametrize(
    "method",
    [PrefixTuning(prefix_length=2, tokens=[5, 6]), PromptTuning(length=2, tokens=[5, 6])],
)
@pytest.mark.parametrize("on", [PromptTuning(length=5), lk.LoRA(r=2, target_modules=["embed_tokens", "k_proj"])])
def test_a_start_from_tokens_is_the_bases_whatever_is_on(method: Any, on: Any) -> None:
    plain, model = tiny.llama(), tiny.llama()
    lk.attach(plain, method, name="a")
    lk.attach(model, on, name="on")
    with torch.no_grad():
        for tensor in lk.parameters(model, "on"):
            tensor.add_(torch.randn_like(tensor))
    lk.attach(model, method, name="a")
    for one, other in zip(lk.parameters(plain, "a"), lk.parameters(model, "a"), strict=True):
        assert torch.equal(one, other)


def test_ends_wants_a_length_a_row() -> None:
    model = tiny.llama()
    lk.attach(model, PromptEmbedding(1, 2))
    x = tiny.batch(model)["input_ids"]
    with pytest.raises(UsageError, match="2 lengths for a batch of 3"), ends(model, torch.tensor([1, 2])):
        model(x)
    with pytest.raises(UsageError, match="one number a row"), ends(model, torch.tensor(3)):
        pass
    assert "_lk_ends" not in model.model.__dict__


def test_training_steps_aside_for_added_tokens() -> None:
    from lorakit.train.packed import packing_for
    from lorakit.train.prefix import find_prefix
    from lorakit.train.prune import last_block_pruned

    model = tiny.roberta()
    batch = tiny.batch(model)
    lk.attach(model, PromptTuning(3))
    whole = model(**batch).logits
    with last_block_pruned(model, batch):
        assert torch.equal(model(**batch).logits, whole)
    with pytest.raises(UsageError, match="tokens of its own"):
        packing_for(model, "sequence-classification", pad_id=1)
    with pytest.raises(UsageError, match="tokens of its own"):
        find_prefix(model, batch)
    lk.use(model, None)
    assert packing_for(model, "sequence-classification", pad_id=1)


@dataclass
class Limit:
    model_max_length: int = 10**9


def test_a_row_has_the_positions_that_are_left() -> None:
    from lorakit.models.limits import longest_row

    for family, method, left in (
        ("gpt2", PrefixTuning(20), 44),
        ("roberta", PromptTuning(20), 44),
        ("llama", PromptEmbedding(20, 4), 40),
    ):
        model = tiny.MODELS[family]()
        lk.attach(model, method)
        assert longest_row(model, Limit()) == left
        x = torch.randint(3, tiny.VOCAB, (1, left))
        model(x)
        if family != "llama":  # rotations have no table that ends
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.cat([x, x[:, :1]], 1))
        lk.use(model, None)
        assert longest_row(model, Limit()) == 64


class _Takes(torch.nn.Module):
    def forward(self, x: int, cache: object = None) -> object:
        return cache


class _Took(torch.nn.Module):
    def forward(self, x: int, past_key_values: object = None) -> object:
        return past_key_values


@pytest.mark.parametrize(("module", "name"), [(_Takes(), "cache"), (_Took(), "past_key_values")])
def test_a_cache_is_found_under_the_name_of_transformers_version(module: torch.nn.Module, name: str) -> None:
    """5.24 calls it otherwise, and its forwards take the old name still: an operation stands before that."""
    assert cache_name(module) == name
    assert named(module, (1,), {"past_key_values": "held"}) == {"x": 1, name: "held"}
    assert cache_name(torch.nn.Linear(1, 1)) is None
    assert named(torch.nn.Linear(1, 1), (), {"cache": 1}) == {"cache": 1}
