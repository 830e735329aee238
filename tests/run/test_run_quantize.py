"""QLoRA by recipe: `base: {quantize: nf4}` trains, says so, opens again as it was trained, and merges on the plain base."""

import json
import os
import signal
from functools import partial

import pytest
import runs
import tiny
import torch

import lorakit as lk
from lorakit.attach.quantized import is_quantized, stored_bytes
from lorakit.cli import main
from lorakit.errors import AdapterError, ModelError, RecipeError, UsageError
from lorakit.run.export import export_merged
from lorakit.run.listen import Listener
from lorakit.run.measure import evaluate_subject, recipe_of_run
from lorakit.run.recipe import load_recipe, to_mapping
from lorakit.run.subject import open_subject

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

BOTH = pytest.mark.parametrize("kind", ["nf4", "int8"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Wide enough for whole blocks: on a CPU bitsandbytes cannot read others (lorakit.models.quantize)."""
    folder = tmp_path_factory.mktemp("models")
    builds = {"llama": tiny.llama, "roberta": tiny.roberta}
    return {
        name: runs.save_model(folder / name, partial(build, intermediate_size=64)) for name, build in builds.items()
    }


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class StopAt(Listener):
    """Presses Ctrl-C when the row of a step comes."""

    def __init__(self, step):
        self.step = step

    def row(self, row, total_steps):
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def quantized_names(model):
    return {name for name, parameter in model.named_parameters() if is_quantized(parameter)}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 20, 31]])).logits


@BOTH
def test_a_run_trains_on_the_quantised_base_and_opens_as_it_was(recipe, kind):
    listener = Notes()
    result = lk.train(
        recipe(base={"quantize": kind}, train={"lr": 0.03, "epochs": 3}, evaluate={"metrics": ["rougeL"]}),
        listener=listener,
    )
    assert any(f"quantised to {kind}" in note for note in listener.notes)
    rows = [row["loss"] for row in runs.read_rows(result.folder / "metrics.jsonl") if "loss" in row]
    assert min(rows[-3:]) < rows[0]
    notes = json.loads((result.folder / "adapter" / "lorakit.json").read_text())
    assert (notes["quantize"], notes["base_dtype"]) == (kind, "float32")
    subject, opened = open_subject(result.folder), open_subject(result.folder / "adapter")
    assert quantized_names(subject.model) == quantized_names(result.model) == quantized_names(opened.model) != set()
    assert torch.equal(logits(subject.model), logits(result.model))
    assert result.summary["model_bytes"] == sum(
        stored_bytes(p) for name, p in result.model.named_parameters() if "lora_" not in name
    )
    settings = recipe_of_run(result.folder)
    found = evaluate_subject(
        subject, settings.data.eval, data=settings.data, metrics=["rougeL"], config=settings.generate
    )
    assert found.metrics == json.loads((result.folder / "summary.json").read_text())["after"]


def test_the_type_that_it_was_quantised_from_is_kept(recipe):
    result = lk.train(recipe(base={"quantize": "nf4", "dtype": "bfloat16"}))
    subject = open_subject(result.folder)
    assert subject.model.dtype == torch.bfloat16
    assert torch.equal(logits(subject.model), logits(result.model))
    assert all(parameter.dtype == torch.float32 for parameter in lk.parameters(result.model, "default"))
    assert open_subject(result.folder, dtype="float32").model.dtype == torch.float32


def test_a_classification_keeps_its_head_dense_and_trains_it(recipe):
    result = lk.train(recipe("sequence-classification", base={"quantize": "nf4"}))
    assert quantized_names(result.model)
    assert not any("classifier" in name for name in quantized_names(result.model))
    subject = open_subject(result.folder)
    assert torch.equal(logits(subject.model), logits(result.model))


@BOTH
def test_the_run_merges_on_the_plain_base(recipe, tmp_path, kind, capsys):
    folder = lk.train(recipe(base={"quantize": kind})).folder
    with pytest.raises(AdapterError, match=r"quantised.*unquantised"):
        export_merged(open_subject(folder), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    plain = open_subject(folder, dense=True)
    assert not quantized_names(plain.model)
    attached = logits(plain.model)
    with pytest.raises(SystemExit, match="0"):
        main(["merge", str(folder), "--out", str(tmp_path / "merged"), "--json"])
    assert json.loads(capsys.readouterr().out)["max_logit_difference"] < 1e-4
    merged = open_subject(model=str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged.model), attached, rtol=1e-5, atol=1e-5)


def test_the_adapters_file_is_peft_s_own_and_small(recipe):
    folder = lk.train(recipe(base={"quantize": "nf4"})).folder
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"quantize", "base_dtype"} & set(config)


def test_a_plain_run_says_nothing_of_quantising(recipe):
    folder = lk.train(recipe()).folder
    assert not {"quantize", "base_dtype"} & set(json.loads((folder / "adapter" / "lorakit.json").read_text()))


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(recipe, tmp_path):
    whole = lk.train(recipe(base={"quantize": "nf4"}, output=str(tmp_path / "whole"))).folder
    document = recipe(base={"quantize": "nf4"})
    folder = lk.train(document, listener=StopAt(3)).folder
    with pytest.raises(RecipeError, match=r"base\.quantize: 'nf4' there, 'int8' now"):
        lk.train(document, overrides=["base.quantize=int8"], resume=True)
    assert lk.train(document, resume=True).folder == folder
    one, other = (place / "adapter" / "adapter_model.safetensors" for place in (whole, folder))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("said", ["nf5", ["nf4"], 4, ""])
def test_a_file_that_names_no_kind_is_an_error(recipe, said):
    folder = lk.train(recipe()).folder
    notes = folder / "adapter" / "lorakit.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"quantize": said}))
    with pytest.raises(UsageError, match="is unknown; expected one of: nf4"):
        open_subject(folder)


def test_an_unknown_kind_is_a_fault_of_the_recipe(recipe):
    with pytest.raises(RecipeError, match="quantize must be one of nf4, fp4, int8, int4, not 'nf5'"):
        load_recipe(recipe(base={"quantize": "nf5"}))
    assert to_mapping(load_recipe(recipe()))["base"]["quantize"] is None


def test_a_missing_package_ends_the_run_before_the_model_is_read(recipe, monkeypatch):
    monkeypatch.setattr("lorakit.models.quantize.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        lk.train(recipe(base={"quantize": "nf4"}, model="/nowhere/at/all"))
