"""inspect and verify, from Python and from the command line."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from store_kit import EXTRA, PREFIX, TENSORS, edit_tensors, good

import lorakit as lk


@pytest.mark.parametrize("rslora", [False, True])
def test_norms_are_those_of_dw_and_the_figures_those_of_the_file(rslora, tmp_path):
    folder = good(
        tmp_path,
        target_modules=["c_attn", "wte"],
        use_rslora=rslora,
        rank_pattern={"wte": 2},
        alpha_pattern={"h.1.attn.c_attn": 3},
        modules_to_save=["ln_f"],
    )
    tensors = load_file(folder / TENSORS)
    found = lk.inspect(folder)
    assert [module.path for module in found.modules] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
        "transformer.wte",
    ]
    for module in found.modules:
        linear = module.path != "transformer.wte"
        names = ("lora_A.weight", "lora_B.weight") if linear else ("lora_embedding_A", "lora_embedding_B")
        a, b = (tensors[f"{PREFIX}{module.path}.{name}"].double() for name in names)
        r, alpha = (4 if linear else 2), (3 if ".1." in module.path else 8)
        scale = alpha / (r**0.5 if rslora else r)
        assert module.norm == pytest.approx(float(torch.linalg.norm(scale * b @ a)), rel=1e-9)
        assert (module.rank, module.shape, module.dtype) == (r, (a.shape[1], b.shape[0]), "float32")
        assert module.scaling == pytest.approx(scale)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == (folder / TENSORS).stat().st_size
    assert set(found.replaced) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert found.identity == json.loads((folder / EXTRA).read_text())["adapter"]
    assert (found.kind, found.faults) == ("peft (LORA)", ())
    assert found.config["r"] == 4


def test_a_fresh_adapter_has_norm_zero(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]))
    assert {module.norm for module in lk.inspect(lk.save(model, tmp_path)).modules} == {0.0}


def test_faults_are_told_with_what_can_still_be_read(tmp_path):
    folder = good(tmp_path)
    edit_tensors(folder, add={"x": torch.ones(1), PREFIX + "y": torch.tensor([float("nan")])})
    found = lk.inspect(folder)
    assert len(found.faults) == 2
    assert found.modules == ()
    assert found.parameters == 2 * 4 * (32 + 96) + 2
    assert tuple(lk.verify(folder).faults) == found.faults


def test_verify_with_and_without_a_model(tmp_path):
    folder = good(tmp_path)
    assert lk.verify(folder).ok
    model = tiny.gpt2()
    assert lk.verify(folder, model).ok
    assert lk.adapters(model) == {}
    assert not lk.verify(folder, tiny.llama()).ok
    assert lk.verify(folder).source == str(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1)
    assert not lk.verify(folder, model).ok
    assert lk.verify(folder, model, check_base=False).ok


def test_nothing_there(tmp_path):
    for tell in (lk.verify, lk.inspect):
        (fault,) = tell(tmp_path / "nowhere").faults
        assert "is not there" in fault


def run(*words):
    done = subprocess.run(
        [sys.executable, "-c", "from lorakit.cli import main; main()", *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_inspects(tmp_path):
    folder = good(tmp_path)
    code, out, err = run("inspect", str(folder), "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["parameters"] == lk.inspect(folder).parameters
    assert [module["path"] for module in told["modules"]] == [module.path for module in lk.inspect(folder).modules]


def test_the_command_line_verifies(tmp_path):
    folder = good(tmp_path)
    (folder / TENSORS).write_bytes(b"<html>")
    code, out, err = run("verify", str(folder), "--json")
    assert (code, json.loads(out)["ok"], len(json.loads(out)["faults"])) == (1, False, 1)
    assert "Traceback" not in err
