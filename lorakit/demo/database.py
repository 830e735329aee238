"""The demo's database: five tables of a small chain of shops, filled differently by each seed.

    sale.customer -> customer.id      sale.product -> product.id      worker.shop -> shop.id

Every number that a question may order by differs from row to row, so no ordering leaves a tie open. The values that a
question may name (cities, types, jobs, years) stand in every filling; each filling adds others, in other numbers.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Final

# The two fillings on which an answer has to be right: they differ in every table's count of rows and in every
# category's count of values, so that no count is right on both by accident.
DATABASE_SEEDS: Final = (1, 4)

CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {  # column -> the values that questions name; present in every filling
        "city": ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna"),
        "type": ("toy", "book", "food", "tool", "game", "drink"),
        "job": ("clerk", "driver", "manager", "cook", "guard", "cleaner"),
        "year": ("2019", "2020", "2021", "2022", "2023", "2024"),
    }
)
NUMBERS: Final[Mapping[str, range]] = MappingProxyType(
    {  # column -> the whole numbers it is drawn from (years, points, euros, grams, euros, euros, square metres, pieces)
        "age": range(18, 80),
        "score": range(10, 1000),
        "price": range(2, 200),
        "weight": range(20, 900),
        "salary": range(1500, 6000, 10),
        "rent": range(500, 5000, 10),
        "size": range(30, 600),
        "amount": range(1, 500),
    }
)
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "customer": ("id", "name", "city", "age", "score"),
        "product": ("id", "name", "type", "price", "weight"),
        "worker": ("id", "name", "job", "age", "salary", "shop"),
        "shop": ("id", "name", "city", "rent", "size"),
        "sale": ("id", "customer", "product", "amount", "year"),
    }
)
PARENTS: Final = (("worker", "shop"), ("sale", "customer"), ("sale", "product"))  # child.<parent> -> parent.id

_OTHERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {  # values that no question names: a filling takes some of them
        "city": ("Oslo", "Dublin", "Prague", "Lisbon"),
        "type": ("lamp", "shoe", "phone", "chair"),
        "job": ("baker", "buyer", "porter", "nurse"),
        "year": ("2015", "2016", "2017", "2018"),
    }
)
_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "customer": (
            "Adam Alice Anna Ben Bella Bruno Carl Clara Cora Daniel Diana Dora Edgar Ella Emma Felix Fiona "
            "Frank Gina Grace Henry Hugo Ivan Jack Jane Karl Laura Leo Maria Max Nina Oscar Paul Rosa Sam "
            "Sara Tom Vera"
        ),
        "worker": (
            "Albert Amy Andrew Arthur Barbara Bill Bob Chris Cindy Colin David Dennis Donna Eric Eva Evan "
            "Fred Freda George Gloria Helen Harry Irene Jim John Julia Kate Ken Linda Luke Mark Mary Nick "
            "Nora Peter Ruth"
        ),
        "product": (
            "Apple Arrow Atlas Ball Basket Bottle Box Camera Candle Card Chess Cup Dice Doll Drum Egg Engine "
            "Fork Flute Glass Globe Hammer Hat Jar Kite Knife Ladder Lemon Map Nail Orange Pan Piano Puzzle "
            "Robot Rope"
        ),
        "shop": (
            "Arcade Avenue Bazaar Bridge Central Corner Castle Depot Dock East Empire Forum Garden Gallery "
            "Harbor Hill Market Mill North Plaza Port"
        ),
    }
)
_ROWS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"customer": (27, 34), "product": (27, 34), "worker": (27, 34), "shop": (15, 19), "sale": (60, 90)}
)  # the fewest and the most rows of a filling
_CHILDLESS: Final = 3  # at least so many shops without workers, customers and products without sales


def schema_text() -> str:
    """One line a table, for prompts: `worker(id name job age salary shop -> shop.id)`."""
    keys = {(child, parent): f"{parent} -> {parent}.id" for child, parent in PARENTS}
    return "\n".join(
        f"{table}({' '.join(keys.get((table, column), column) for column in columns)})"
        for table, columns in COLUMNS.items()
    )


def fill(seed: int) -> sqlite3.Connection:
    """A new database in memory, the same rows for the same seed, closed to writing. The caller closes it."""
    rng = Random(f"database-{seed}")
    conn = sqlite3.connect(":memory:")
    conn.execute("PRAGMA foreign_keys = ON")
    counts = {table: rng.randint(*_ROWS[table]) for table in COLUMNS}
    for table in ("customer", "product", "shop", "worker", "sale"):  # parents first
        conn.execute(_create_statement(table))
        columns = [_column(rng, table, column, counts) for column in COLUMNS[table]]
        holes = ", ".join("?" * len(columns))
        conn.executemany(f"INSERT INTO {table} VALUES ({holes})", zip(*columns, strict=True))
    conn.commit()
    conn.execute("PRAGMA query_only = ON")
    return conn


def _create_statement(table: str) -> str:
    parents = [parent for child, parent in PARENTS if child == table]
    parts = [f"{column} {_sql_type(column)}" for column in COLUMNS[table]]
    parts += [f"FOREIGN KEY ({parent}) REFERENCES {parent}(id)" for parent in parents]
    return f"CREATE TABLE {table} ({', '.join(parts)})"


def _sql_type(column: str) -> str:
    if column == "id":
        return "INTEGER PRIMARY KEY"
    return "TEXT NOT NULL" if column in ("name", "city", "type", "job") else "INTEGER NOT NULL"


def _column(rng: Random, table: str, column: str, counts: Mapping[str, int]) -> Sequence[int | str]:
    """One column's values, (counts[table],), in row order."""
    rows = counts[table]
    if column == "id":
        return range(1, rows + 1)
    if column == "name":
        return rng.sample(_NAMES[table].split(), rows)
    if column in NUMBERS:
        return rng.sample(NUMBERS[column], rows)
    if column in CATEGORIES:
        return _category(rng, column, rows)
    # A foreign key: some parents are left without children, so that "which shops have no workers" has an answer.
    parents = rng.sample(range(1, counts[column] + 1), counts[column] - rng.randint(_CHILDLESS, _CHILDLESS + 2))
    return [rng.choice(parents) for _ in range(rows)]


def _category(rng: Random, column: str, rows: int) -> list[int | str]:
    named, others = CATEGORIES[column], _OTHERS[column]
    values = [*named, *rng.sample(others, rng.randint(1, len(others)))]
    # Each value stands at least once; the rest lean to some values, so that counts by value differ.
    weights = [rng.randint(1, 5) for _ in values]
    drawn = values + rng.choices(values, weights, k=rows - len(values))
    rng.shuffle(drawn)
    return [int(value) for value in drawn] if column == "year" else list(drawn)
