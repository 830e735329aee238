"""A user's own .gguf: exact values, its tokenizer and template, converted once."""

import pytest
import torch

from lorakit import models
from lorakit.errors import ModelError
from lorakit.models import gguf


def test_values_logits_tokenizer_and_template_come_along(gguf_file, llama, tokenizer):
    loaded = models.load(str(gguf_file))
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    ids = torch.arange(3, 40).view(1, -1)
    assert torch.allclose(loaded.model(ids).logits, llama(ids).logits, atol=1e-5)
    text = "hello  wörld\n\t12 <x>"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert chat == "<|im_start|>hell<|im_end|>"
    assert loaded.tokenizer(chat)["input_ids"] == [1, len(tokenizer) - 1, 2]


def test_it_is_converted_once_and_can_be_saved(gguf_file, tmp_path, monkeypatch):
    first = models.load(str(gguf_file))
    monkeypatch.setattr(gguf, "convert", lambda *args, **kwargs: pytest.fail("converted again"))
    moved = gguf_file.rename(tmp_path / "tiny.GGUF")
    assert models.load(str(moved)).source == str(moved)
    assert first.source == str(gguf_file)
    first.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_classifier_on_a_gguf(gguf_file):
    loaded = models.load(str(gguf_file), task="sequence-classification", num_labels=2)
    assert loaded.initialised == ("score.weight",)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.98])
def test_a_truncated_file(gguf_file, share, own_cache):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"tiny.gguf"):
        models.load(str(gguf_file))
    assert not [path for path in own_cache.glob("gguf/*") if not path.name.endswith(".lock")]


def test_missing_or_foreign_file(tmp_path):
    with pytest.raises(ModelError, match="cannot be opened"):
        models.load(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="no GGUF file"):
        models.load(str(tmp_path / "text.gguf"))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelError, match="cannot be opened"):
        models.load(str(tmp_path / "folder.gguf"))
