"""WARP on masked and causal language models, against the base run on the very tokens and the head by hand."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.warp import Warp

MASK = 4


def masked(kind: str, like: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(like().config)
    return model.eval()


MODELS = {
    "bert": lambda: masked("BertForMaskedLM", tiny.bert),
    "roberta": lambda: masked("RobertaForMaskedLM", tiny.roberta),
    "deberta": lambda: masked("DebertaV2ForMaskedLM", tiny.deberta),
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_scores_are_the_heads_states_at_the_mask_times_the_classes(family: str) -> None:
    """Trained tokens that are the embeddings of [MASK] (the paper's start) and classes that are words' rows: the logits are the
    language model's own for those words, at the [MASK] of `M M x M [MASK]`."""
    model = MODELS[family]()
    words, pad = [10, 20, 30], model.config.pad_token_id
    rows = [torch.tensor([11, 12, 13]), torch.tensor([21, 22, 23, 24, 25])]
    expected = []
    head = model.get_output_embeddings()
    bias = 0 if head.bias is None else head.bias[words]
    for row in rows:
        whole = torch.cat([torch.full((2,), MASK), row, torch.full((2,), MASK)])[None]
        expected.append(model(input_ids=whole).logits[0, -1, words] - bias)
    lk.attach(model, Warp(3, MASK, 2, 1, verbaliser=words, init="mask"))
    width = max(map(len, rows))
    batch = torch.stack([torch.cat([row, torch.full((width - len(row),), pad)]) for row in rows])
    output = model(input_ids=batch, attention_mask=(batch != pad).long(), labels=torch.tensor([1, 2]))
    torch.testing.assert_close(output.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([1, 2])))


@pytest.mark.parametrize("family", MODELS)
def test_trains_and_comes_back_from_its_folder(family: str, tmp_path: Any) -> None:
    model = MODELS[family]()
    x, labels = torch.randint(5, tiny.VOCAB, (6, 5)), torch.ones(6, dtype=torch.long)
    mask, base = torch.ones_like(x), model(x).logits
    method = Warp(2, None if family in ("gpt2", "llama") else MASK, 2, 2)
    trained = lk.attach(model, method, seed=0).trainable
    assert trained == (2 + 2 + 2 + (method.mask_token_id is None)) * 32
    optimizer = torch.optim.Adam(lk.parameters(model, "default"), 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=x, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(parameter.grad.abs().max() > 0 for parameter in lk.parameters(model, "default"))
    assert losses[-1] < 0.9 * losses[0]
    expected = model(input_ids=x, attention_mask=mask).logits
    lk.save(model, tmp_path)
    again = MODELS[family]()
    lk.load(again, tmp_path)
    assert lk.verify(tmp_path, MODELS[family]()).ok
    torch.testing.assert_close(again(input_ids=x, attention_mask=mask).logits, expected, rtol=0, atol=1e-6)
    lk.detach(model, "default")
    assert torch.equal(model(x).logits, base)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_classifier_writes_no_text(use_cache: bool) -> None:
    model = tiny.llama()
    lk.attach(model, Warp())
    with pytest.raises(AdapterError, match="writes no text"):
        model.generate(**tiny.batch(model), max_new_tokens=2, use_cache=use_cache)  # type: ignore[operator]
    lk.use(model, None)
    assert model.generate(**tiny.batch(model), max_new_tokens=2, use_cache=use_cache).shape[0] == 3  # type: ignore[operator]


def test_labels_are_one_a_row() -> None:
    model = tiny.llama()
    lk.attach(model, Warp())
    x = tiny.batch(model)["input_ids"]
    with pytest.raises(UsageError, match=r"expected labels of shape \(3,\)"):
        model(x, labels=x)
    assert model(x, labels=torch.tensor([[0], [1], [1]])).loss > 0  # a column of them is as good
