"""What an analysis writes: pictures in two forms, JSON, one page that needs no other file."""

import json
import re

import pytest
import tiny
from analyze_kit import adapter

from lorakit.analyze.api import analyze
from lorakit.errors import OutputError

ALL = {"spectrum", "modules", "layers", "adapters", "adapters-by-layer", "weight", "amplification"}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return analyze(adapter(root / "a"), adapter(root / "b", seed=1), base=tiny.llama())


@pytest.fixture(scope="module")
def out(analysis, tmp_path_factory):
    return analysis.save(tmp_path_factory.mktemp("report") / "out")


def test_every_picture_is_there_in_both_forms(out):
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")} == ALL
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    assert all("<svg" in path.read_text() for path in out.glob("*.svg"))


def test_the_page_explains_each_picture_and_needs_nothing_else(out):
    page = (out / "report.html").read_text()
    assert page.count("<svg") == page.count("<figcaption>") == len(ALL)
    said = re.findall(r'<figcaption>.*?</figcaption>\s*<p class="text"[^>]*>(.*?)</p>', page, re.DOTALL)
    assert len(said) == len(ALL)
    assert all(re.search(r"section \d|appendix|Figure|Table", text) for text in said)
    assert all(len(re.findall(r"\. (?=[A-Zφ])|\.$", text.strip())) >= 2 for text in said)
    outside = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in outside)
    assert "http:" not in page
    assert "https:" not in page


def test_json_holds_all_that_was_found(analysis, out):
    found = json.loads((out / "analysis.json").read_text())
    assert [one["path"] for one in found["modules"]] == [one.path for one in analysis.modules]
    assert found["modules"][0]["values"] == list(analysis.modules[0].values)
    assert found["modules"][0]["against_base"]["factor"] == analysis.modules[0].against_base.factor
    assert {grid["what"] for grid in found["grids"]} == {"mean", "adapters", "layers", "weight"}
    assert all(len(grid["phi"]) == len(grid["control"]) for grid in found["grids"])


def test_the_same_files_each_time(analysis, out, tmp_path):
    again = analysis.save(tmp_path / "again")
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in out.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(analysis, tmp_path):
    (tmp_path / "weight.png").write_text("old")
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        analysis.save(tmp_path)
    alone = analyze(adapter(tmp_path.parent / f"{tmp_path.name}-a"))
    alone.save(tmp_path, overwrite=True)
    assert not (tmp_path / "weight.png").exists()  # of an earlier analysis: not of this one
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_the_most_moved_come_first(analysis):
    moved = [one.moved for one in analysis.most_moved()]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == pytest.approx(max(one.norm / one.against_base.weight for one in analysis.modules))
