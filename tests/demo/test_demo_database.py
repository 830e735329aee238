"""The two fillings of the demo's database: the same each time, different from each other, with whole joins."""

import sqlite3
from contextlib import closing

import pytest

from lorakit.demo.database import CATEGORIES, COLUMNS, DATABASE_SEEDS, NUMBERS, PARENTS, fill, schema_text


def _dump(seed: int) -> list[str]:
    with closing(fill(seed)) as conn:
        return list(conn.iterdump())


@pytest.mark.parametrize("seed", DATABASE_SEEDS)
def test_the_same_seed_fills_the_same_rows(seed: int) -> None:
    assert _dump(seed) == _dump(seed)


def test_each_table_differs_between_the_fillings() -> None:
    first, second = (fill(seed) for seed in DATABASE_SEEDS)
    with closing(first), closing(second):
        for table, columns in COLUMNS.items():
            counts = [conn.execute(f"SELECT COUNT(*) FROM {table}").fetchone() for conn in (first, second)]
            assert counts[0] != counts[1], table
            for column in set(columns) & set(CATEGORIES):
                sql = f"SELECT COUNT(DISTINCT {column}) FROM {table}"
                assert first.execute(sql).fetchone() != second.execute(sql).fetchone(), (table, column)
            names = [description[0] for description in first.execute(f"SELECT * FROM {table}").description]
            assert tuple(names) == columns


@pytest.mark.parametrize("seed", range(1, 30))
def test_any_seed_keeps_the_promises_to_the_questions(seed: int) -> None:
    with closing(fill(seed)) as conn:
        assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        for table, columns in COLUMNS.items():
            for column in columns:
                values = [str(row[0]) for row in conn.execute(f"SELECT {column} FROM {table}")]
                if column in CATEGORIES:
                    assert set(CATEGORIES[column]) < set(values)  # all that are named, and others
                if column in NUMBERS or column == "name":
                    assert len(set(values)) == len(values), f"{table}.{column} leaves ties"
        for child, parent in PARENTS:
            childless = conn.execute(f"SELECT COUNT(*) FROM {parent} WHERE id NOT IN (SELECT {parent} FROM {child})")
            assert childless.fetchone()[0] >= 3


def test_a_filled_database_is_closed_to_writing() -> None:
    with closing(fill(1)) as conn, pytest.raises(sqlite3.OperationalError, match="readonly"):
        conn.execute("DELETE FROM sale")


def test_the_schema_names_every_table_and_reference() -> None:
    lines = schema_text().splitlines()
    assert len(lines) == 5
    assert lines[2] == "worker(id name job age salary shop -> shop.id)"
    assert lines[4] == "sale(id customer -> customer.id product -> product.id amount year)"
