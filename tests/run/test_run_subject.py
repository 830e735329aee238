"""What comes of a run: measuring it, asking it, merging it."""

import json
import subprocess
import sys

import pytest
import torch

import lorakit as lk
from lorakit.errors import LorakitError, OutputError, UsageError
from lorakit.generate import GenerateConfig
from lorakit.run.export import export_merged
from lorakit.run.measure import answer, evaluate_subject, recipe_of_run
from lorakit.run.subject import open_subject


@pytest.fixture
def run(recipe):
    """run(task, ...): the folder of a finished run."""
    return lambda task="causal-lm", **changes: lk.train(recipe(task, **changes)).folder


def logits(model, task="causal-lm"):
    inputs = {"input_ids": torch.tensor([[5, 9, 20, 31]])}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 7]])
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_evaluate_gives_the_summarys_figures(run):
    """The run's own data settings hold: its columns, its lengths, its sample."""
    folder = run("sequence-classification", data={"max_length": 6, "truncate": True, "eval_limit": 7})
    recipe = recipe_of_run(folder)
    subject = open_subject(folder)
    assert subject.label_names == ["neg", "pos", "so"]
    found = evaluate_subject(subject, recipe.data.eval, data=recipe.data, seed=recipe.train.seed)
    assert len(found.rows) == 7
    assert found.metrics == json.loads((folder / "summary.json").read_text())["after"]


def test_evaluate_of_text_gives_the_summarys_figures(run):
    folder = run(evaluate={"metrics": ["rougeL"]}, train={"lr": 0.03, "epochs": 3})
    recipe = recipe_of_run(folder)
    found = evaluate_subject(
        open_subject(folder), recipe.data.eval, data=recipe.data, metrics=["rougeL"], config=recipe.generate
    )
    assert found.metrics == json.loads((folder / "summary.json").read_text())["after"]


def test_a_folder_that_is_no_run_has_no_recipe(tmp_path):
    assert recipe_of_run(tmp_path) is None


def test_a_runs_folder_and_its_adapters_folder_are_one(run):
    folder = run()
    one, other = open_subject(folder), open_subject(folder / "adapter")
    assert torch.equal(logits(one.model), logits(other.model))
    assert one.adapter == other.adapter == folder / "adapter"


def test_the_base_alone(models):
    subject = open_subject(model=models["llama"])
    assert subject.adapter is None
    rows = answer(subject, ["red >", "dog >"], GenerateConfig(max_new_tokens=3))
    assert [row["prompt"] for row in rows] == ["red >", "dog >"]


def test_nothing_named():
    with pytest.raises(UsageError, match="name a run's folder, an adapter or a base model"):
        open_subject()


def test_a_run_without_adapter(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(UsageError, match="has no adapter yet"):
        open_subject(tmp_path)


def test_a_classifier_writes_no_text(run):
    with pytest.raises(UsageError, match="use lorakit evaluate"):
        answer(open_subject(run("sequence-classification")), ["x"], GenerateConfig())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "red >\ndog >\n"),
        ("p.jsonl", '{"prompt": "red >"}\n{"prompt": "dog >"}\n'),
        ("p.csv", "prompt,completion\nred >,x\ndog >,y\n"),
    ],
)
def test_files_of_prompts(models, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    subject, config = open_subject(model=models["llama"]), GenerateConfig(max_new_tokens=3)
    rows = answer(subject, tmp_path / name, config)
    assert rows == answer(subject, ["red >", "dog >"], config)
    assert answer(subject, tmp_path / name, config, limit=1)[0] in rows


# -- merge


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq", "sequence-classification"])
def test_the_merged_folder_is_a_plain_model(run, tmp_path, task):
    import transformers

    folder = run(task)
    subject = open_subject(folder)
    attached = logits(subject.model, task)
    export = export_merged(subject, tmp_path / "merged")
    kind = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}.get(
        task, "AutoModelForSequenceClassification"
    )
    transformers.utils.logging.disable_progress_bar()
    merged, info = getattr(transformers, kind).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged, task), attached, rtol=1e-5, atol=1e-5)
    assert export.max_logit_difference < 1e-4
    assert export.bytes == sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("red")["input_ids"]
    if task == "sequence-classification":
        assert merged.config.id2label == {0: "neg", 1: "pos", 2: "so"}
        again = open_subject(model=str(tmp_path / "merged"), task=task)
        assert again.label_names == ["neg", "pos", "so"]


def test_merge_needs_an_adapter(models, tmp_path):
    with pytest.raises(UsageError, match="nothing to merge"):
        export_merged(open_subject(model=models["llama"]), tmp_path / "merged")


def test_merge_replaces_nothing_by_itself(run, tmp_path):
    subject, target = open_subject(run()), tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        export_merged(subject, target)
    with pytest.raises(OutputError, match="holds no model"):
        export_merged(subject, target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["precious.txt"]
    with pytest.raises(OutputError, match="is a file"):
        export_merged(subject, target / "precious.txt", overwrite=True)


def test_merge_never_replaces_its_own_base_or_adapter(run):
    subject = open_subject(run())
    with pytest.raises(OutputError, match="which is merged here"):
        export_merged(subject, subject.name, overwrite=True)
    (subject.adapter / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="which is merged here"):
        export_merged(subject, subject.adapter, overwrite=True)


def test_merge_replaces_a_model_when_told(run, tmp_path):
    folder = run()
    export_merged(open_subject(folder), tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("of the old one")
    export_merged(open_subject(folder), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()


LIMITED = """
import resource, sys
from lorakit.errors import OutputError
from lorakit.run.export import export_merged
from lorakit.run.subject import open_subject
subject = open_subject(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    export_merged(subject, sys.argv[2])
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(run, tmp_path):
    """The system itself refuses to write more: safetensors reports that in an error of its own."""
    folder = run()
    (tmp_path / "place").mkdir()
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / "place" / "out")], capture_output=True, text=True
    )
    assert "Nothing was left behind" in out.stdout, out.stderr
    assert list((tmp_path / "place").iterdir()) == []


def test_errors_are_lorakits(run, tmp_path):
    folder = run()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(LorakitError):
        open_subject(folder)
