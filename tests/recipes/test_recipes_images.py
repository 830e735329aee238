"""Image classification from end to end: the recipe learns, and the command line measures and merges what it learnt."""

from __future__ import annotations

import json
import random

import pytest
import runs
from recipe_kit import COLOURS, RECIPES, class_folders, picture, save_vit

from lorakit.cli import main
from lorakit.generate import classify_images
from lorakit.models import load


def lorakit(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def trained(tmp_path, capsys):
    """The recipe on coloured images, for 40 steps; returns (folder of the run, folder of images, what train said)."""
    model = save_vit(tmp_path / "model", num_labels=2)
    class_folders(tmp_path / "images" / "train", 8, seed=1)
    class_folders(tmp_path / "images" / "val", 4, seed=2)
    changes = {
        "model": model,
        "data.train": tmp_path / "images",
        "data.eval": tmp_path / "images",
        "train.batch_size": 8,
        "train.epochs": 12,
        "output": tmp_path / "run",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    code, out, err = lorakit(capsys, "train", RECIPES / "vit-images.yaml", *sets, "--json")
    assert not code, err
    return tmp_path / "run", tmp_path / "images", json.loads(out)


def test_the_recipe_learns_colours_and_the_command_line_measures_it(trained, tmp_path, capsys):
    run, _, summary = trained
    assert summary["after"]["accuracy"] == 1.0
    assert "f1_macro" in summary["after"]
    assert summary["tokens_per_second"] is None
    assert "tokens/s" not in (run / "report.html").read_text()

    out = tmp_path / "predictions.jsonl"
    code, text, err = lorakit(capsys, "evaluate", run, "--json", "--predictions", out)
    assert not code, err
    assert json.loads(text)["rows"] == 12
    assert json.loads(text)["metrics"] == summary["after"]
    rows = runs.read_rows(out)
    assert {row["image"].split("/")[-2] for row in rows} >= set(COLOURS)
    assert all(sorted(COLOURS)[row["label"]] in row["image"] for row in rows)

    other = class_folders(tmp_path / "other", 2, seed=5)
    code, text, err = lorakit(capsys, "evaluate", run, "--data", other, "--metrics", "accuracy", "--json")
    assert not code, err
    assert json.loads(text)["metrics"] == {"accuracy": 1.0}
    assert lorakit(capsys, "inspect", run)[0] == 0

    code, _, err = lorakit(capsys, "merge", run, "--out", tmp_path / "merged")
    assert not code, err
    words = ("evaluate", "--model", tmp_path / "merged", "--task", "image-classification", "--data", other, "--json")
    code, text, err = lorakit(capsys, *words)
    assert not code, err
    assert json.loads(text)["metrics"]["accuracy"] == 1.0
    merged = load(tmp_path / "merged", task="image-classification")
    assert [merged.model.config.id2label[number] for number in range(3)] == sorted(COLOURS)


def test_a_model_tells_images_that_have_no_class(trained, tmp_path):
    from lorakit.run.subject import open_subject

    subject = open_subject(trained[0])
    paths = []
    for name, colour in reversed(COLOURS.items()):
        paths.append(tmp_path / f"{name}.webp")
        picture(colour, random.Random(9)).save(paths[-1], lossless=True)
    told = []
    found = classify_images(
        subject.model, subject.tokenizer, paths, batch_size=2, progress=lambda *done: told.append(done)
    )
    assert [subject.label_names[one.label] for one in found] == [path.stem for path in paths]
    assert all(sum(one.scores) == pytest.approx(1) for one in found)
    assert told == [(2, 3), (3, 3)]


def test_generate_says_where_to_go(trained, capsys):
    code, _, err = lorakit(capsys, "generate", trained[0], "--prompt", "a")
    assert code == 1
    assert "lorakit evaluate" in err


def test_a_stopped_run_goes_on_to_the_same_adapter(run_recipe):
    steady = ("train.batch_size=5", "train.epochs=9", "train.schedule=constant", "train.warmup=1")
    file = run_recipe("vit-images", "train.max_steps=5", *steady).folder / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    run_recipe("vit-images", "train.max_steps=2", *steady, overwrite=True)
    assert file.read_bytes() != whole
    run_recipe("vit-images", "train.max_steps=5", *steady, resume=True)
    assert file.read_bytes() == whole


def test_a_run_does_not_go_on_with_other_images(run_recipe, tmp_path):
    from lorakit.errors import DataError

    run_recipe("vit-images", "train.max_steps=1")
    picture((1, 2, 3), random.Random(0)).save(tmp_path / "data" / "images" / "train" / "red" / "late.png")
    with pytest.raises(DataError, match="not the rows that the run began with"):
        run_recipe("vit-images", "train.max_steps=2", resume=True)


def test_half_precision_takes_images_too(run_recipe):
    result = run_recipe("vit-images", "base.dtype=bfloat16")
    assert result.summary["steps"] == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.max_length=9"], "data.max_length and data.truncate are of texts"),
        (["evaluate.metrics=[bleu]"], "compares texts, not labels"),
        (["task=sequence-classification"], "does not go with imagefolder data. Set `task: image-classification`"),
        (["task=seq2seq", "train.best_metric=loss"], "does not go with imagefolder data"),
    ],
)
def test_what_does_not_go_together_is_said(overrides, said, run_recipe):
    from lorakit.errors import LorakitError

    with pytest.raises(LorakitError, match=said):
        run_recipe("vit-images", *overrides)


def test_models_that_do_not_do_are_said(tmp_path):
    import tiny

    from lorakit.errors import ModelError, UsageError

    text = runs.save_model(tmp_path / "text", tiny.roberta)
    with pytest.raises(ModelError, match="its image processor cannot be read"):
        load(text, task="image-classification", num_labels=2)
    images = save_vit(tmp_path / "images")
    with pytest.raises(UsageError, match="regression belongs to sequence-classification"):
        load(images, task="image-classification", regression=True)
    loaded = load(images, task="image-classification", label_names=["a", "b"])
    assert set(loaded.initialised) == {"classifier.weight", "classifier.bias"}
    assert type(loaded.tokenizer).__name__.endswith("Pil")  # the same pixels with torchvision installed and without
