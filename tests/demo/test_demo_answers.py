"""Judging answers: what counts as equal, what a model's SQL may not do, and where its statement begins and ends."""

import sqlite3
from collections.abc import Iterator

import pytest

from lorakit.demo.answers import (
    QueryError,
    QueryLimits,
    execute,
    execution_accuracy,
    extract_sql,
    same_answer,
    same_rows,
)
from lorakit.demo.database import fill
from lorakit.demo.grammar import questions
from lorakit.errors import UsageError


@pytest.fixture
def conn() -> Iterator[sqlite3.Connection]:
    opened = fill(1)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("rows", "expected", "ordered", "same"),
    [
        ([(1,), (2,)], [(1,), (2,)], True, True),
        ([(2,), (1,)], [(1,), (2,)], True, False),
        ([(2,), (1,)], [(1,), (2,)], False, True),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),  # a multiset, not a set
        ([(1,)], [(1,), (1,)], False, False),
        ([(1, "a")], [("a", 1)], False, False),
        ([(1,)], [(1, 1)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], False, True),
        ([(2,)], [(2.0,)], False, True),
        ([(1.00001,)], [(1.0,)], False, False),
        ([(1234567.8900001,)], [(1234567.89,)], False, True),
        ([(None,)], [(None,)], False, True),
        ([(None,)], [(0,)], False, False),
        ([(None,)], [(0.0,)], False, False),
        ([("1",)], [(1,)], False, False),
        ([("1.0",)], [(1.0,)], False, False),
        ([("a",)], [("A",)], False, False),
        ([], [], False, True),
        ([], [(None,)], False, False),
    ],
)
def test_same_rows(rows: list[tuple[object]], expected: list[tuple[object]], ordered: bool, same: bool) -> None:
    assert same_rows(rows, expected, ordered=ordered) is same
    assert same_rows(expected, rows, ordered=ordered) is same


@pytest.mark.parametrize(
    ("sql", "reference", "same"),
    [
        ("select  NAME from customer as c", "SELECT name FROM customer", True),
        ("SELECT name FROM customer ORDER BY age", "SELECT name FROM customer", True),
        ("SELECT name FROM customer", "SELECT name FROM customer ORDER BY age", False),
        ("SELECT name FROM customer ORDER BY age DESC", "SELECT name FROM customer ORDER BY age ASC", False),
        # An ORDER BY of a subquery, or in a text, asks for no order of the result.
        (
            "SELECT name FROM customer WHERE age > 30 ORDER BY name",
            "SELECT name FROM customer WHERE id IN (SELECT id FROM customer WHERE age > 30 ORDER BY (age))",
            True,
        ),
        (
            "SELECT name FROM customer ORDER BY age",
            "SELECT name FROM customer WHERE city != ' ORDER BY '",
            True,
        ),
        ("SELECT city, name FROM customer", "SELECT name, city FROM customer", False),
        ("SELECT city FROM customer", "SELECT DISTINCT city FROM customer", False),
        ("SELECT SUM(age) * 1.0 / COUNT(*) FROM customer", "SELECT AVG(age) FROM customer", True),
        ("SELECT missing FROM customer", "SELECT name FROM customer", False),
        ("", "SELECT name FROM customer", False),
        ("SELECT (SELECT 1 + COUNT(*) FROM customer) - 1", "SELECT COUNT(*) FROM customer", True),
    ],
)
def test_same_answer(sql: str, reference: str, same: bool) -> None:
    assert same_answer(sql, reference) is same


def test_an_answer_has_to_be_right_on_both_databases(conn: sqlite3.Connection) -> None:
    (count,) = conn.execute("SELECT COUNT(*) FROM customer").fetchone()
    constant = f"SELECT {count}"
    assert same_answer(constant, "SELECT COUNT(*) FROM customer", [conn])
    assert not same_answer(constant, "SELECT COUNT(*) FROM customer")


def test_a_reference_that_fails_is_the_callers_error() -> None:
    with pytest.raises(UsageError, match="no such column"):
        same_answer("SELECT 1", "SELECT missing FROM customer")


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE sale",
        "DELETE FROM sale",
        "INSERT INTO shop VALUES (99, 'x', 'x', 1, 1)",
        "UPDATE shop SET rent = 0",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE TEMP VIEW x AS SELECT 1",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "ATTACH DATABASE ':memory:' AS other",
        "VACUUM",
        "VACUUM INTO '/tmp/never'",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "SAVEPOINT x",
        "WITH x AS (SELECT 1) DELETE FROM sale",
        "SELECT load_extension('x')",
        "SELECT 1; DROP TABLE sale",
        "SELECT 1; SELECT 2",
        "-- nothing",
        "SELECT \x00 1",
        "SELECT '\ud800'",
        "not SQL at all",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    ],
)
def test_anything_but_one_select_is_refused(sql: str, conn: sqlite3.Connection) -> None:
    before = list(conn.iterdump())
    assert isinstance(execute(conn, sql), QueryError)
    assert list(conn.iterdump()) == before
    assert execute(conn, "SELECT 1") == [(1,)]  # and the connection goes on working


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM sale a, sale b, sale c, sale d, sale e",
        "SELECT a.id FROM sale a, sale b, sale c",
        "SELECT zeroblob(1000000000)",
        "SELECT replace(hex(zeroblob(4000)), '0', hex(zeroblob(4000)))",
        f"SELECT '{'a' * 5000}' LIKE '{'%a' * 2000}b'",
    ],
)
def test_endless_or_huge_work_is_stopped(sql: str, conn: sqlite3.Connection) -> None:
    assert isinstance(execute(conn, sql), QueryError)
    assert execute(conn, "SELECT 1") == [(1,)]


def test_the_limit_of_rows_is_exact(conn: sqlite3.Connection) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT i FROM n"
    assert execute(conn, sql, QueryLimits(rows=5)) == [(1,), (2,), (3,), (4,), (5,)]
    assert execute(conn, sql, QueryLimits(rows=4)) == QueryError("more than 4 rows")


def test_the_guard_is_lifted_after_a_query() -> None:
    conn = sqlite3.connect(":memory:")
    length = conn.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    execute(conn, "SELECT 1")
    execute(conn, "DROP TABLE x")
    assert conn.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == length
    conn.execute("PRAGMA query_only = OFF")
    conn.execute("CREATE TABLE x (y)")
    conn.close()


def test_a_closed_connection_is_no_wrong_answer(conn: sqlite3.Connection) -> None:
    conn.close()
    with pytest.raises(sqlite3.ProgrammingError):
        execute(conn, "SELECT 1")


@pytest.mark.parametrize(
    ("output", "sql"),
    [
        (" SELECT name FROM shop", "SELECT name FROM shop"),
        ("SELECT name FROM shop;", "SELECT name FROM shop"),
        ("SELECT name FROM shop; SELECT 2;", "SELECT name FROM shop"),
        ("```sql\nSELECT name\nFROM shop;\n```\nThis lists the names.", "SELECT name\nFROM shop"),
        ("```\nSELECT name FROM shop\n```", "SELECT name FROM shop"),
        ("```SELECT name FROM shop```", "SELECT name FROM shop"),
        ("```SELECT\nname FROM shop```", "SELECT\nname FROM shop"),
        ("```sql\nSELECT name FROM shop", "SELECT name FROM shop"),  # cut off by the limit of tokens
        ("Here is the query you want to select names with:\nSELECT name FROM shop", "SELECT name FROM shop"),
        ("Use the SELECT statement: SELECT name FROM shop;", "SELECT name FROM shop"),
        ("select name from shop", "select name from shop"),
        (" SELECT name FROM shop\nQuestion: What else?\nSQL: SELECT 2", "SELECT name FROM shop"),
        (" SELECT name FROM shop\n\nQuestion: What else?\nSQL: SELECT 2", "SELECT name FROM shop"),
        ("SELECT name FROM shop\n\nThis query lists names.", "SELECT name FROM shop"),
        ("SELECT name FROM shop\nThis query lists names.", "SELECT name FROM shop"),
        ("SELECT name\nFROM shop\nWHERE size > 3\nExplanation: big ones", "SELECT name\nFROM shop\nWHERE size > 3"),
        ("SELECT name FROM shop<|im_end|>\n<|im_start|>user", "SELECT name FROM shop"),
        ("SELECT name FROM shop WHERE name = 'a;b\n\nc';", "SELECT name FROM shop WHERE name = 'a;b\n\nc'"),
        ("The query is `SELECT name FROM shop`, as you see.", "SELECT name FROM shop"),
        ("SELECT `name` FROM `shop`;", "SELECT `name` FROM `shop`"),
        ("WITH x AS (SELECT 1) SELECT * FROM x;", "WITH x AS (SELECT 1) SELECT * FROM x"),
        ("with x as (SELECT 1) SELECT * FROM x", "with x as (SELECT 1) SELECT * FROM x"),
        ("With all shops: SELECT name FROM shop", "SELECT name FROM shop"),
        ("DROP TABLE shop", ""),
        ("I cannot answer that.", ""),
        ("", ""),
    ],
)
def test_extract_sql(output: str, sql: str) -> None:
    assert extract_sql(output) == sql


def test_execution_accuracy_counts_by_shape_and_names_the_failures() -> None:
    asked = questions("heldout", 84)
    outputs = [f"```sql\n{question.sql};\n```" for question in asked]
    assert execution_accuracy(outputs, asked).value == 1.0
    outputs[5], outputs[9], outputs[11] = "SELECT 42", "I do not know.", "SELECT x FROM y"
    judged = execution_accuracy(outputs, asked)
    assert (judged.correct, judged.total) == (81, 84)
    assert [failure.question for failure in judged.failures] == [asked[5], asked[9], asked[11]]
    assert [failure.predicted for failure in judged.failures] == ["SELECT 42", "", "SELECT x FROM y"]
    assert "no such table" in judged.failures[2].reason
    assert sum(score.correct for score in judged.by_shape.values()) == 81
    assert sum(score.total for score in judged.by_shape.values()) == 84
    assert judged.by_shape[asked[9].shape].correct < judged.by_shape[asked[9].shape].total


@pytest.mark.parametrize("outputs", [[], ["SELECT 1"] * 3])
def test_as_many_outputs_as_questions_are_expected(outputs: list[str]) -> None:
    with pytest.raises(UsageError, match="one output a question"):
        execution_accuracy(outputs, questions("heldout", 2))
    with pytest.raises(UsageError, match="at least one"):
        execution_accuracy([], [])
