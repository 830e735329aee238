"""lorakit analyze and lorakit compress: what they print, their JSON, their exit codes."""

import json
import shutil

import pytest


def test_analyze_a_run_with_its_base(lorakit, texts, tmp_path):
    said = lorakit("analyze", texts.run, texts.run, "--base", texts.model, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    for title in ("Types of matrices", "What moved most", "Amplification", "Shared directions"):
        assert title in said.out
    assert "q_proj" in said.out
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "weight.svg").is_file()


def test_analyze_as_json(lorakit, texts, tmp_path):
    said = lorakit("analyze", texts.run, "--out", tmp_path / "out", "--json")
    assert said.json["modules"] == json.loads((tmp_path / "out" / "analysis.json").read_text())["modules"]
    assert lorakit("analyze", texts.run, "--out", tmp_path / "out", "--json").code == 1  # taken
    assert lorakit("analyze", texts.run, "--out", tmp_path / "out", "--overwrite", "--json").code == 0


def test_mistakes_are_told(lorakit, tmp_path):
    said = lorakit("analyze", tmp_path / "nothing", "--out", tmp_path / "out")
    assert said.code == 1
    assert "not there" in said.err
    assert lorakit("analyze").code == 2
    assert lorakit("compress", tmp_path, "--energy", "much").code == 2
    assert lorakit("compress", tmp_path, "--energy", 0.9, "--limit", 3).code == 2
    assert lorakit("compress", tmp_path / "nothing", "--energy", 0.9, "--out", tmp_path / "out").code == 1


def test_compress_tells_its_loss(lorakit, texts, tmp_path):
    said = lorakit("compress", texts.run, "--rank", 2, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "loss     lossy" in said.out
    words = ["generate", tmp_path / "out", "--model", texts.model, "--prompt", "red cat >", "--max-new-tokens", 4]
    assert lorakit(*words).code == 0


def test_compress_with_data_tells_the_change_of_the_metric(lorakit, texts, tmp_path):
    words = ["compress", texts.run, "--energy", 1.0, "--out", tmp_path / "out", "--data", texts.root / "eval.jsonl"]
    said = lorakit(*words, "--limit", 8, "--json")
    assert said.code == 0, said.err
    assert said.json["metrics"]
    assert all(before == pytest.approx(after) for before, after in said.json["metrics"].values())
    said = lorakit(*words, "--limit", 4, "--overwrite")
    assert "change" in said.out


def test_without_a_place_it_goes_beside_the_adapter(lorakit, texts, tmp_path):
    run = shutil.copytree(texts.run, tmp_path / "run")
    assert lorakit("compress", run, "--rank", 1).code == 0
    assert (run / "adapter-compressed" / "adapter_config.json").is_file()
    assert lorakit("analyze", run).code == 0
    assert (run / "adapter-analysis" / "report.html").is_file()
