"""lorakit convert: what it prints, its JSON, its exit codes."""

import tiny
import torch

import lorakit as lk

LORALIB = {"h.0.c_attn.lora_A": torch.randn(8, 32), "h.0.c_attn.lora_B": torch.randn(64, 4)}


def test_it_tells_what_it_did(lorakit, tmp_path):
    torch.save(LORALIB, tmp_path / "a.pt")
    words = ["convert", tmp_path / "a.pt", tmp_path / "out", "--alpha", 32, "--enable-lora", "1,0,1"]
    said = lorakit(*words)
    assert said.code == 0
    assert "loralib: 1 module" in said.out
    assert "adapter_config.json" in said.out
    said = lorakit(*words, "--overwrite", "--json")
    assert said.json["kind"] == "loralib"
    assert said.json["to"] == "peft"
    assert said.json["parameters"] == 8 * 32 + 96 * 8


def test_a_missing_alpha_is_a_failure(lorakit, tmp_path):
    torch.save(LORALIB, tmp_path / "a.pt")
    said = lorakit("convert", tmp_path / "a.pt", tmp_path / "out")
    assert said.code == 1
    assert "--alpha" in said.err
    assert not (tmp_path / "out").exists()


def test_wrong_parts_are_a_wrong_command_line(lorakit, tmp_path):
    assert lorakit("convert", "a", tmp_path / "out", "--enable-lora", "1,2").code == 2


def test_a_base_as_a_folder(lorakit, tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "model")
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]))
    lk.save(model, tmp_path / "adapter")
    said = lorakit("convert", tmp_path / "adapter", tmp_path / "a.gguf", "--to", "gguf", "--base", tmp_path / "model")
    assert said.code == 0, said.err
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
