"""llama.cpp's adapters, held against a forward in llama.cpp's own order of rows; and folders for vLLM."""

import json
import math

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import FileError, UsageError
from lorakit.store.convert import convert


def folder(tmp_path, model, **fields):
    lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": "all-linear"} | fields)))
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape))
    return lk.save(model, tmp_path / "start")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: row (half, i) of a head becomes row 2 i + half, as llama.cpp's rotary embedding pairs neighbours."""
    width = weight.shape[0] // heads
    order = [h * width + half * (width // 2) + i for h in range(heads) for i in range(width // 2) for half in range(2)]
    return weight[order]


def tensors_of(path):
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llama_there_and_back(tmp_path, dtype):
    model = tiny.llama()
    source = folder(tmp_path, model)
    from safetensors.torch import save_file

    path = source / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    (source / "lorakit.json").unlink()
    convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
    convert(tmp_path / "a.gguf", tmp_path / "b")
    before, after = load_file(path), load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    convert(tmp_path / "b", tmp_path / "c.gguf", to="gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_llama_is_what_llama_cpp_reads(tmp_path):
    source = folder(tmp_path, tiny.llama())
    convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    assert said["adapter.lora.alpha"] == 8.0
    hub, found = load_file(source / "adapter_model.safetensors"), tensors_of(tmp_path / "a.gguf")
    assert len(found) == len(hub) == 2 * 2 * 7
    stem = "base_model.model.model.layers.1.self_attn"
    for name, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", 0)):
        a, b = (hub[f"{stem}.{name}.lora_{half}.weight"].numpy() for half in "AB")
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.weight.lora_a"].data, a)
        assert list(found[f"blk.1.{theirs}.weight.lora_a"].shape) == [32, 4]  # ne[0] is the input's width
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.weight.lora_b"].data, permuted(b, heads) if heads else b)


def test_gpt2_with_its_embedding(tmp_path):
    model = tiny.gpt2(tie_word_embeddings=False)
    source = folder(tmp_path, model, target_modules=["c_attn", "c_proj", "wte"])
    convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.gpt2())
    found, hub = tensors_of(tmp_path / "a.gguf"), load_file(source / "adapter_model.safetensors")
    a, b = found["token_embd.weight.lora_a"].data, found["token_embd.weight.lora_b"].data
    wide_a = hub["base_model.model.transformer.wte.lora_embedding_A"]
    wide_b = hub["base_model.model.transformer.wte.lora_embedding_B"]
    token = 17  # llama.cpp: b times the token's row of a
    np.testing.assert_allclose(b @ a[token], (wide_b @ wide_a[:, token]).numpy(), rtol=1e-5, atol=1e-6)
    assert found["blk.0.attn_qkv.weight.lora_b"].data.shape == (96, 4)
    convert(tmp_path / "a.gguf", tmp_path / "b")
    after = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert set(after) == set(hub)
    assert all(torch.equal(hub[key], after[key]) for key in hub)


def test_a_file_of_llama_cpps_own_needs_the_model(tmp_path):
    source = folder(tmp_path, tiny.llama())
    convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
    writer = gguf.GGUFWriter(path=None, arch="llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, one in tensors_of(tmp_path / "a.gguf").items():
        writer.add_tensor(name, np.array(one.data))
    writer.write_header_to_file(tmp_path / "theirs.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="--base"):
        convert(tmp_path / "theirs.gguf", tmp_path / "b")
    convert(tmp_path / "theirs.gguf", tmp_path / "b", base=tiny.llama())
    model, other = tiny.llama(), tiny.llama()
    lk.load(model, tmp_path / "b")
    lk.load(other, source)
    assert torch.equal(model(**tiny.batch(model)).logits, other(**tiny.batch(other)).logits)


def test_what_gguf_has_no_place_for(tmp_path):
    model = tiny.llama()
    source = folder(tmp_path, model, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 4})
    with pytest.raises(FileError, match="unlike alphas"):
        convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
    with pytest.raises(UsageError, match="--base"):
        convert(source, tmp_path / "a.gguf", to="gguf")
    with pytest.raises(UsageError, match="RobertaForSequenceClassification"):
        convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.roberta())
    assert not (tmp_path / "a.gguf").exists()


def test_rank_stabilised_scaling_is_kept_or_refused(tmp_path):
    whole = folder(tmp_path / "4", tiny.llama(), use_rslora=True)
    convert(whole, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
    said = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.lora.alpha"].contents()
    assert said / 4 == 8 / math.sqrt(4)
    broken = folder(tmp_path / "3", tiny.llama(), use_rslora=True, r=3)
    with pytest.raises(FileError, match=r"exactly|float32"):
        convert(broken, tmp_path / "b.gguf", to="gguf", base=tiny.llama())


def test_vllm_takes_one_rank_and_one_scaling(tmp_path):
    from peft import PeftModel

    fields = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "down_proj": 8}}
    model = tiny.llama()
    source = folder(tmp_path, model, **fields)
    report = convert(source, tmp_path / "v", to="vllm")
    assert any("padded" in note for note in report.notes)
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert isinstance(config["target_modules"], list)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]} == {8}
    before = load_file(source / "adapter_model.safetensors")
    for key in (key for key in before if "lora_A" in key):  # as vLLM computes: lora_alpha / r, and no pattern
        a, b = before[key].double(), before[key.replace("_A", "_B")].double()
        rank = a.shape[0]
        ours = tensors[key.replace("_A", "_B")].double() @ tensors[key].double() * (config["lora_alpha"] / config["r"])
        torch.testing.assert_close(ours, b @ a * (8 / rank))
    theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path / "v").eval()
    torch.testing.assert_close(theirs(**tiny.batch(model)).logits, model(**tiny.batch(model)).logits)


def test_vllm_is_refused_what_would_be_rounded(tmp_path):
    source = folder(tmp_path, tiny.llama(), target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 5})
    with pytest.raises(FileError, match=r"scaling 1\.25") as caught:
        convert(source, tmp_path / "v", to="vllm")
    assert len(caught.value.faults) == 2


def test_vllm_is_refused_heads_biases_and_embeddings(tmp_path):
    model = tiny.roberta()
    source = folder(tmp_path, model, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"])
    with pytest.raises(FileError) as caught:
        convert(source, tmp_path / "v", to="vllm")
    told = "\n".join(caught.value.faults)
    assert "modules_to_save" in told
    assert "classifier.dense.weight" in told
    assert "word_embeddings" in told
    assert not (tmp_path / "v").exists()


def test_an_alpha_of_0_would_be_1_in_llama_cpp(tmp_path):
    source = folder(tmp_path, tiny.llama(), target_modules=["q_proj"])
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0}))
    with pytest.raises(FileError, match="alpha 0"):
        convert(source, tmp_path / "a.gguf", to="gguf", base=tiny.llama())
