"""A sweep's folders: tables, going on, members that fail, what is refused."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

import lorakit as lk
from lorakit.cli import main
from lorakit.errors import OutputError, RecipeError, UsageError
from lorakit.run.hold import held
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import open_subject
from lorakit.sweep.api import sweep
from lorakit.sweep.joint import JointTrainer
from lorakit.sweep.members import name_of, parse_vary
from lorakit.sweep.together import group_of, train_alone

SHORT = {"max_steps": 2, "epochs": 1}


def test_the_cross_product_is_written_and_not_repeated(recipe, tmp_path):
    document = recipe(train=SHORT, evaluate={"samples": 1})
    first = sweep(document, vary={"method.r": [1, 2]}, seeds=[0, 1], at_once=3)
    assert [one.name for one in first.members] == ["r-1_seed-0", "r-1_seed-1", "r-2_seed-0", "r-2_seed-1"]
    assert first.trained == 4
    assert first.folder == tmp_path / "sweep"
    written = {
        one.name: (first.folder / one.name / "adapter" / "adapter_model.safetensors").read_bytes()
        for one in first.members
    }
    for one in first.members:
        names = {path.name for path in (first.folder / one.name).iterdir()}
        assert {"recipe.yaml", "adapter", "metrics.jsonl", "summary.json", "report.html"} <= names
        assert load_recipe(first.folder / one.name / "recipe.yaml").method.r == one.changes["method.r"]
    (first.folder / "r-1_seed-1" / "summary.json").unlink()  # as if it had broken off
    again = sweep(document, vary={"method.r": [1, 2]}, seeds=[0, 1])
    assert again.trained == 1
    wider = sweep(document, vary={"method.r": [1, 2, 4]}, seeds=[0, 1])
    assert wider.trained == 2
    assert len(wider.members) == 6
    for name, content in written.items():
        if name != "r-1_seed-1":  # trained again, on its own: equal to rounding
            assert (first.folder / name / "adapter" / "adapter_model.safetensors").read_bytes() == content
    rows = list(csv.DictReader((first.folder / "sweep.csv").read_text().splitlines()))
    assert [row["method.r"] for row in rows] == ["1", "1", "2", "2", "4", "4"]
    assert int(rows[4]["parameters"]) == 4 * int(rows[0]["parameters"])
    table = json.loads((first.folder / "sweep.json").read_text())
    assert table["members"][5]["changes"] == {"method.r": 4, "train.seed": 1}
    best = min(wider.members, key=lambda one: one.eval_loss)
    assert wider.best() == best
    subject = open_subject(first.folder / "r-2_seed-1")
    assert list(lk.adapters(subject.model)) == ["default"]


def test_two_sweeps_in_one_folder_do_not_make_each_others_runs(recipe, tmp_path):
    with held(tmp_path / "sweep", "sweep"), pytest.raises(OutputError, match="another sweep is at work in"):
        sweep(recipe(train=SHORT), vary={"method.r": [1, 2]})
    assert [one.name for one in (tmp_path / "sweep").iterdir()] == [".lock"]


def test_passes_of_few_positions_give_the_same(recipe, tmp_path, monkeypatch):
    document = recipe(train=SHORT)
    whole = sweep(document, vary={"method.r": [1, 2, 4]})
    passes = []
    one_pass = JointTrainer._pass_of

    def counted(trainer, here, parts):
        passes.append([turn.name for turn in here])
        one_pass(trainer, here, parts)

    monkeypatch.setattr(JointTrainer, "_pass_of", counted)
    monkeypatch.setitem(one_pass.__globals__, "POSITIONS", 1)
    cut = sweep(document, vary={"method.r": [1, 2, 4]}, output=tmp_path / "cut")
    assert passes[:3] == [["r-1"], ["r-2"], ["r-4"]]
    for one, other in zip(whole.members, cut.members, strict=True):
        assert one.eval_loss == pytest.approx(other.eval_loss, abs=1e-5)


def test_another_run_in_a_members_folder_is_not_replaced(recipe):
    document = recipe(train=SHORT)
    sweep(document, vary={"method.r": [1, 2]})
    changed = recipe(train={**SHORT, "lr": 1e-3})
    with pytest.raises(OutputError, match="another recipe"):
        sweep(changed, vary={"method.r": [1, 2]})
    assert sweep(changed, vary={"method.r": [1, 2]}, overwrite=True).trained == 2


def test_a_run_of_data_that_changed_since_is_not_taken_for_done(recipe):
    document = recipe(train=SHORT)
    sweep(document, vary={"method.r": [1]})
    assert sweep(document, vary={"method.r": [1]}).trained == 0
    runs.write_rows(Path(document["data"]["train"]), runs.text_rows(12, 7))
    with pytest.raises(OutputError, match="data that has changed"):
        sweep(document, vary={"method.r": [1]})
    assert sweep(document, vary={"method.r": [1]}, overwrite=True).trained == 1


def test_ctrl_c_in_a_run_of_its_own_ends_the_sweep(recipe, monkeypatch):
    begun = []

    def interrupted(one, **_):
        begun.append(one)
        return SimpleNamespace(interrupted=True)

    monkeypatch.setitem(train_alone.__globals__, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(train=SHORT), vary={"method.r": [1, 2, 4]}, at_once=1)
    assert len(begun) == 1


def test_a_member_whose_loss_is_no_number_ends_alone(recipe):
    document = recipe("gpt2", train={"warmup": 0, "schedule": "constant", "clip": None})
    found = sweep(document, vary={"train.lr": [5e-3, 1e19]})
    fine, broken = found.members
    assert fine.failed is None
    assert fine.eval_loss is not None
    assert "learning rate" in broken.failed
    assert broken.eval_loss is None
    alone = sweep(document, vary={"train.lr": [5e-3]}, output=found.folder.with_name("alone"))
    assert fine.eval_loss == pytest.approx(alone.members[0].eval_loss, abs=1e-5)
    assert sweep(document, vary={"train.lr": [5e-3, 1e19]}).trained == 0
    assert "failed" in found.columns()


def test_what_a_pass_cannot_share_is_a_run_of_its_own(recipe):
    document = recipe(train=SHORT)
    kept = {"train.prefix_cache": True, "method.layers_to_transform": [1]}
    for changes in ({"train.packing": True}, kept):
        found = sweep(
            document, variants=[changes, {}, {"method.r": 2}], output=document["output"] + "-" + next(iter(changes))
        )
        assert found.trained == 3
    keys = [group_of(load_recipe(document, [f"train.batch_size={size}"])) for size in (4, 4, 8)]
    assert keys[0] == keys[1] != keys[2]
    assert group_of(load_recipe(document, ["train.packing=true"])) is None


def test_dropout_and_checkpointing_train(recipe):
    document = recipe("bert", method={"dropout": 0.2}, train={**SHORT, "gradient_checkpointing": True, "accumulate": 2})
    found = sweep(document, vary={"method.r": [1, 2]}, seeds=[0, 4])
    assert all(one.failed is None for one in found.members)
    assert len({one.loss for one in found.members}) == 4


def test_values_are_yaml():
    assert parse_vary(["method.r=1,2", "method.target_modules=[q, v],all-linear"]) == {
        "method.r": [1, 2],
        "method.target_modules": [["q", "v"], "all-linear"],
    }
    assert name_of({"method.r": 8, "train.lr": 1e-4}) == "r-8_lr-0.0001"
    assert name_of({"method.target_modules": ["q", "v"]}) != name_of({"method.target_modules": ["q-v"]})
    assert "/" not in name_of({"data.train": "../../etc/passwd"})
    assert name_of({"data.train": "a/b"}) != name_of({"data.train": "a-b"})


@pytest.mark.parametrize("bad", ["method.r", "=1", "method.r=", "method.r=[1"])
def test_a_bad_vary_is_told(bad):
    with pytest.raises((UsageError, RecipeError)):
        parse_vary([bad])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"vary": {"method.rank": [1]}}, "unknown key"),
        ({"vary": {"method.r": [0]}}, "at least 1"),
        ({"vary": {"method.r": []}}, "list of values"),
        ({"vary": {"method.r": [2, 2]}}, "the same"),
        ({"vary": {"output": ["a"]}}, "folder of its own"),
        ({"vary": {"train.seed": [1]}, "seeds": [2]}, "the same"),
        ({"vary": {"method.r": [1]}, "variants": [{"method.r": 2}]}, "variants"),
        ({"vary": {"model.x": [1]}}, "no keys below"),
        ({"at_once": 0}, "at_once"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_loads(how, told, recipe, tmp_path):
    with pytest.raises(UsageError, match=told):
        sweep(recipe(model="llama"), **how)
    assert not (tmp_path / "sweep").exists()


def test_the_command(recipe, tmp_path, capsys):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(train=SHORT)))
    command = ["sweep", str(path), "--vary", "method.r=1,2", "--seeds", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "method.r" in told
    assert "eval_loss" in told
    assert "sweep.csv" in told
    with pytest.raises(SystemExit):
        main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["trained"] == 0
    assert runs.read_rows(tmp_path / "out" / "r-1_seed-0" / "metrics.jsonl")
