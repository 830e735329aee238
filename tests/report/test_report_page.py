"""The page: one file, escaped, well nested, no empty sections, the same each time."""

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from lorakit.errors import UsageError
from lorakit.report import Curve, Fact, Report, Sample, Table, write_report
from lorakit.report.page import SHOWN, render

VOID = {"meta", "br", "hr", "img", "input", "link"}
MARKUP = '</div></style><script>alert("1")</script><img src=x onerror=alert(2)>'
NASTY = MARKUP + " \x00\x1b[31m\ud800 \u202eRTL مرحبا 😀 {{ 7*7 }}"


class Page(HTMLParser):
    """Checks nesting while it reads; keeps tags, attributes and the words of each element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data.strip()))

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


def full() -> Report:
    points = [(float(step), 3.0 / step) for step in range(1, 60)]
    return Report(
        title=f"Title {NASTY}",
        claim=f"Claim {NASTY}",
        facts=[("Peak memory", "2.3 GB"), Fact("Trained", "1 %", NASTY)],
        curves=[
            Curve(NASTY, NASTY, "$loss_{", {NASTY: points, "_hidden": points, "$x": points}, smooth=[NASTY]),
            Curve("Metric", "step", "f1", {"f1": points[:5]}, marks=[(3.0, NASTY)]),
            Curve("Metric", "step", "f1", {"f1": points[:5]}, marks=[(3.0, NASTY)]),
        ],
        tables=[Table(NASTY, ["Metric", NASTY], [[NASTY, 1.5], ["f1", None], ["x", math.nan]], caption=NASTY)],
        samples=[Sample(NASTY, NASTY, NASTY, NASTY, NASTY, False, True)] * (SHOWN + 2),
        next_steps=[(NASTY, f"lorakit merge {NASTY}")],
        recipe_yaml=f"model: {NASTY}\n",
        warnings=[NASTY],
    )


def test_page_is_well_nested_and_refers_to_nothing_outside():
    text = render(full())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.names())
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "://" not in text
    assert "@import" not in text
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", text))


def test_page_states_a_policy_that_loads_nothing():
    metas = [attributes for tag, attributes in Page(render(full())).tags if tag == "meta"]
    policy = next(meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_each_reference_meets_one():
    page = Page(render(full()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    # Two equal curves on one page have equal ids: then what they name is equal, too.
    assert {attributes["href"] for _, attributes in page.tags if "href" in attributes} <= {f"#{name}" for name in ids}
    once = Page(render(dataclasses.replace(full(), curves=full().curves[:2])))
    ids = [attributes["id"] for _, attributes in once.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


def test_model_output_arrives_as_words():
    text = render(full())
    shown = MARKUP + " ␀␛[31m\ufffd \u202eRTL مرحبا 😀 {{ 7*7 }}"
    words = Page(text).words
    # title, claim, warning, note, table cells, samples, step, recipe
    assert sum(shown in said for _, said in words) >= 10
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    text.encode("utf-8")


def test_right_and_wrong_are_told_in_words():
    words = [said for tag, said in Page(render(full())).words if tag == "span"]
    assert words.count("✓ correct") == words.count("✗ wrong") == SHOWN + 2


def test_an_unjudged_sample_has_no_mark_and_a_missing_side_no_column():
    report = Report("t", samples=[Sample("p", after="")])
    page = Page(render(report))
    words = [said for _, said in page.words]
    assert "span" not in page.names()
    assert "Reference" not in words
    assert "Before" not in words
    assert "After" in words
    assert "(nothing)" in words


def test_samples_beyond_the_first_fold_away():
    samples = [Sample(f"prompt {at}") for at in range(SHOWN + 3)]
    words = [said for tag, said in Page(render(Report("t", samples=samples))).words if tag == "summary"]
    assert words == ["3 more"]
    assert "details" not in Page(render(Report("t", samples=samples[:SHOWN]))).names()


SECTIONS = {
    "facts": "dl",
    "curves": "svg",
    "tables": "table",
    "samples": "article",
    "next_steps": "code",
    "recipe_yaml": "details",
    "warnings": "aside",
}


@pytest.mark.parametrize(("part", "tag"), SECTIONS.items())
def test_a_part_alone_brings_its_section_alone(part, tag):
    whole = dataclasses.replace(full(), samples=full().samples[:1])
    names = Page(render(Report("t", **{part: getattr(whole, part)}))).names()
    assert tag in names
    assert names.count("section") == (0 if part in ("facts", "warnings") else 1)
    assert set(SECTIONS.values()) & set(names) <= {tag, "code" if part == "recipe_yaml" else tag}


def test_a_title_alone_is_a_page_without_sections():
    page = Page(render(Report("Only this")))
    assert not {"section", "h2", "aside", *SECTIONS.values()} & set(page.names())
    assert ("h1", "Only this") in page.words


def test_a_curve_without_a_finite_point_and_a_table_without_rows_leave_nothing():
    curve = Curve("Loss", "step", "loss", {"a": [(1.0, math.nan), (2.0, math.inf)], "b": []})
    page = Page(render(Report("t", curves=[curve], tables=[Table("Empty", ["Metric"], [])])))
    assert "section" not in page.names()


def test_the_same_report_gives_the_same_page():
    assert render(full()) == render(full())


def test_a_command_is_selected_whole_and_kept_letter_for_letter(tmp_path):
    command = "lorakit generate --prompt 'a  <b> & \"c\"'"
    text = write_report(tmp_path / "r.html", Report("t", next_steps=[("Ask", command)])).read_text(encoding="utf-8")
    assert ("code", command) in Page(text).words
    assert "user-select: all" in text


def test_an_indented_recipe_keeps_its_lines():
    recipe = "model: m\ntrain:\n  lr: 1.0e-3\n  epochs: 1\n"
    assert "model: m\ntrain:\n  lr: 1.0e-3\n  epochs: 1</code>" in render(Report("t", recipe_yaml=recipe))


def test_columns_of_numbers_align_to_the_right():
    table = Table("t", ["Name", "Count", "Size", "Words"], [["a", 12000, "5 MB", "b c"], ["d", None, "1.5 GB", 3]])
    page = Page(render(Report("t", tables=[table])))
    heads = [attributes.get("class") for tag, attributes in page.tags if tag == "th"]
    assert heads == [None, "number", "number", None]
    assert [said for tag, said in page.words if tag == "td"] == ["a", "12,000", "5 MB", "b c", "d", "–", "1.5 GB", "3"]


def test_a_ragged_table_is_refused():
    with pytest.raises(UsageError, match=r"expected 2 cells a row.*row 1 has 1"):
        Table("Scores", ["Metric", "Value"], [["f1", 1], ["bleu"]])
