"""Classification and embedding: rows of different adapters in one batch, heads for different numbers of classes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapting import assert_same, snapshot
from serve_kit import saved, tokenizer
from torch import nn

import lorakit as lk
from lorakit.errors import FileError, QueueFullError, TooLongError, UsageError, WrongKindError
from lorakit.serve.bank import Bank
from lorakit.serve.engine import Engine
from lorakit.serve.limits import Limits, SamplingParams

TEXTS = ["one", "a longer text here", "xyz", "what is it", "b"]
HEADS = {"bert": "classifier", "roberta": "classifier", "llama": "score", "gpt2": "score"}


def base(kind: str, labels: int = 3) -> nn.Module:
    """The same body whatever the number of labels."""
    torch.manual_seed(0)
    if kind in ("llama", "gpt2"):
        import transformers

        plain = getattr(tiny, kind)(vocab_size=258)
        config = plain.config
        config.num_labels = labels
        name = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[kind]
        model = getattr(transformers, name)(config).eval()
        model.base_model.load_state_dict(plain.base_model.state_dict())
        return model
    body = getattr(tiny, kind)(vocab_size=258)
    model = getattr(tiny, kind)(vocab_size=258, num_labels=labels)
    model.base_model.load_state_dict(body.base_model.state_dict())
    return model


def made(kind: str, folder: Path, labels: int, seed: int, **fields: Any) -> Path:
    return saved(kind, folder, seed, 0.3, lambda: base(kind, labels), **({"modules_to_save": [HEADS[kind]]} | fields))


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_rows_take_their_own_adapter_and_head(kind: str, tmp_path: Path) -> None:
    labels = {"a": 3, "b": 5, "c": 2}
    folders = {name: made(kind, tmp_path / name, n, seed) for seed, (name, n) in enumerate(labels.items())}
    tok = tokenizer()
    model = base(kind)
    before = snapshot(model)
    with Bank(model) as bank:
        versions = {name: bank.load(folder, name) for name, folder in folders.items()}
        assert [len(version.labels or ()) for version in versions.values()] == [3, 5, 2]
        with Engine(model, tok, bank) as engine:
            results: dict[str | None, list[Any]] = {}
            names = ["a", "b", None, "c"]
            asked = [
                threading.Thread(
                    target=lambda name=name: results.__setitem__(name, engine.classify(TEXTS, versions.get(name or "")))
                )
                for name in names
            ]
            for thread in asked:
                thread.start()
            for thread in asked:
                thread.join(60)
            assert engine.stats().finished == 4 * len(TEXTS)
        assert all(one.users == 0 for one in bank.resident())
    assert_same(before, snapshot(model))
    for name in names:
        alone = base(kind, labels.get(name or "", 3))
        alone.config.pad_token_id = 0
        if name is not None:
            lk.load(alone, folders[name])
        for text, answer in zip(TEXTS, results[name], strict=True):
            with torch.no_grad():
                expected = alone(torch.tensor([tok(text)["input_ids"]])).logits[0].softmax(-1)
            torch.testing.assert_close(torch.tensor(list(answer.scores.values())), expected, rtol=1e-4, atol=1e-5)
            assert answer.adapter == (None if name is None else versions[name].hash)
            assert answer.label == list(answer.scores)[int(expected.argmax())]


def test_a_head_for_other_classes_does_not_open_the_door_to_another_base(tmp_path: Path) -> None:
    folder = made("bert", tmp_path / "a", 5, 0)
    other = base("bert")
    torch.nn.init.normal_(other.base_model.embeddings.word_embeddings.weight)
    with Bank(other) as bank, pytest.raises(FileError, match="another base"):
        bank.load(folder, "a")
    with Bank(base("bert")) as bank:
        wrong = made("roberta", tmp_path / "b", 5, 0)
        with pytest.raises(FileError):
            bank.load(wrong, "b")


def test_embeddings_are_means_of_their_own_adapter(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        model = tiny.bert(vocab_size=258)
        return model.base_model

    folders = [saved("bert", tmp_path / str(k), k, 0.3, encoder) for k in range(2)]
    tok = tokenizer()
    with Bank(encoder()) as bank, Engine(bank.model, tok, bank, strict=True) as engine:
        versions = [bank.load(folder, "e") for folder in folders]
        found = [engine.embed(TEXTS, version) for version in (*versions, None)]
        with pytest.raises(WrongKindError, match="for embedding, and the request is for classification"):
            engine.classify(TEXTS)
    for number, folder in enumerate((*folders, None)):
        alone = encoder()
        if folder is not None:
            lk.load(alone, folder)
        for text, answer in zip(TEXTS, found[number], strict=True):
            with torch.no_grad():
                state = alone(torch.tensor([tok(text)["input_ids"]])).last_hidden_state[0].mean(0)
            torch.testing.assert_close(torch.tensor(answer.vector), state / state.norm(), rtol=1e-4, atol=1e-5)


def test_bad_requests_are_refused() -> None:
    with Bank(base("bert")) as bank, Engine(bank.model, tokenizer(), bank, Limits(queue=2)) as engine:
        with pytest.raises(WrongKindError, match="for classification, and the request is for generation"):
            engine.generate([1, 2], None, SamplingParams())
        with pytest.raises(TooLongError, match="tokens"):
            engine.classify(["x" * 500])
        with pytest.raises(UsageError):
            engine.classify([""])
        with pytest.raises(UsageError):
            engine.classify([])
        with pytest.raises(QueueFullError):
            engine.classify(["a", "b", "c"])
        assert len(engine.classify(["a", ("b", "c")])) == 2
