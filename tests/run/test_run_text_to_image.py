"""Text-to-image runs on tiny pipelines, from the recipe to the folder: learning, resuming, refusing."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import runs
import tiny_pipelines as tiny
import torch
from tiny_pipelines import PARTS

import lorakit as lk
from lorakit.errors import DataError, ModelError, RecipeError, UsageError
from lorakit.models.diffusion import load_pipeline
from lorakit.run.diffusion.noise import Noise
from lorakit.run.listen import Listener

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the pipelines sd and pixart, and six images with captions."""
    return tiny.build(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def recipe(place, tmp_path):
    def make(name="sd", **changes):
        return tiny.recipe(place, name, **{"output": tmp_path / "run"} | changes)

    return make


@pytest.mark.parametrize("name", PARTS)
def test_one_image_is_overfitted_and_nothing_but_the_adapter_changes(recipe, place, tmp_path, name):
    images = tiny.image_folder(tmp_path / "one", count=1)
    result = lk.train(
        recipe(
            name,
            data={"train": images, "eval": images},
            method={"r": 8, "alpha": 16},
            train={"epochs": 60, "batch_size": 1, "eval_every": 20},
        )
    )
    losses = [row["eval_loss"] for row in runs.read_rows(result.folder / "metrics.jsonl") if "eval_loss" in row]
    before, after = result.summary["before"]["loss"], result.summary["after"]["loss"]
    assert before > losses[0] > losses[-1]
    assert after < before - 0.02
    fresh = dict(getattr(tiny.opened(place, name), PARTS[name]).named_parameters())
    kept = {key: value for key, value in result.model.named_parameters() if "lora_" not in key}
    assert kept.keys() == fresh.keys()
    assert all(torch.equal(kept[key], fresh[key]) for key in fresh)
    adapted = {path.rpartition(".attn")[2][2:] for path in lk.adapters(result.model)["default"].modules}
    assert adapted == {"to_q", "to_k", "to_v", "to_out.0"}
    assert (result.folder / "report.html").is_file()
    assert "tokens" not in (result.folder / "report.html").read_text().split("<style")[0]


# -- resuming ----------------------------------------------------------------------------------------------------------


class Interrupt(Listener):
    def __init__(self, step):
        self.step = step

    def row(self, row, total_steps):
        if row["step"] == self.step and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", PARTS)
def test_interrupted_and_resumed_is_byte_identical(recipe, place, tmp_path, name):
    changes = {
        "train": {"epochs": 2, "accumulate": 2, "batch_size": 1},
        "data": {"eval": str(place / "images")},
        "diffusion": {"flip": True, "caption_dropout": 0.3, "noise_offset": 0.1, "snr_gamma": 5.0},
        "method": {"dropout": 0.1},
    }
    done = lk.train(recipe(name, output=str(tmp_path / "whole"), **changes))
    document = recipe(name, **changes)
    assert lk.train(document, listener=Interrupt(4)).interrupted
    resumed = lk.train(document, resume=True)
    for file in ("adapter/adapter_model.safetensors", FILE):
        assert (resumed.folder / file).read_bytes() == (done.folder / file).read_bytes()
    assert runs.steps_of(resumed.folder / "metrics.jsonl") == runs.steps_of(done.folder / "metrics.jsonl")
    assert resumed.summary["before"] == done.summary["before"]


def test_other_images_or_captions_do_not_go_on(recipe, tmp_path):
    images = tiny.image_folder(tmp_path / "own")
    document = recipe(data={"train": images})
    assert lk.train(document, listener=Interrupt(1)).interrupted
    rows = runs.read_rows(tmp_path / "own" / "metadata.jsonl")
    rows[2]["text"] += " indeed"
    runs.write_rows(tmp_path / "own" / "metadata.jsonl", rows)
    with pytest.raises(DataError, match="not the rows that the run began with"):
        lk.train(document, resume=True)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_checkpointing_changes_memory_and_not_the_result(recipe, tmp_path):
    from safetensors.torch import load_file

    plain, saved = (
        lk.train(recipe(train={"gradient_checkpointing": flag}, output=str(tmp_path / str(flag)))).folder / FILE
        for flag in (False, True)
    )
    ours, theirs = load_file(plain), load_file(saved)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_a_bfloat16_base_is_trained_in_float32(recipe, name):
    from safetensors.torch import load_file

    result = lk.train(recipe(name, base={"dtype": "bfloat16"}))
    tensors = load_file(result.folder / FILE).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any(tensor.any() for tensor in tensors)


def test_v_prediction_and_another_resolution(recipe, tmp_path):
    model = tiny.stable_diffusion(tmp_path / "v", prediction_type="v_prediction")
    result = lk.train(recipe(model=model, diffusion={"resolution": 32}))
    assert result.summary["steps"] == 3


def test_a_loss_of_ones_own(recipe):
    seen = []

    def loss(model, batch):
        seen.append(sorted(batch))
        out = model(batch["noisy_latents"], batch["timesteps"], batch["encoder_hidden_states"]).sample
        return (out - batch["target"]).abs().mean()

    lk.train(recipe(), loss=loss)
    assert "noisy_latents" in seen[0]


def test_the_recipe_says_what_is_adapted(recipe):
    result = lk.train(recipe(method={"target_modules": ["to_q"]}))
    assert all(path.endswith("to_q") for path in lk.adapters(result.model)["default"].modules)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"format": "alpaca"}}, "data.format: expected imagefolder"),
        ({"data": {"max_length": 8}}, "data.max_length: this model's captions always have 32 tokens"),
        ({"evaluate": {"metrics": ["bleu"]}, "data": {"eval": "x"}}, "evaluate.metrics"),
        ({"train": {"label_smoothing": 0.1}}, "label_smoothing"),
        ({"method": {"bias": "all", "use_dora": True}}, "method.bias has no place"),
        ({"diffusion": {"resolution": 17}}, "diffusion.resolution must be a multiple of 2"),
        ({"diffusion": {"resolution": 0}}, "diffusion.resolution must be at least 1"),
        ({"diffusion": {"noise_offset": -1.0}}, "diffusion.noise_offset"),
        ({"diffusion": {"snr_gamma": 0.0}}, "diffusion.snr_gamma"),
        ({"diffusion": {"caption_dropout": 1.0}}, "diffusion.caption_dropout"),
        ({"diffusion": {"flipp": True}}, "did you mean 'flip'"),
        ({"task": "causal-lm", "diffusion": {"flip": True}}, "belongs to `task: text-to-image`"),
    ],
)
def test_settings_that_cannot_be(recipe, changes, told):
    with pytest.raises(RecipeError, match=told):
        lk.train(recipe(**changes))


def test_a_caption_that_is_too_long_names_its_file(recipe, place, tmp_path):
    folder = Path(tiny.image_folder(tmp_path / "long", count=3))
    rows = runs.read_rows(folder / "metadata.jsonl")
    rows[1]["text"] = "x" * 40
    runs.write_rows(folder / "metadata.jsonl", rows)
    document = recipe(data={"train": str(folder)})
    with pytest.raises(DataError, match=r"captions may have 32 tokens.*\n.*1\.png: 42 tokens"):
        lk.train(document)
    assert lk.train(recipe(data={"train": str(folder), "truncate": True})).summary["steps"] == 2


def test_an_image_that_breaks_off_names_its_file(recipe, tmp_path):
    from PIL import Image

    folder = tmp_path / "torn"
    folder.mkdir()
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "a.jpg")
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:1500])
    (folder / "a.txt").write_text("half a picture")
    with pytest.raises(DataError, match=r"a\.jpg"):
        lk.train(recipe(data={"train": str(folder)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["text-to-image", "text-to-image-dit"])
def test_the_ready_recipes_run_as_they_stand(name, place, tmp_path):
    file = Path(__file__).resolve().parents[2] / "recipes" / f"{name}.yaml"
    own = {
        "model": place / ("pixart" if name.endswith("dit") else "sd"),
        "data.train": place / "images",
        "output": tmp_path / "run",
        "diffusion.resolution": 16,
        "train.epochs": 1,
    }
    result = lk.train(file, overrides=[f"{key}={value}" for key, value in own.items()])
    assert result.summary["steps"] == 2
    assert lk.adapters(result.model)["default"].active


def test_without_diffusers_it_says_how_to_get_it(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r'diffusers.*pip install "lorakit\[diffusion\]"'):
        lk.train(recipe())


def test_what_is_no_pipeline(place, tmp_path):
    for folder, told in (
        (tmp_path / "gone", "no such folder"),
        (place / "images", "no pipeline: expected a folder with model_index.json"),
        (place / "sd" / "unet", "a transformers model"),
    ):
        with pytest.raises(ModelError, match=told):
            load_pipeline(str(folder))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_pipeline(str(tmp_path / "torn"))


def test_pipelines_that_cannot_be_trained(tmp_path, place):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(place / "sd", broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(str(broken))
    flow = tmp_path / "flow"
    shutil.copytree(place / "pixart", flow)
    index = json.loads((flow / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (flow / "model_index.json").write_text(json.dumps(index))
    (flow / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ModelError, match="flow matching is not supported"):
        Noise(load_pipeline(str(flow)).pipeline.scheduler, "flow")


def test_from_the_command_line(recipe, tmp_path, capsys):
    import yaml

    from lorakit.cli import main

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(data={"eval": recipe()["data"]["train"]})))
    with pytest.raises(SystemExit) as left:
        main(["train", str(file), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert not left.value.code
    assert said["task"] == "text-to-image"
    assert said["before"].keys() == said["after"].keys() == {"loss"}
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["method"]["target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert (tmp_path / "run" / FILE).is_file()
