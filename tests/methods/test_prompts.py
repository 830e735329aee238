"""Prompts and prefixes that start from tokens' own embeddings (or keys and values) are those tokens, read before the input:
the base itself is the reference."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.body import cache_of
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt import ends
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.methods.prompt_tuning import PromptTuning

WORDS = [7, 31, 12, 55]
BEHIND = [40, 9]
P, BACK = len(WORDS), len(BEHIND)
# weights wide enough that a greedy answer is not one token again and again, and no dropout to draw
DECODERS = {
    "gpt2": partial(tiny.gpt2, initializer_range=0.3, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "llama": partial(tiny.llama, initializer_range=0.3),
    "opt": partial(tiny.opt, init_std=0.3, dropout=0.0),
}
ENCODERS = {"roberta": tiny.roberta, "bert": tiny.bert, "deberta": tiny.deberta}
decoders = pytest.mark.parametrize("family", DECODERS)
attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
methods = pytest.mark.parametrize(
    "method",
    [PromptTuning(P, tokens=WORDS), PrefixTuning(P, tokens=WORDS)],
    ids=["prompt", "prefix"],
)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def after(words: list[int], x: Tensor) -> Tensor:
    """The rows with the words in front."""
    return torch.cat([torch.tensor(words).expand(x.shape[0], -1), x], 1)


def padded(rows: list[Tensor], side: str, pad: int = 0) -> dict[str, Tensor]:
    width = max(map(len, rows))
    out: list[list[Tensor]] = []
    for row in rows:
        fill, one = torch.full((width - len(row),), pad), torch.ones_like(row)
        none = torch.zeros_like(fill)
        pair = ((row, fill), (one, none)) if side == "right" else ((fill, row), (none, one))
        out.append([torch.cat(part) for part in pair])
    return {"input_ids": torch.stack([a for a, _ in out]), "attention_mask": torch.stack([b for _, b in out])}


def infixed(model: nn.Module) -> None:
    """A prefix of WORDS and an infix of BEHIND as prefix-embedding tuning would have learnt them."""
    lk.attach(model, PromptEmbedding(P, BACK), name="a")
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter, words in zip(lk.parameters(model, "a"), (WORDS, BEHIND), strict=True):
            parameter.copy_(table[torch.tensor(words)])


@decoders
@methods
@attention
@torch.no_grad()
def test_a_decoder_reads_them_as_the_tokens_that_they_start_from(family: str, method: Any, attention: str) -> None:
    model = DECODERS[family](attn_implementation=attention)
    x = ids(3, 6)
    expected = model(after(WORDS, x), output_hidden_states=True)
    lk.attach(model, method)
    for more in ({}, {"attention_mask": torch.ones_like(x)}, {"position_ids": torch.arange(6)[None]}):
        got = model(x, output_hidden_states=True, **more)
        torch.testing.assert_close(got.logits, expected.logits[:, P:], **CLOSE)
        for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(mine, theirs[:, P:], **CLOSE)
    lk.use(model, None)
    assert not torch.allclose(model(x).logits, expected.logits[:, P:], atol=1e-3)


@decoders
@methods
@attention
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_is_what_it_is_alone_however_it_is_padded(family: str, method: Any, attention: str, side: str) -> None:
    model = DECODERS[family](attn_implementation=attention)
    rows = [ids(1, length, length)[0] for length in (3, 7, 5)]
    alone = [model(after(WORDS, row[None])).logits[0, P:] for row in rows]
    lk.attach(model, method)
    batch = padded(rows, side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = model(**batch, position_ids=positions).logits
    for number, expected in enumerate(alone):
        torch.testing.assert_close(got[number][batch["attention_mask"][number].bool()], expected, **CLOSE)


@decoders
@methods
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_goes_on_as_after_the_tokens(family: str, method: Any, how: dict[str, Any]) -> None:
    model = DECODERS[family]()
    rows = [ids(1, length, length + 9)[0] for length in (4, 6)]
    batch = padded(rows, "left")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    front = torch.tensor(WORDS).expand(2, -1)
    whole = padded([torch.cat([front[0], row]) for row in rows], "left")
    expected = model.generate(**whole, **settings)[:, whole["input_ids"].shape[1] :]
    lk.attach(model, method)
    got = model.generate(**batch, **settings)
    assert torch.equal(got[:, batch["input_ids"].shape[1] :], expected)
    lk.use(model, None)
    assert not torch.equal(model.generate(**batch, **settings)[:, 6:], expected)


@decoders
@attention
@torch.no_grad()
def test_an_infix_stands_behind_each_prompt(family: str, attention: str) -> None:
    model = DECODERS[family](attn_implementation=attention)
    prompts = [ids(1, length, length)[0] for length in (3, 5)]
    answers = [ids(1, length, length + 20)[0] for length in (4, 3)]
    alone = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.cat([torch.tensor(WORDS), prompt, torch.tensor(BEHIND), answer])
        logits = model(row[None]).logits[0]
        at = [*range(P, P + len(prompt) - 1), *range(P + len(prompt) + BACK - 1, len(row))]
        alone.append(logits[at])
    infixed(model)
    for side in ("left", "right"):
        batch = padded([torch.cat(pair) for pair in zip(prompts, answers, strict=True)], side)
        with ends(model, torch.tensor([len(prompt) for prompt in prompts])):
            got = model(**batch).logits
        for number, expected in enumerate(alone):
            torch.testing.assert_close(got[number][batch["attention_mask"][number].bool()], expected, **CLOSE)


@decoders
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_an_infix(family: str, beams: int) -> None:
    model = DECODERS[family]()
    rows = [ids(1, length, length + 3)[0] for length in (4, 6)]
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    around = [torch.cat([torch.tensor(WORDS), row, torch.tensor(BEHIND)]) for row in rows]
    whole, batch = padded(around, "left"), padded(rows, "left")
    expected = model.generate(**whole, **settings)[:, whole["input_ids"].shape[1] :]
    infixed(model)
    assert torch.equal(model.generate(**batch, **settings)[:, 6:], expected)


@pytest.mark.parametrize("family", ENCODERS)
@attention
@torch.no_grad()
def test_an_encoder_reads_a_prompt_as_its_tokens(family: str, attention: str) -> None:
    model = ENCODERS[family](attn_implementation="eager" if family == "deberta" else attention)
    pad = model.config.pad_token_id
    rows = [ids(1, length, length)[0] for length in (4, 7)]
    whole = padded([torch.cat([torch.tensor(WORDS), row]) for row in rows], "right", pad)
    expected = model(**whole, output_hidden_states=True)
    lk.attach(model, PromptTuning(P, tokens=WORDS))
    batch = padded(rows, "right", pad)
    got = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(
        got.logits, expected.logits, **CLOSE
    )  # the head reads position 0: the first virtual token
    real = batch["attention_mask"].bool()[:, 1:]
    torch.testing.assert_close(
        got.hidden_states[-1][:, 1:][real], expected.hidden_states[-1][:, P + 1 :][real], **CLOSE
    )


@pytest.mark.parametrize("family", ["roberta", "bert"])
@torch.no_grad()
def test_an_encoders_rows_do_not_depend_on_padding(family: str) -> None:
    model = ENCODERS[family]()
    rows = [ids(1, length, length)[0] for length in (4, 7)]
    for method in (PromptTuning(3), PrefixTuning(3), PromptEmbedding(2, 2)):
        lk.attach(model, method, seed=0)
        alone = [model(row[None]).logits[0] for row in rows]
        for side in ("left", "right") if isinstance(method, PromptTuning) else ("right",):
            got = model(**padded(rows, side, model.config.pad_token_id)).logits
            torch.testing.assert_close(got, torch.stack(alone), **CLOSE)
        lk.detach(model, "default")


@decoders
@methods
def test_gradients_with_and_without_checkpointing(family: str, method: Any) -> None:
    model = DECODERS[family]()
    lk.attach(model, [method, lk.LoRA(r=2)], seed=0)
    x = ids(2, 6)
    batch = {"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)}
    model.train()
    model(**batch, use_cache=False).loss.backward()
    plain = [parameter.grad.clone() for parameter in lk.parameters(model, "default")]
    twin = copy.deepcopy(model).double()
    for one in (model, twin):
        one.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, use_cache=False).loss.backward()
    twin(**batch, use_cache=False).loss.backward()
    for one, again, exact in zip(plain, lk.parameters(model, "default"), lk.parameters(twin, "default"), strict=True):
        torch.testing.assert_close(again.grad, one, **CLOSE)
        torch.testing.assert_close(
            one.double(), exact.grad, rtol=1e-3, atol=1e-5 * float(exact.grad.abs().max()) + 1e-7
        )
    assert plain[-1].abs().max() > 0  # the method's own; a fresh LoRA's A has none yet


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@methods
@torch.no_grad()
def test_masks_of_queries_and_keys(family: str, method: Any) -> None:
    """A mask that keeps two halves of a row apart: each half sees the prefix and itself."""
    model = DECODERS[family]()
    halves = [ids(1, 4, 1), ids(1, 3, 2)]
    alone = torch.cat([model(after(WORDS, half)).logits[:, P:] for half in halves], 1)
    lk.attach(model, method)
    segments = torch.tensor([0] * 4 + [1] * 3)
    mask = ((segments[:, None] == segments[None]).tril())[None, None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        got = model(torch.cat(halves, 1), attention_mask=given, position_ids=positions).logits
        torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("family", DECODERS)
@methods
def test_a_cache_that_is_handed_on(family: str, method: Any) -> None:
    model = DECODERS[family]()
    x = ids(2, 7)
    lk.attach(model, method)
    with torch.no_grad():
        whole = model(x).logits
        first = model(x[:, :3], use_cache=True)
        more = model(x[:, 3:], past_key_values=cache_of(first), attention_mask=torch.ones_like(x), use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, more.logits], 1), whole, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", [PromptTuning(3), PromptEmbedding(2, 2), PrefixTuning(2, 2), PTuning(3)], ids=repr)
def test_copies_pickles_and_double_models(family: str, method: Any) -> None:
    model = DECODERS[family]()
    lk.attach(model, method, seed=0)
    x = ids(2, 5)
    with torch.no_grad():
        here = model(x).logits
        assert torch.equal(copy.deepcopy(model)(x).logits, here)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, here)
        torch.testing.assert_close(model.double()(x).logits, here.double(), **CLOSE)


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=repr)
def test_a_classifier_on_a_decoder_reads_its_last_token(method: Any) -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny.llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    lk.attach(model, method, seed=0)
    rows = [ids(1, length, length)[0] for length in (4, 7)]
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in rows])
        torch.testing.assert_close(model(**padded(rows, "right")).logits, alone, **CLOSE)


def test_the_loss_of_training_and_the_perplexity_place_the_infix_behind_the_prompt() -> None:
    from lorakit.data import Encoded
    from lorakit.generate.likelihood import mean_nll
    from lorakit.train.loss import objective_for

    model = DECODERS["llama"]()
    prompts = [ids(1, length, length)[0] for length in (3, 5)]
    answers = [ids(1, length, length + 20)[0] for length in (4, 3)]
    total = torch.zeros(())
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.cat([torch.tensor(WORDS), prompt, torch.tensor(BEHIND), answer])
        with torch.no_grad():
            logits = model(row[None]).logits[0, -len(answer) - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, answer, reduction="sum")
    infixed(model)
    batch = padded([torch.cat(pair) for pair in zip(prompts, answers, strict=True)], "right")
    labels = batch["input_ids"].clone()
    for row, prompt, answer in zip(labels, prompts, answers, strict=True):
        row[: len(prompt)] = -100
        row[len(prompt) + len(answer) :] = -100
    found = objective_for("causal-lm").loss(model, {**batch, "labels": labels})
    assert found.targets == 7
    torch.testing.assert_close(found.total.detach(), total, **CLOSE)
    rows = [
        Encoded([*prompt.tolist(), *answer.tolist()], [-100] * len(prompt) + answer.tolist(), 0)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert mean_nll(model, rows) == pytest.approx(float(total) / 7, rel=1e-4)


WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3": ("Gemma3TextConfig", {**WIDE, "num_key_value_heads": 2, "head_dim": 8}),  # scales its embeddings
    "mistral": ("MistralConfig", {**WIDE, "num_key_value_heads": 2}),  # a sliding window
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),  # no positions, attention says not that it is causal
}


@pytest.mark.parametrize("family", OTHERS)
@methods
@torch.no_grad()
def test_decoders_of_other_kinds(family: str, method: Any) -> None:
    import transformers

    name, values = OTHERS[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=tiny.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **values
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if family == "bloom" and isinstance(method, PrefixTuning):
        with pytest.raises(lk.LorakitError, match="prefix tuning"):
            lk.attach(model, method)
        return
    x = ids(2, 6)
    expected = model(after(WORDS, x)).logits[:, P:]
    lk.attach(model, method)
    torch.testing.assert_close(model(x).logits, expected, **CLOSE)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_p_tuning_under_autocast(encoder: str) -> None:
    """torch has no LSTM in bfloat16 on every CPU: the prompt's encoder keeps its own type."""
    model = tiny.llama()
    lk.attach(model, PTuning(2, encoder=encoder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tiny.batch(model)).logits.float().square().mean()
    loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in lk.parameters(model, "default"))
