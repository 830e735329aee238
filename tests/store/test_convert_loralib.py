"""loralib's files: the released checkpoint, and each of its layers held against loralib itself."""

from pathlib import Path

import loralib
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import FileError
from lorakit.store.convert import convert, read_any
from lorakit.store.foreign.source import read_pickle

RELEASED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "loralib" / "roberta_base_lora_mnli.bin"


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key


def back(source: Path, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    """The file's tensors after a journey through a PEFT folder."""
    convert(source, folder / "peft", **options)
    options.pop("alpha", None)
    options.pop("enable_lora", None)
    convert(folder / "peft", folder / "again.bin", to="loralib", **options)
    return read_pickle(folder / "again.bin")[0]


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


@pytest.mark.skipif(not RELEASED.is_file(), reason="the shared data is not beside the project")
def test_the_released_checkpoint(tmp_path):
    equal(read_pickle(RELEASED)[0], back(RELEASED, tmp_path, alpha=16))
    config, tensors, _ = read_any(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (8, 16, 24)
    assert config["modules_to_save"] == ["classifier.dense", "classifier.out_proj"]
    assert tensors["base_model.model.classifier.dense.weight"].shape == (768, 768)


@pytest.mark.skipif(not RELEASED.is_file(), reason="the shared data is not beside the project")
def test_alpha_must_be_told(tmp_path):
    with pytest.raises(FileError, match="--alpha") as caught:
        convert(RELEASED, tmp_path / "out")
    assert len(caught.value.faults) == 1
    assert not (tmp_path / "out").exists()


def test_a_roberta_computes_what_loralib_computes(tmp_path):
    from peft import PeftModel

    model, theirs = tiny.roberta(), tiny.roberta()
    for layer in theirs.roberta.encoder.layer:
        for name in ("query", "value"):
            old = getattr(layer.attention.self, name)
            new = loralib.Linear(32, 32, r=4, lora_alpha=8, merge_weights=False)
            new.load_state_dict(old.state_dict(), strict=False)
            nn.init.normal_(new.lora_B)
            setattr(layer.attention.self, name, new)
    nn.init.normal_(theirs.classifier.dense.weight)
    loralib.mark_only_lora_as_trainable(theirs)
    state = loralib.lora_state_dict(theirs) | {
        key: value for key, value in theirs.state_dict().items() if key.startswith("classifier")
    }
    torch.save(state, tmp_path / "a.bin")
    equal(state, back(tmp_path / "a.bin", tmp_path, alpha=8))
    inputs = tiny.batch(model)
    expected = theirs.eval()(**inputs).logits
    lk.load(model, tmp_path / "peft")
    torch.testing.assert_close(model(**inputs).logits, expected)
    wrapped = PeftModel.from_pretrained(tiny.roberta(), tmp_path / "peft")
    torch.testing.assert_close(wrapped.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_a_fused_gpt2(tmp_path, enabled):
    theirs, model = tiny.gpt2(), tiny.gpt2()
    for block in theirs.transformer.h:
        new = loralib.MergedLinear(
            32, 96, r=4, lora_alpha=32, enable_lora=list(enabled), fan_in_fan_out=True, merge_weights=True
        )
        new.weight.data, new.bias.data = block.attn.c_attn.weight.data.clone(), block.attn.c_attn.bias.data.clone()
        nn.init.normal_(new.lora_B, std=0.1)
        block.attn.c_attn = new
    state = {f"module.{key}": value for key, value in loralib.lora_state_dict(theirs).items()}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "gpt2.pt")
    report = convert(tmp_path / "gpt2.pt", tmp_path / "peft", alpha=32, enable_lora=enabled)
    assert report.kind == "loralib"
    assert any("epoch" in note for note in report.notes)
    convert(tmp_path / "peft", tmp_path / "again.pt", to="loralib")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    equal(state, again["model_state_dict"])
    inputs = tiny.batch(model)
    theirs.train()
    theirs.eval()  # loralib merges here; only merged does it take a weight stored as (in, out)
    lk.load(model, tmp_path / "peft")
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_parts_of_a_fused_layer_must_be_told(tmp_path):
    state = {"h.0.c_attn.lora_A": torch.randn(8, 32), "h.0.c_attn.lora_B": torch.randn(64, 4)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(FileError, match="--enable-lora 1,0,1"):
        convert(tmp_path / "a.pt", tmp_path / "out", alpha=4)
    with pytest.raises(FileError, match="enable_lora"):
        convert(tmp_path / "a.pt", tmp_path / "out", alpha=4, enable_lora=(True, False, False))


def test_blocks_that_were_trained_on_are_refused(tmp_path):
    state = {"h.0.c_attn.lora_A": torch.randn(8, 32), "h.0.c_attn.lora_B": torch.randn(64, 4)}
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "peft", alpha=4, enable_lora=(True, False, True))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.h.0.c_attn.lora_B.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(FileError, match="no blocks for the parts 1,0,1"):
        convert(tmp_path / "peft", tmp_path / "b.pt", to="loralib")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("way", ["theirs", "ours"])
def test_convolutions(tmp_path, kernel, way):
    base = nn.Sequential(nn.Conv2d(4, 6, kernel))
    theirs = filled(loralib.Conv2d(4, 6, kernel, r=2, lora_alpha=6, merge_weights=False))
    state = {"0.lora_A": theirs.lora_A.detach(), "0.lora_B": theirs.lora_B.detach()}
    if way == "ours":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 6, kernel)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
        )
        filled(model)
        model.save_pretrained(tmp_path / "start")
        convert(tmp_path / "start", tmp_path / "a.bin", to="loralib")
        state = read_pickle(tmp_path / "a.bin")[0]
        theirs.load_state_dict({key.removeprefix("0."): value for key, value in state.items()}, strict=False)
        theirs.conv.load_state_dict(model.get_base_model()[0].base_layer.state_dict())
        x = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    else:
        torch.save(state, tmp_path / "a.bin")
    equal(state, back(tmp_path / "a.bin", tmp_path, alpha=6, base=base))
    config, tensors, _ = read_any(tmp_path / "peft")
    a, b = (tensors[f"base_model.model.0.lora_{half}.weight"] for half in "AB")
    delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a) * (config["lora_alpha"] / config["r"])
    expected = (theirs.lora_B @ theirs.lora_A).view(6, 4, kernel, kernel) * 3
    torch.testing.assert_close(delta, expected.detach(), rtol=1e-4, atol=1e-4)


def test_convolutions_in_groups_are_refused(tmp_path):
    torch.save({"0.lora_A": torch.randn(6, 12), "0.lora_B": torch.randn(6, 6)}, tmp_path / "a.bin")
    with pytest.raises(FileError, match="2 groups"):
        convert(tmp_path / "a.bin", tmp_path / "out", alpha=1, base=nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


def test_biases_and_embeddings(tmp_path):
    state = {
        "wte.lora_A": torch.randn(2, 96),
        "wte.lora_B": torch.randn(32, 2),
        "q.lora_A": torch.randn(2, 32, dtype=torch.bfloat16),
        "q.lora_B": torch.randn(32, 2, dtype=torch.bfloat16),
        "q.bias": torch.randn(32),
    }
    torch.save(state, tmp_path / "a.bin")
    equal(state, back(tmp_path / "a.bin", tmp_path, alpha=2))
    config, tensors, _ = read_any(tmp_path / "peft")
    assert config["bias"] == "lora_only"
    assert {"base_model.model.wte.lora_embedding_A", "base_model.model.q.base_layer.bias"} <= set(tensors)


def test_a_whole_model_is_no_adapter(tmp_path):
    state = {"q.lora_A": torch.randn(2, 4), "q.lora_B": torch.randn(4, 2), "q.weight": torch.randn(4, 4)}
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(FileError, match="a whole model"):
        convert(tmp_path / "a.bin", tmp_path / "out", alpha=2)


def test_unlike_alphas_are_refused(tmp_path):
    model = tiny.roberta()
    lk.attach(model, lk.LoRA(r=4, alpha=8, target_modules=["query", "value"], alpha_pattern={"query": 4}))
    lk.save(model, tmp_path / "peft")
    with pytest.raises(FileError, match="unlike alphas"):
        convert(tmp_path / "peft", tmp_path / "a.bin", to="loralib")
    assert not (tmp_path / "a.bin").exists()
