"""The loss through the head in chunks, against the loss from the model's own logits."""

import contextlib

import adapting
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit as lk
from lorakit.core import cross_entropy, kernels
from lorakit.train import head
from lorakit.train.loss import objective_for

TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 3)
    monkeypatch.setattr(cross_entropy, "PIECE", 7)
    monkeypatch.setattr(head, "CHUNK", 3)


def batch_of(model):
    batch = dict(tiny.batch(model, rows=4))
    ids = batch["input_ids"]
    labels = ids.clone()
    labels[:, :2] = -100
    labels[1, 3:] = -100
    batch.pop("decoder_input_ids", None)
    return {**batch, "labels": labels}


def measured(model, task, smoothing):
    part = objective_for(task, label_smoothing=smoothing).loss(model, batch_of(model))
    part.total.backward()
    found = [part.total.detach().double(), *(one.grad.clone() for one in lk.parameters(model, "a"))]
    for one in lk.parameters(model, "a"):
        one.grad = None
    return found, part.targets


FIELDS = {
    "frozen head": {"target_modules": "all-linear"},
    "adapted head": {"target_modules": ["lm_head", "q", "q_proj", "c_attn"]},
    "trained head": {"target_modules": ["q", "q_proj", "c_attn"], "modules_to_save": ["lm_head"]},
    "tied embedding": {"target_modules": ["wte", "embed_tokens", "q", "q_proj", "c_attn"]},
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", TASKS)
def test_loss_and_gradients_are_those_from_the_logits(kind, fields, smoothing, monkeypatch):
    model = tiny.MODELS[kind]().double()
    lk.attach(model, lk.LoRA(r=3, **FIELDS[fields]), name="a")
    adapting.grow(model, "a")
    found, targets = measured(model, TASKS[kind], smoothing)
    monkeypatch.setattr(kernels, "fused", False)
    expected, count = measured(model, TASKS[kind], smoothing)
    assert targets == count
    assert any(one.abs().max() > 1e-3 for one in expected[1:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)  # the plain path rounds logits to float32


class Largest(TorchDispatchMode):
    """The most rows that any tensor of the vocabulary's width had."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.dim() > 1
                and leaf.shape[-1] == self.width
                and leaf.is_contiguous()
            ):
                self.rows = max(self.rows, leaf.numel() // self.width)
        return out


@pytest.mark.parametrize(("fields", "rows"), [("frozen head", 0), ("adapted head", 3)])
def test_no_more_logits_than_a_chunk_ever_stand(fields, rows):
    """A frozen head's are never there over the whole vocabulary."""
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=3, **FIELDS[fields]), name="a")
    with Largest(model.config.vocab_size) as seen:
        measured(model, "causal-lm", 0.0)
    assert seen.rows == rows


def test_a_model_that_caps_its_logits_runs_as_it_is(monkeypatch):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    lk.attach(model, lk.LoRA(r=3), name="a")
    adapting.grow(model, "a")
    found, _ = measured(model, "causal-lm", 0.0)
    again, _ = measured(model, "causal-lm", 0.0)
    monkeypatch.setattr(kernels, "fused", False)
    expected, _ = measured(model, "causal-lm", 0.0)
    for one, other, third in zip(found, expected, again, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(third, other)


def test_trying_a_model_draws_no_random_numbers(monkeypatch):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=3, dropout=0.5), name="a")
    adapting.grow(model, "a")
    model.train()
    monkeypatch.setattr(head, "_through", lambda _: contextlib.nullcontext([]))  # as if the head's input were lost
    torch.manual_seed(1)
    tried, _ = measured(model, "causal-lm", 0.0)
    torch.manual_seed(1)
    known, _ = measured(model, "causal-lm", 0.0)
    assert torch.equal(tried[0], known[0])


def test_a_batch_without_any_target_has_loss_zero():
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=3), name="a")
    batch = batch_of(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    part = objective_for("causal-lm").loss(model, batch)
    assert (float(part.total.detach()), part.targets) == (0.0, 0)
    part.total.backward()
