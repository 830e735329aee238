"""The traced step against real ones on the CPU, and against the formulas of docs/plan.md."""

import sys

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.methods.lora import LoRA
from lorakit.plan import FULL, depth, plan
from lorakit.plan.trace import Work, trace
from lorakit.train.base_dropout import BaseDropout
from lorakit.train.loss import objective_for

WORK = Work(batch=3, length=32, task="causal-lm", checkpointing=False, device="cpu")


def saved_for_real(model: nn.Module, work: Work) -> int:
    """Bytes of the storages that autograd keeps after a real forward pass, parameters aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() > 1 and storage.data_ptr() not in own:
            kept.append(tensor.detach())  # so that no address is used twice
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, tiny.VOCAB, (work.batch, work.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    drawing = BaseDropout(model).drawing()  # as the trainer's step
    with drawing, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective_for(work.task).loss(model, batch)
    return sum(seen.values())


def dropping_gpt2() -> nn.Module:
    config = tiny.gpt2().config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
    return type(tiny.gpt2())(config)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama, dropping_gpt2], ids=["gpt2", "llama", "gpt2 that drops"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_what_the_forward_pass_keeps_is_what_autograd_keeps(build, adapted):
    model, ghost = build().train(), build().to("meta").train()
    for one in (model, ghost):
        if adapted:
            lk.attach(one, LoRA(r=4), name="a")
    assert trace(ghost, WORK).saved == pytest.approx(saved_for_real(model, WORK), rel=0.06)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_a_block_are_those_of_the_formulas(checkpointing):
    """Four blocks' share of the step: embeddings, head and loss cancel."""
    r, rows, length, width, inner = 8, 2, 32, 128, 192
    tokens, blocks = rows * length, 4
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 2}
    work = {"batch": rows, "length": length, "checkpointing": checkpointing}
    deep, short = (plan(tiny.llama(**sizes, num_hidden_layers=layers), LoRA(r=r), **work) for layers in (2 + blocks, 2))
    full, lora = (a.flops - b.flops for a, b in zip(deep.rows, short.rows, strict=True))
    sides = [(width, width), (width, width // 2), (width, width // 2), (width, width), *[(width, inner)] * 3]
    N, low = sum(a * b for a, b in sides), sum(r * (a + b) for a, b in sides)
    again = int(checkpointing)
    scores = rows * 2 * 2 * length**2 * width * (1 + 2.5 + again)  # two products forward, five back (FlashAttention)
    second = 2 * again * (N - inner * width)  # a checkpoint stops before the last product, whose output nothing keeps
    assert full == pytest.approx(blocks * (tokens * (6 * N + second) + scores), rel=0.001)
    assert lora == pytest.approx(blocks * (tokens * (4 * N + 6 * low + second) + scores), rel=0.02 + 0.1 * again)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_model_continued_is_the_model_traced_whole(monkeypatch, checkpointing):
    asked = [LoRA(r=8), LoRA(r=4, target_modules=["q", "v"])]
    options = {"batch": 2, "length": 48, "checkpointing": checkpointing}
    short = plan("smollm2-135m", asked, **options)
    monkeypatch.setattr(sys.modules["lorakit.plan.api"], "DEEP", 1000)  # lorakit.plan itself is the verb
    whole = plan("smollm2-135m", asked, **options)
    for a, b in zip(short.rows, whole.rows, strict=True):
        assert a.memory.peak == pytest.approx(b.memory.peak, rel=0.002)
        assert a.memory.activations == pytest.approx(b.memory.activations, rel=0.002)
        assert a.flops == pytest.approx(b.flops, rel=1e-6)


def test_unlike_blocks_are_traced_whole(monkeypatch):
    method = LoRA(r=4, target_modules=["q_proj"], layers_to_transform=[20, 21])
    short = plan("smollm2-135m", method, batch=1, length=16)
    monkeypatch.setattr(sys.modules["lorakit.plan.api"], "DEEP", 1000)  # lorakit.plan itself is the verb
    assert plan("smollm2-135m", method, batch=1, length=16) == short
    assert short.rows[1].trainable == 2 * 4 * (576 + 576)


def test_blocks_are_shortened_in_a_copy():
    model = tiny.llama(num_hidden_layers=3)
    paths = depth.blocks(model)
    assert len(depth.shortened(model, paths, 2).model.layers) == 2
    assert len(model.model.layers) == 3


def test_checkpointing_keeps_less_and_computes_more():
    kept, again = (plan("gpt2", FULL, batch=8, length=128, checkpointing=on).rows[0] for on in (False, True))
    assert again.memory.activations < kept.memory.activations / 2
    assert 1.1 < again.flops / kept.flops < 4 / 3  # the head is not computed again


def test_dropout_keeps_a_byte_an_entry_on_a_gpu_and_what_goes_on_a_cpu():
    config = tiny.gpt2().config
    config.resid_pdrop = config.embd_pdrop = 0.1
    config.attn_pdrop = 0.0
    sizes = {device: plan(config, FULL, length=32, device=device, task="causal-lm") for device in ("cuda", "cpu")}
    places = 1 + 2 * config.n_layer
    entries = 8 * 32 * config.n_embd * places
    kept = {device: found.rows[0].memory.activations for device, found in sizes.items()}
    assert kept["cuda"] - kept["cpu"] == pytest.approx(entries - 8 * entries / 10, abs=8 * places)


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 2), ("momentum", 1), ("sgd", 0), ("adam8bit", 0.5)])
def test_optimizer_state(optimizer, copies):
    memory = plan("minilm-l6", FULL, length=8, optimizer=optimizer).rows[0].memory
    assert memory.gradients == 4 * 22_713_986
    assert memory.optimizer == copies * memory.gradients


def test_half_precision_halves_weights():
    wide, narrow = (plan("gpt2", FULL, length=16, dtype=dtype).rows[0].memory for dtype in ("float32", "bfloat16"))
    assert narrow.weights * 2 == wide.weights
    assert plan("gpt2", LoRA(), length=16, dtype="bfloat16", adapter_dtype="float32").rows[1].checkpoint_bytes == (
        plan("gpt2", LoRA(), length=16).rows[1].checkpoint_bytes
    )
