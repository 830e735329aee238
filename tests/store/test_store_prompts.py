"""Folders of prompts and prefixes that are damaged, foreign or of another model: every fault is told, nothing is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit as lk
from lorakit.errors import FileError
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.methods.prompt_tuning import PromptTuning
from lorakit.methods.warp import Warp

TENSORS, CONFIG, EXTRA = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"


def folder(tmp_path: Path, method: Any, family: str = "bert") -> Path:
    model = tiny.MODELS[family]()
    lk.attach(model, method, seed=0)
    return lk.save(model, tmp_path / "a")


def rewritten(path: Path, change: Any) -> None:
    """The folder as another program would have written it (no lorakit.json), with changed tensors or configuration."""
    (path / EXTRA).unlink(missing_ok=True)
    tensors, config = load_file(path / TENSORS), json.loads((path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config))


def put(**values: Any) -> Any:
    return lambda tensors, config: config.update(values)


def tensor(key: str, value: Tensor | None) -> Any:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value

    return change


PROMPT = PromptTuning(4, modules_to_save=["classifier"])


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        (PROMPT, tensor("prompt_embeddings", None), "prompt_embeddings: missing"),
        (PROMPT, tensor("prompt_embeddings", torch.zeros(3, 32)), "3 virtual tokens in the file, 4 by"),
        (PROMPT, tensor("prompt_embeddings", torch.zeros(4, 31)), "31 wide in the file, 32 by"),
        (PROMPT, tensor("prompt_embeddings", torch.zeros(4, 32, 1)), "expected a matrix"),
        (PROMPT, tensor("prompt_embeddings", torch.zeros(4, 32, dtype=torch.int32)), "floating-point"),
        (PROMPT, tensor("prompt_embeddings", torch.full((4, 32), torch.nan)), "not finite"),
        (PROMPT, tensor("other", torch.zeros(1)), "other: expected 'prompt_embeddings'"),
        (PROMPT, tensor("base_model.nowhere.weight", torch.zeros(1)), "no such parameter"),
        (PROMPT, tensor("base_model.classifier.weight", torch.zeros(3, 31)), r"expected \[3, 32\]"),
        (PROMPT, tensor("base_model.classifier.weight", None), "has no tensor for it"),
        (PROMPT, put(num_virtual_tokens=0), "at least 1"),
        (PROMPT, put(num_virtual_tokens="4"), "whole number"),
        (PROMPT, put(num_virtual_tokens=None), "whole number"),
        (PROMPT, put(num_virtual_tokens=10**9), "virtual tokens in the file"),
        (PROMPT, put(num_transformer_submodules=2), "encoder-decoders"),
        (PROMPT, put(modules_to_save="classifier"), "list of names"),
        (PROMPT, put(modules_to_save=[1]), "names of modules"),
        (PROMPT, put(prompt_mystery=3), "its effect would be lost"),
        (PTuning(4), put(encoder_reparameterization_type="GRU"), "mlp, lstm"),
        (PTuning(4), put(encoder_num_layers=-1), "at least 1"),
        (PrefixTuning(4), put(num_layers=3), "wide in the file"),
        (PrefixTuning(4), put(token_dim=None, num_layers=None), None),
        (PrefixTuning(4), put(token_dim="x", num_layers=[]), None),
    ],
)
def test_every_fault_is_told(method: Any, change: Any, says: str | None, tmp_path: Path) -> None:
    path = folder(tmp_path, method)
    rewritten(path, change)
    model = tiny.bert()
    found = lk.verify(path, model)
    told = lk.inspect(path)  # never raises
    if says is None:
        assert found.ok
        return
    assert not found.ok
    with pytest.raises(FileError, match=says):
        lk.load(model, path)
    assert not lk.adapters(model)
    assert told.kind.startswith("peft (P")


@pytest.mark.parametrize("file", [TENSORS, CONFIG, EXTRA])
@pytest.mark.parametrize("method", [PROMPT, PrefixTuning(3), PromptEmbedding(2, 2)], ids=["prompt", "prefix", "own"])
def test_a_file_cut_short_or_changed(file: str, method: Any, tmp_path: Path) -> None:
    path = folder(tmp_path, method)
    if not (path / file).exists():
        return
    whole = (path / file).read_bytes()
    for cut in (0, 1, 7, len(whole) // 2, len(whole) - 2):
        (path / file).write_bytes(whole[:cut])
        with pytest.raises(FileError):
            lk.load(tiny.bert(), path)
    (path / file).write_bytes(whole)
    assert lk.verify(path, tiny.bert()).ok


def test_tensors_of_another_save_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, PROMPT)
    tensors = load_file(path / TENSORS)
    tensors["prompt_embeddings"] += 1
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(FileError, match="names the hash"):
        lk.load(tiny.bert(), path)


@pytest.mark.parametrize(
    ("method", "written", "read", "says"),
    [
        (PrefixTuning(3), "bert", "deberta", "by its cache"),
        (PrefixTuning(3), "gpt2", "llama", "wide"),
        (PromptTuning(3), "bert", "t5", "both"),
        (PromptTuning(3), "bert", "gpt2", "another base"),
        (PromptEmbedding(3), "bert", "gpt2", "another base"),
        (Warp(mask_token_id=4), "gpt2", "bert", "language-model head"),
    ],
)
def test_another_model(method: Any, written: str, read: str, says: str, tmp_path: Path) -> None:
    path = folder(tmp_path, method, written)
    model = tiny.MODELS[read]()
    with pytest.raises(FileError, match=says):
        lk.load(model, path)
    assert not lk.adapters(model)


@pytest.mark.parametrize("method", [PROMPT, PrefixTuning(3), PrefixTuning(2, 1), PromptEmbedding(2, 2)], ids=repr)
def test_dtype_and_values_come_back(method: Any, tmp_path: Path) -> None:
    model = tiny.bert()
    lk.attach(model, method, dtype=torch.bfloat16, seed=3)
    path = lk.save(model, tmp_path / "a")
    assert {one.dtype for one in load_file(path / TENSORS).values()} <= {torch.bfloat16, torch.float32}
    again = tiny.bert()
    lk.load(again, path)
    batch = tiny.batch(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
