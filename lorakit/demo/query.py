"""Running a model's SQL safely: one SELECT, no writing, no endless work, no flood of rows."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

Row = tuple[object, ...]


@dataclass(frozen=True)
class QueryLimits:
    """What a query may cost before it counts as failed."""

    steps: int = 2_000_000
    """Instructions of SQLite's virtual machine (a question of the demo takes some thousands)."""
    rows: int = 10_000
    """Rows of a result (the largest table has under a hundred)."""
    value_bytes: int = 10_000
    """Bytes of one text, blob or row, and of the statement itself."""


@dataclass(frozen=True)
class QueryError:
    """Why a query has no answer. A value, not an exception: a wrong prediction is an expected outcome."""

    reason: str


LIMITS: Final = QueryLimits()
_STEPS_A_CHECK: Final = 10_000
_LIKE_PATTERN_BYTES: Final = 100  # LIKE backtracks: a long pattern of % runs inside a single instruction
_ALLOWED: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)


def execute(conn: sqlite3.Connection, sql: str, limits: QueryLimits = LIMITS) -> list[Row] | QueryError:
    """The rows that `sql` gives on `conn`, or a QueryError: bad SQL, several statements, a write, or too much work.

    Nothing that stands in `sql` raises or changes the database: the connection is opened to SELECT, READ, FUNCTION
    and RECURSIVE alone while the query runs, and is left with `PRAGMA query_only` on.
    """
    # A closed connection raises here, outside of the try: that is the caller's mistake, not a wrong answer.
    with _guarded(conn, limits):
        try:
            cursor = conn.execute(sql)
            if cursor.description is None:
                return QueryError("no statement that gives rows")
            rows: list[Row] = cursor.fetchmany(limits.rows + 1)
            cursor.close()  # an unfinished statement would go on holding the connection
        # ValueError: a NUL or a lone surrogate in the text. Warning: several statements, on some versions.
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            return QueryError(str(error) or type(error).__name__)
    if len(rows) > limits.rows:
        return QueryError(f"more than {limits.rows} rows")
    return rows


@contextmanager
def _guarded(conn: sqlite3.Connection, limits: QueryLimits) -> Iterator[None]:
    left = limits.steps // _STEPS_A_CHECK

    def stop() -> int:
        nonlocal left
        left -= 1
        return int(left < 0)

    def authorize(action: int, *_names: str | None) -> int:
        return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY

    sizes = {
        sqlite3.SQLITE_LIMIT_LENGTH: limits.value_bytes,
        sqlite3.SQLITE_LIMIT_SQL_LENGTH: limits.value_bytes,
        sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: _LIKE_PATTERN_BYTES,
    }
    before = {key: conn.setlimit(key, size) for key, size in sizes.items()}
    conn.execute("PRAGMA query_only = ON")
    conn.set_authorizer(authorize)
    conn.set_progress_handler(stop, _STEPS_A_CHECK)
    try:
        yield
    finally:
        conn.set_progress_handler(None, 0)
        conn.set_authorizer(None)
        for key, size in before.items():
            conn.setlimit(key, size)
