"""`lorakit compare`: table, JSON, the recipes that are shipped, mistakes."""

import json
from pathlib import Path

import pytest
import yaml
from compare_kit import QUERY

from lorakit.cli import main
from lorakit.compare.plan import load_plan

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def call(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return int(left.value.code or 0), said.out, said.err


def test_table_and_json(recipe, tmp_path, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe("sequence-classification", [{**QUERY, "lr": 1e-3}])))
    code, out, _ = call(capsys, "compare", path)
    assert code == 0
    for text in ("Quality", "most frequent class", "lora", "Cost", "report.html"):
        assert text in out
    code, out, _ = call(capsys, "compare", path, "--json")
    assert code == 0
    assert [row["label"] for row in json.loads(out)["rows"]] == ["most frequent class", "lora"]


def test_mistakes(recipe, tmp_path, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe("sequence-classification", [QUERY])))
    code, out, err = call(capsys, "compare", path, "--set", "compare.seedz=[1]", "--json")
    assert code == 1
    assert "did you mean 'seeds'" in err
    assert "did you mean 'seeds'" in json.loads(out)["error"]
    assert call(capsys, "compare", tmp_path / "none.yaml")[0] == 1
    assert call(capsys, "compare")[0] == 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("compare-*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_right(path):
    plan = load_plan(path)
    assert plan.recipe.output == f"runs/{path.stem}"
    labels = [arm.label for arm in plan.arms]
    families = {arm.family for arm in plan.arms}
    assert len(families) >= (4 if path.stem == "compare-e2e" else 8)
    assert "full fine-tuning" in labels
    text = plan.config.general.text
    assert text is None or (RECIPES.parent / text).is_file()
