"""Rows and their lines, out of every kind of file, whole and damaged."""

from pathlib import Path

import pytest

from lorakit.data import read_rows
from lorakit.errors import DataError


def rows(path, **options):
    return list(read_rows(Path(path), **options))


def test_jsonl_counts_blank_lines_and_drops_a_byte_order_mark(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": "x\\u2028y"}\r\n{"a": "\xe2\x80\xa8"}')
    assert rows(path) == [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": "\u2028"})]


@pytest.mark.parametrize("bad", ['{"a": 1', "[1, 2]", "nonsense", "[" * 100_000, '"text"'])
def test_a_malformed_json_line_names_file_and_line(write, bad):
    path = write("a.jsonl", '{"a": 1}\n\n' + bad + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl") as caught:
        rows(path)
    assert caught.value.line == 3
    assert "line 3" in str(caught.value)


def test_reading_goes_on_behind_bad_lines(write):
    faults = []
    path = write("a.jsonl", b'{"a": 1}\noops\n\xff\xfe\n{"a": 2}\n')
    assert rows(path, on_fault=faults.append) == [(1, {"a": 1}), (4, {"a": 2})]
    assert [fault.line for fault in faults] == [2, 3]


def test_json_list_knows_the_line_of_each_object(write):
    path = write("a.json", '\n[\n  {"a": 1},\n  {"a":\n   2}, {"a": 3}\n]\n')
    assert rows(path) == [(3, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_json_of_objects_one_after_the_other(write):
    assert rows(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "line"),
    [('[{"a": 1},\n{"a"', 2), ('[{"a": 1},\n', 2), ('[\n{"a": 1}\n{"a": 2}]', 3), ('[{"a": 1}]\n]', 1), ("[\n1\n]", 2)],
)
def test_damaged_json_names_the_line(write, content, line):
    with pytest.raises(DataError) as caught:
        rows(write("a.json", content))
    assert caught.value.line == line


def test_csv_counts_the_lines_of_quoted_rows(write):
    path = write("a.csv", 'a,b\n"one\ntwo",2\n\n"say ""hi""",3\r\n')
    assert rows(path) == [(2, {"a": "one\ntwo", "b": "2"}), (5, {"a": 'say "hi"', "b": "3"})]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('a,b\n"x\ny",1\n1,2,3\n', 4),
        ("a,b\n1\n", 2),
        ('a,b\n1,2\n"open,3\n4,5\n', 3),
        ('a,b\n1,2\n"x"y,3\n', 3),
        ("a,a\n1,2\n", 1),
    ],
)
def test_bad_csv_names_the_line_where_the_row_begins(write, content, line):
    with pytest.raises(DataError) as caught:
        rows(write("a.csv", content))
    assert caught.value.line == line


def test_tsv_takes_quotes_as_they_are(write):
    path = write("a.tsv", 'a\tb\n" open\t1\n"x"\t" y\n')
    assert rows(path) == [(2, {"a": '" open', "b": "1"}), (3, {"a": '"x"', "b": '" y'})]
    assert rows(write("b.tsv", "1\t2\n"), header=("a", "b")) == [(1, {"a": "1", "b": "2"})]
    with pytest.raises(DataError, match="expected 2 columns"):
        rows(write("c.tsv", "a\tb\n1\t2\n1\n"))


def test_parquet_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", None]}), path)
    assert rows(path) == [(1, {"a": 1, "b": "x"}), (2, {"a": 2, "b": None})]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="no readable Parquet"):
        rows(path)


def test_missing_and_unknown_files(write, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"expected a file ending in \.jsonl"):
        rows(write("a.xlsx", "x"))
    with pytest.raises(DataError, match="not UTF-8"):
        rows(write("a.csv", "a,b\nÄ,ö\n".encode("utf-16")))
