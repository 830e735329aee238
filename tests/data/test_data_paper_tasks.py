"""Readers of the paper's tasks, on fixtures in the official forms, and on the real files where they are at hand."""

import itertools
import json

import pytest

from lorakit.data import PromptExample, QuestionExample, group_references, load_examples, parse_sql, sample
from lorakit.errors import DataError, UsageError

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 "
MNLI = (MNLI + "sentence2 label1 gold_label").split()
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]


def table(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def mnli(number, label):
    return [number, 1, "1c", "fiction", "(a)", "(b)", "(a)", "(b)", f"premise {number}", "hypothesis", label, label]


# -- GLUE --------------------------------------------------------------------------------------------------------------


def test_glues_other_files_are_told_by_their_headers(write):
    found = load_examples(write("a/train.tsv", table(MNLI, mnli(0, "neutral"), mnli(1, "entailment"))))
    assert (found.format, found.label_names) == ("glue:mnli", ["entailment", "neutral"])
    assert (found.examples[0].text, found.examples[0].pair) == ("premise 0", "hypothesis")
    scores = [[0, "main-news", "f", 2012, 1, "none", "none", "A plane.", 'An "air" plane.', "5.000"]]
    found = load_examples(write("b/train.tsv", table(STSB, *scores, [*scores[0][:-1], 2])))
    assert (found.format, found.regression) == ("glue:stsb", True)
    assert [row.label for row in found.examples] == [5.0, 2.0]
    assert found.examples[0].pair == 'An "air" plane.'
    rows = table(["index", "question", "sentence", "label"], [0, "What?", "It.", "entailment"])
    found = load_examples(write("c/dev.tsv", rows), label_names=["entailment", "not_entailment"])
    assert (found.format, found.examples[0].text, found.examples[0].label) == ("glue:qnli", "What?", 0)


def test_mnlis_folder_is_both_of_its_dev_sets(write, tmp_path):
    write("mnli/dev_matched.tsv", table(MNLI, mnli(0, "neutral"), mnli(1, "entailment")))
    more = write(
        "mnli/dev_mismatched.tsv", table([*MNLI[:-1], "label2", "gold_label"], [*mnli(2, "neutral"), "neutral"])
    )
    found = load_examples(str(tmp_path / "mnli"), split="eval", format="glue:mnli")
    assert [row.text for row in found.examples] == ["premise 0", "premise 1", "premise 2"]
    alone = load_examples(more, format="glue:mnli", label_names=found.label_names)
    assert [row.label for row in alone.examples] == [1]
    write("mnli/dev_mismatched.tsv", table(MNLI, [1, 2, 3]))
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv: line 2: expected 12 columns"):
        load_examples(str(tmp_path / "mnli"), split="eval", format="glue:mnli")


def test_qqps_few_broken_rows_are_left_out_and_counted(write):
    good = [[n, n, n, f"why {n}?", "why?", n % 2] for n in range(150)]
    found = load_examples(write("train.tsv", table(QQP, *good, [1, 2, "cut"])))
    assert (found.format, len(found), found.skipped) == ("glue:qqp", 150, 1)
    with pytest.raises(DataError, match="2 bad rows"):
        load_examples(write("train.tsv", table(QQP, *good, [1, 2, "cut"], [7, 7, 7, " ", "b", 1])))
    with pytest.raises(DataError, match="expected 4 columns"):  # no other set is spared
        load_examples(
            write("rte.tsv", table(["index", "sentence1", "sentence2", "label"], *[r[:4] for r in good], [1]))
        )


# -- WebNLG and DART ---------------------------------------------------------------------------------------------------

XML = """<?xml version="1.0" ?><benchmark><entries>
<entry category="Airport" eid="Id1" size="2"><originaltripleset><otriple>x | y | z</otriple></originaltripleset>
<modifiedtripleset><mtriple>Aarhus_Airport | cityServed | "Aarhus, Denmark"</mtriple><mtriple>Aarhus | in | EU</mtriple>
</modifiedtripleset><lex comment="good" lid="Id1">Aarhus airport &amp; more .</lex><lex comment="toFix" lid="Id2">no</lex>
<lex comment="good" lid="Id3">It serves Aarhus .</lex></entry>
<entry category="Artist" eid="Id2" size="1"><modifiedtripleset><mtriple>A | b | C</mtriple></modifiedtripleset>
<lex comment="" lang="en">A is C.</lex><lex lang="ru">А есть Ц.</lex></entry></entries></benchmark>"""
FIRST = 'Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : in : EU\n'
JSON = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "modifiedtripleset": [
                    {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus, Denmark"'},
                    {"subject": "Aarhus", "property": "in", "object": "EU"},
                ],
                "lexicalisations": [
                    {"comment": "good", "lex": "Aarhus airport & more .", "xml_id": "Id1"},
                    {"comment": "toFix", "lex": "no"},
                    {"comment": "good", "lex": "It serves Aarhus ."},
                ],
            }
        },
        {
            "2": {
                "category": "Artist",
                "modifiedtripleset": [{"subject": "A", "property": "b", "object": "C"}],
                "lexicalisations": [{"comment": "", "lang": "en", "lex": "A is C."}],
            }
        },
    ]
}


def test_webnlg_is_the_same_in_xml_and_json(write):
    from_xml, from_json = (
        load_examples(write("a.xml", XML), format="webnlg"),
        load_examples(write("a.json", json.dumps(JSON))),
    )
    assert from_xml.examples == from_json.examples
    assert from_xml.format == from_json.format == "webnlg"
    assert [row.completion for row in from_xml.examples] == ["Aarhus airport & more .", "It serves Aarhus .", "A is C."]
    grouped = group_references(from_xml.examples)
    assert [(row.prompt, row.references) for row in grouped] == [
        (FIRST, ("Aarhus airport & more .", "It serves Aarhus .")),
        ("A : b : C\n", ("A is C.",)),
    ]


def test_webnlgs_seen_and_unseen_categories(write):
    file = write("a.xml", XML)
    assert [len(load_examples(file, format=f"webnlg{part}")) for part in ("", ":seen", ":unseen")] == [3, 2, 1]
    assert load_examples(file, format="webnlg:unseen").format == "webnlg:unseen"
    only = XML.replace('"Artist"', '"Food"')
    with pytest.raises(DataError, match="no row of it is unseen"):
        load_examples(write("b.xml", only), format="webnlg:unseen")
    with pytest.raises(UsageError, match="webnlg:unseen"):
        load_examples(file, format="webnlg:new")


def test_webnlgs_folders_are_read_whole(write, tmp_path):
    write("w/train/1triples/Food.xml", XML)
    write("w/train/2triples/Food.xml", XML)
    write("w/dev/all.xml", XML)
    assert len(load_examples(str(tmp_path / "w"), format="webnlg")) == 6
    assert len(load_examples(str(tmp_path / "w"), format="webnlg", split="eval")) == 3
    write("w/train/2triples/Food.xml", XML.replace("A | b | C", "A | b"))
    with pytest.raises(DataError, match="subject"):
        load_examples(str(tmp_path / "w"), format="webnlg")


@pytest.mark.parametrize("bad", ["<benchmark>", "<html></html>", XML.replace("</entries>", ""), ""])
def test_damaged_xml_is_refused(write, bad):
    with pytest.raises(DataError, match=r"XML|<entry>"):
        load_examples(write("a.xml", bad), format="webnlg")


def test_xml_bombs_do_not_go_off(write):
    layers = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 20}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE b [<!ENTITY a0 "{"x" * 100}">{layers}]><benchmark><entry>&a11;</entry></benchmark>'
    with pytest.raises(DataError, match="XML"):
        load_examples(write("a.xml", bomb), format="webnlg")


def test_dart_lowers_properties_and_has_a_row_a_text(write):
    entry = {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "South"]],
        "subtree_was_extended": False,
        "annotations": [{"source": "Wiki", "text": "It joined in 1973."}, {"source": "x", "text": "1973 it was."}],
    }
    found = load_examples(write("dart.json", json.dumps([entry])))
    assert found.format == "dart"
    assert {row.prompt for row in found.examples} == {
        "Mars Hill College : joined : 1973 | [TABLECONTEXT] : [title] : South\n"
    }
    assert group_references(found.examples)[0].references == ("It joined in 1973.", "1973 it was.")
    for change in (
        {"tripleset": [["a", "b"]]},
        {"tripleset": []},
        {"annotations": [{"text": 3}]},
        {"annotations": "x"},
    ):
        with pytest.raises(DataError, match="expected"):
            load_examples(write("dart.json", json.dumps([entry | change])))


# -- WikiSQL -----------------------------------------------------------------------------------------------------------

QUERY = {"sel": 1, "agg": 3, "conds": [[0, 0, "Butler's [CC] and 'x'"], [2, 1, 3]]}
ROW = {"phase": 1, "table_id": "1-1", "question": "How  many?", "sql": QUERY}


def test_wikisql_without_tables_names_columns_by_number(jsonl):
    row = load_examples(jsonl(ROW)).examples[0]
    assert row.prompt == "Question: How many?\n"
    assert row.completion == "SELECT COUNT([1]) FROM table WHERE [0] = 'Butler''s [CC] and ''x''' AND [2] > '3'"


def test_wikisql_with_tables_names_columns(jsonl):
    jsonl({"id": "1-1", "header": ["No. [a]", "Total", "Total"], "rows": []}, name="dev.tables.jsonl")
    source = jsonl(ROW, ROW | {"sql": {"sel": 2, "agg": 0, "conds": []}}, name="dev.jsonl")
    first, second = load_examples(source).examples
    assert first.prompt == "Columns: No. [a], Total, Total (2)\nQuestion: How many?\n"
    assert first.completion.startswith("SELECT COUNT([Total]) FROM table WHERE [No. [a]]] = 'Butler")
    assert second.completion == "SELECT [Total (2)] FROM table"
    form = parse_sql(first.completion)
    assert (form.aggregate, form.column) == ("COUNT", "Total")
    assert form.conditions == {("No. [a]", "=", "butler's [cc] and 'x'"), ("Total (2)", ">", "3")}
    with pytest.raises(DataError, match="no table '2-2'"):
        load_examples(jsonl(ROW | {"table_id": "2-2"}, name="dev.jsonl"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sql": QUERY | {"agg": 6}}, "0 to 5"),
        ({"sql": QUERY | {"sel": -1}}, "column"),
        ({"sql": QUERY | {"conds": [[0, 0]]}}, "conds"),
        ({"sql": QUERY | {"conds": [[0, 9, "x"]]}}, "0 to 3"),
        ({"sql": None}, "sel, agg and conds"),
        ({"question": " "}, "question"),
    ],
)
def test_broken_queries_are_named(jsonl, change, said):
    with pytest.raises(DataError, match=rf"(?s)line 1.*{said}"):
        load_examples(jsonl(ROW | change), format="wikisql")


def test_every_real_query_can_be_read_back(shared):
    for split in ("dev", "test"):
        path = shared / "wikisql" / f"{split}.jsonl"
        found = load_examples(str(path))
        queries = [json.loads(line)["sql"] for line in path.read_text().splitlines() if line]
        assert found.format == "wikisql"
        assert len(found) == len(queries)
        for row, query in zip(found.examples, queries, strict=True):
            form = parse_sql(row.completion)
            assert form is not None
            assert form.column == str(query["sel"])
            wanted = {(str(c), "=><O"[o], " ".join(str(v).split()).lower()) for c, o, v in query["conds"]}
            assert {(c, o[0], v) for c, o, v in form.conditions} == wanted


@pytest.mark.parametrize(
    "text",
    ["", "SELECT", "SELECT [1] FROM", "SELECT [1] FROM table WHERE", "SELECT [1] FROM table WHERE [2] = '3' AND"],
)
def test_what_is_no_query_has_no_logical_form(text):
    assert parse_sql(text) is None
    assert parse_sql("select max([1]) from table where [2] = 'a' and [3] > 'b'").aggregate == "MAX"


# -- SAMSum and SQuAD --------------------------------------------------------------------------------------------------


def test_samsum(write):
    row = {"id": "1", "summary": "Amanda baked cookies.", "dialogue": "Amanda: I baked.\r\nJerry: Sure!"}
    found = load_examples(write("a.json", json.dumps([row])))
    assert found.format == "samsum"
    text = "Amanda: I baked.\nJerry: Sure!\n\nSummary:\n"
    assert found.examples[0] == PromptExample(text, "Amanda baked cookies.", ("Amanda baked cookies.",), 1)
    rows = [row] * 100 + [row | {"dialogue": ""}]  # as the published training set has it
    assert load_examples(write("a.json", json.dumps(rows))).skipped == 1
    with pytest.raises(DataError, match="dialogue"):
        load_examples(write("a.json", json.dumps([row, row | {"dialogue": ""}])))


CONTEXT = "The Norman dynasty had a major political, cultural and military impact."


def squad(*qas, version="v2.0"):
    return {"version": version, "data": [{"title": "Normans", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]}


KNOWN = {
    "id": "a",
    "question": "Who?",
    "answers": [{"text": "Norman", "answer_start": 4}, {"text": "The Norman dynasty", "answer_start": 0}],
}
NONE = {"id": "b", "question": "Where?", "answers": [], "is_impossible": True, "plausible_answers": []}


def test_squad_files_and_rows(write, jsonl):
    found = load_examples(write("dev.json", json.dumps(squad(KNOWN, NONE))))
    first = QuestionExample("Who?", CONTEXT, (("Norman", 4), ("The Norman dynasty", 0)), "a", 1)
    assert found.format == "squad"
    assert found.examples == (first, QuestionExample("Where?", CONTEXT, (), "b", 2))
    answers = {"text": ["Norman", "The Norman dynasty"], "answer_start": [4, 0]}
    row = {"id": "a", "title": "Normans", "context": CONTEXT, "question": "Who?", "answers": answers}
    assert load_examples(jsonl(row)).examples == (first,)
    bare = write("ask.json", json.dumps(squad({"id": "a", "question": "Who?"})))
    assert load_examples(bare, targets=False).examples[0].answers is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            KNOWN | {"answers": [{"text": "Norman", "answer_start": 5}]},
            r"data\[0\].paragraphs\[0\].qas\[0\].answers.*'orman '",
        ),
        (KNOWN | {"answers": [{"text": "The", "answer_start": -3}]}, "Correct answer_start"),
        (KNOWN | {"answers": []}, "is_impossible"),
        (KNOWN | {"question": ""}, r"qas\[0\].question"),
        ("x", "expected text"),
    ],
)
def test_faulty_squad_files_say_where(write, entry, said):
    with pytest.raises(DataError, match=said):
        load_examples(write("dev.json", json.dumps(squad(entry))))
    with pytest.raises(DataError, match="expected a list"):
        load_examples(write("dev.json", json.dumps({"version": "1", "data": {}})))


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [150, 3000, 42061])
def test_smaller_samples_are_parts_of_larger_ones(total):
    rows = [PromptExample(str(n), "x", ("x",), n) for n in range(total)]
    drawn = [{row.line for row in sample(rows, count, 3)} for count in (1, 10, 100, 1000, 10000)]
    for small, large in itertools.pairwise(drawn):
        assert small <= large
    assert [len(one) for one in drawn] == [min(total, count) for count in (1, 10, 100, 1000, 10000)]
