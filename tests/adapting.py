"""What the tests of attach share: adapters with random values, snapshots of a model, explicit W + s B A models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.host import Host, find_host

FIVE = ("gpt2", "roberta", "deberta", "llama", "t5")
EMBEDDINGS = {
    "gpt2": "wte",
    "roberta": "word_embeddings",
    "deberta": "word_embeddings",
    "llama": "embed_tokens",
    "t5": "embed_tokens",
}
HEADS = {"gpt2": "ln_f", "roberta": "classifier", "deberta": "classifier", "llama": "lm_head", "t5": "final_layer_norm"}


def host(model: nn.Module) -> Host:
    found = find_host(model)
    assert found is not None
    return found


def grow(model: nn.Module, name: str, seed: int = 0, std: float = 0.1) -> None:
    """Give every tensor of an adapter random values, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in host(model).records[name].tensors():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * std)


def attached(kind: str, *names: str, seed: int = 0, **fields: Any) -> nn.Module:
    """A tiny model with grown adapters; the last is on."""
    model = tiny.MODELS[kind]()
    for number, name in enumerate(names):
        lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8} | fields)), name=name, seed=seed + number)
        grow(model, name, seed + number)
    return model


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that attach could change: state dict bits, classes, flags, every module's `__dict__` (order aside)."""
    return {
        "state": {key: (value.dtype, value.clone()) for key, value in model.state_dict().items()},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "dicts": {path: _frozen(module.__dict__) for path, module in model.named_modules()},
    }


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = (dict, set)
    return {key: copy.copy(value) if isinstance(value, inner) else value for key, value in values.items()}


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    assert list(before["state"]) == list(after["state"])
    for key, (dtype, value) in before["state"].items():
        assert after["state"][key][0] == dtype, key
        assert torch.equal(after["state"][key][1], value), key
    for part in ("classes", "flags", "parameters"):
        assert before[part] == after[part], part
    for path, values in before["dicts"].items():
        other = after["dicts"][path]
        assert set(values) == set(other), path
        for key, value in values.items():
            assert _same(value, other[key]), (path, key)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a is b
    return a is b or bool(a == b)


def explicit(kind: str, model: nn.Module, weights: Mapping[str, float]) -> nn.Module:
    """A plain model of the same family whose weights are W + sum of strength * alpha / r * B A, written out in float64."""
    plain = tiny.MODELS[kind]()
    for name, strength in weights.items():
        draft = host(model).records[name].draft
        for path, pair in draft.pairs.items():
            leaf = plain.get_submodule(path)
            A, Bt = pair.A.detach().double(), pair.Bt.detach().double()
            if isinstance(leaf, nn.Embedding):
                delta = A @ Bt  # (vocab, dim)
            else:
                delta = A.T @ Bt if type(leaf).__name__ == "Conv1D" else Bt.T @ A
            weight = (leaf.weight.detach().double() + strength * pair.scale * delta).float()
            leaf.weight = nn.Parameter(weight)  # its own: tied weights stay as they are elsewhere
    return plain
