"""Every verb: help, exit codes, what it prints, JSON."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import runs
import yaml

from lorakit.cli import VERBS
from lorakit.errors import UsageError


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_one_example(lorakit, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = lorakit(verb, "--help")
    assert said.code == 0
    assert said.out.count("Example: lorakit") == 1
    assert f"lorakit {verb}" in said.out
    if verb != "demo":
        assert "--json" in said.out


def test_help_lists_the_verbs_without_torch():
    code = "import sys\nfrom lorakit.cli import main\ntry:\n    main(['--help'])\nfinally:\n    sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert all(verb in found.stdout for verb in VERBS)


def test_the_package_runs_as_a_module():
    found = subprocess.run([sys.executable, "-m", "lorakit", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "Usage: lorakit " in found.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["train"],
        ["train", "a", "b"],
        ["merge", "x"],
        ["generate", "--seed", "x"],
        ["train", "a", "--sett=1"],
    ],
)
def test_a_wrong_command_line_is_2(lorakit, words):
    said = lorakit(*words)
    assert said.code == 2
    assert said.out == ""
    assert said.err


# -- train


def test_train_prints_where_everything_is(lorakit, texts, tmp_path):
    said = lorakit("train", texts.recipe, "--set", f"output={tmp_path / 'run'}", "--set", "train.max_steps=2")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["adapter", "report"]
    assert str(tmp_path / "run" / "adapter") in lines[0]
    assert "training for 2 steps" in said.err
    assert "Loading weights" not in said.err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["max_steps"] == 2


def test_train_json_is_the_summary_alone(lorakit, classes, tmp_path):
    said = lorakit("train", classes.recipe, "--json", "--set", f"output={tmp_path / 'run'}")
    assert said.code == 0
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert said.json == {"folder": str(tmp_path / "run"), "interrupted": False, **stored}


def test_train_interrupted_says_how_to_go_on(lorakit, texts, tmp_path, monkeypatch):
    module = sys.modules["lorakit.cli.train"]

    class Pressed(module.Terminal):
        def row(self, row, total_steps):
            super().row(row, total_steps)
            if row["step"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "Terminal", Pressed)
    chosen = f"output={tmp_path / 'a run'}"
    said = lorakit("train", texts.recipe, "--set", chosen, "--set", "method.target_modules=[q_proj]")
    assert said.code == 1
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert last == (
        f"Go on with: lorakit train {texts.recipe} --set '{chosen}' --set 'method.target_modules=[q_proj]' --resume"
    )
    monkeypatch.undo()
    resumed = lorakit("train", texts.recipe, "--set", chosen, "--set", "method.target_modules=[q_proj]", "--resume")
    assert resumed.code == 0
    assert "going on from step 1" in resumed.err


def test_ctrl_c_elsewhere_is_one_word(lorakit, monkeypatch, texts):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    lorakit("train", "--help")
    monkeypatch.setattr(sys.modules["lorakit.cli.train"], "train", pressed)
    said = lorakit("train", texts.recipe)
    assert (said.code, said.out, said.err) == (1, "", "error: interrupted.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds a run already"),
        (["--set", "trian.lr=1"], "did you mean 'train'"),
        (["--set", "method.r=0", "--overwrite"], "r"),
        (["--set", "method.target_modules=[nothing]", "--overwrite"], "no module of LlamaForCausalLM matches"),
        (["--set", "data.train=missing.jsonl", "--overwrite"], "missing.jsonl"),
        (["--set", "task=sequence-classification", "--overwrite"], "does not go with"),
        (["--set", "train.precision=fp16", "--set", "output=elsewhere"], "fp16 needs a GPU"),
    ],
)
def test_a_users_mistake_is_one_message(lorakit, texts, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in texts.run.rglob("*")}
    for more in ([], ["--json"]):
        said = lorakit("train", texts.recipe, *words, *more)
        assert said.code == 1
        assert said.err.count("error: ") == 1
        assert message in said.err
        if more:
            assert message in said.json["error"]
        else:
            assert said.out == ""
    assert {path: path.stat().st_mtime_ns for path in texts.run.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_no_traceback_from_the_installed_command(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: [\n")
    command = [
        sys.executable,
        "-c",
        "from lorakit.cli import main; main()",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--json",
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "is no YAML" in json.loads(found.stdout)["error"]
    assert "Traceback" not in found.stderr


def test_a_warning_is_one_line(lorakit, monkeypatch, texts):
    def warned(*args, **kwargs):
        warnings.simplefilter("always")  # pytest makes errors of warnings; main puts the filters back
        warnings.warn("mind this", stacklevel=1)
        raise UsageError("no")

    lorakit("train", "--help")
    monkeypatch.setattr(sys.modules["lorakit.cli.train"], "train", warned)
    assert lorakit("train", texts.recipe).err == "warning: mind this\nerror: no\n"


# -- evaluate


def test_evaluate_a_classification_run_gives_its_summarys_figures(lorakit, classes, tmp_path):
    said = lorakit("evaluate", classes.run, "--json", "--predictions", tmp_path / "p.jsonl")
    summary = json.loads((classes.run / "summary.json").read_text())
    assert said.json["metrics"] == summary["after"]
    assert said.json["rows"] == 24
    rows = runs.read_rows(tmp_path / "p.jsonl")
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(summary["after"]["accuracy"])
    table = lorakit("evaluate", classes.run)
    assert "accuracy" in table.out
    assert table.out.splitlines()[0] == f"{classes.root / 'eval.jsonl'}, 24 rows"


def test_evaluate_other_data_and_metrics(lorakit, texts):
    said = lorakit("evaluate", texts.run / "adapter", "--data", texts.root / "train.jsonl", "--limit", 3, "--metrics",
                   "exact_match,rougeL", "--max-new-tokens", 5, "--json")  # fmt: skip
    assert said.code == 0
    assert said.json["rows"] <= 3
    assert set(said.json["metrics"]) == {"exact_match", "rougeL"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/adapter"], "no data to measure on"),
        (["{root}/nothing"], "nothing"),
        (["{run}", "--metrics", "blue"], "Did you mean 'bleu'"),
        (["{root}/nothing", "--data", "{root}/eval.jsonl"], "nothing"),
        (["--data", "{root}/eval.jsonl"], "name a run's folder"),
        (["{run}", "--data", "{root}/none.jsonl"], "none.jsonl"),
    ],
)
def test_evaluate_mistakes(lorakit, texts, words, message):
    said = lorakit("evaluate", *(word.format(run=texts.run, root=texts.root) for word in words))
    assert said.code == 1
    assert message in said.err
    assert said.out == ""


def test_evaluate_ignores_a_recipe_that_happens_to_lie_here(lorakit, texts, monkeypatch):
    monkeypatch.chdir(texts.root)
    said = lorakit("evaluate", "--model", texts.model)
    assert said.code == 1
    assert "no data to measure on" in said.err


# -- generate


def test_generate_prints_answers_alone(lorakit, texts):
    said = lorakit("generate", texts.run, "--prompt", "red >", "--prompt", "dog >")
    rows = lorakit("generate", texts.run, "--prompt", "red >", "--prompt", "dog >", "--json").json
    assert said.code == 0
    assert said.out == "".join(row["answer"] + "\n" for row in rows)
    assert [row["prompt"] for row in rows] == ["red >", "dog >"]
    assert max(len(row["answer"]) for row in rows) <= 5  # the run's own max_new_tokens, a token a letter


def test_generate_settings(lorakit, texts):
    def answers(*words):
        return [row["answer"] for row in lorakit("generate", texts.run, "--prompt", "red >", "--json", *words).json]

    assert len(answers("--max-new-tokens", 9)[0]) > 5 or answers("--max-new-tokens", 9) != answers()
    assert answers("--sample", "--seed", 1, "--max-new-tokens", 12) == answers(
        "--sample", "--seed", 1, "--max-new-tokens", 12
    )
    assert answers("--sample", "--seed", 1, "--max-new-tokens", 12) != answers(
        "--sample", "--seed", 2, "--max-new-tokens", 12
    )
    long = answers("--max-new-tokens", 12)[0]
    letter = long[-1]
    assert answers("--max-new-tokens", 12, "--stop", letter) == [long[: long.index(letter)]]
    assert answers("--num-beams", 3) == answers("--num-beams", 3)


def test_generate_from_files_to_a_file(lorakit, texts, tmp_path):
    (tmp_path / "prompts.txt").write_text("red >\ndog >\n")
    said = lorakit("generate", texts.run, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl")
    assert (said.code, said.out) == (0, "")
    rows = runs.read_rows(tmp_path / "out.jsonl")
    assert rows == lorakit("generate", texts.run, "--prompt", "red >", "--prompt", "dog >", "--json").json
    one = lorakit("generate", texts.run, "--prompts", texts.root / "eval.jsonl", "--limit", 1, "--json").json
    assert one[0]["prompt"] in {row["prompt"] for row in runs.read_rows(texts.root / "eval.jsonl")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name either --prompt"),
        (["--prompt", "a", "--prompts", "b"], "name either --prompt"),
        (["--prompt", "a", "--temperature", "0.5"], "acts only with"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompt", ""], "empty"),
    ],
)
def test_generate_mistakes(lorakit, texts, words, message):
    said = lorakit("generate", texts.run, *words)
    assert said.code == 1
    assert message in said.err


# -- merge, inspect, verify, models


def test_merge(lorakit, texts, tmp_path):
    said = lorakit("merge", texts.run, "--out", tmp_path / "m", "--json")
    assert said.code == 0
    assert said.json["max_logit_difference"] < 1e-4
    assert "shards" not in said.err
    merged = lorakit("generate", "--model", tmp_path / "m", "--prompt", "red >", "--max-new-tokens", 5, "--json").json
    attached = lorakit("generate", texts.run, "--prompt", "red >", "--max-new-tokens", 5, "--json").json
    assert merged == attached
    again = lorakit("merge", texts.run, "--out", tmp_path / "m")
    assert again.code == 1
    assert "is not empty" in again.err
    assert lorakit("merge", texts.run, "--out", tmp_path / "m", "--overwrite").code == 0


def test_inspect(lorakit, classes):
    said = lorakit("inspect", classes.run)
    assert said.code == 0
    assert "roberta.encoder.layer.0.attention.self.query" in said.out  # a pipe folds nothing
    assert lorakit("inspect", classes.run, "--json").json["faults"] == []


def test_verify(lorakit, texts, tmp_path):
    assert lorakit("verify", texts.run, "--model", texts.model, "--json").json["ok"] is True
    copy = tmp_path / "adapter"
    shutil.copytree(texts.run / "adapter", copy)
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    for words in (["verify", copy], ["inspect", copy]):
        said = lorakit(*words, "--json")
        assert said.code == 1
        assert said.json["faults"]


def test_models(lorakit):
    assert {one["name"] for one in lorakit("models", "--json").json} == {"smollm2-135m-instruct", "minilm-l6"}
    assert "minilm-l6" in lorakit("models").out
    said = lorakit("models", "--fetch", "minilm", "--json")
    assert said.code == 1
    assert "minilm-l6" in said.json["error"]


def test_the_collector_is_on_again_after_a_plan(lorakit):
    found = lorakit("plan", "gpt2", "--method", "no-such-method")
    assert found.code == 1
    assert gc.isenabled()
