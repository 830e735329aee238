"""WikiSQL: questions with logical forms, as SQL that can be read back; the headers of their tables where they are at hand.

Zhong et al. 2017, "Seq2SQL". A row is {"table_id", "question", "sql": {"sel", "agg", "conds": [[column, operator, value]]}}
with columns by number. The SQL quotes columns as [name] and values as 'text', so that no name can be taken for syntax.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.examples import PromptExample
from lorakit.data.faults import raise_at_once
from lorakit.data.read import Row, read_rows
from lorakit.errors import DataError

WIKISQL_KEYS = {"table_id", "question", "sql"}
AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
"""By number, as the authors' lib/query.py lists them."""
Tables = Mapping[str, Sequence[str]]
"""Table id -> the names of its columns, each different."""

_COLUMN = r"\[((?:[^\]]|\]\])*)\]"
_VALUE = r"'((?:[^']|'')*)'"
_CONDITION = re.compile(rf"{_COLUMN} (=|>|<|OP) {_VALUE}", re.IGNORECASE)
_SELECT = re.compile(rf"SELECT (?:(MAX|MIN|COUNT|SUM|AVG)\({_COLUMN}\)|{_COLUMN}) FROM table", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LogicalForm:
    """A query's meaning: conditions are a set, and values are compared without case, as the official evaluator does."""

    aggregate: str
    column: str
    conditions: frozenset[tuple[str, str, str]]


def parse_sql(text: str) -> LogicalForm | None:
    """The logical form of SQL as `wikisql_example` writes it; None for any other text."""
    text = " ".join(text.split())
    start = _SELECT.match(text)
    if start is None:
        return None
    aggregate, inside, bare = start.groups()
    at, conditions, joint = start.end(), set(), " WHERE "
    while at < len(text):
        if text[at : at + len(joint)].upper() != joint:
            return None
        found = _CONDITION.match(text, at + len(joint))
        if found is None:
            return None
        column, operator, value = found.groups()
        conditions.add((_plain(column, "]"), operator.upper(), _plain(value, "'").lower()))
        at, joint = found.end(), " AND "
    return LogicalForm(
        (aggregate or "").upper(), _plain(bare if inside is None else inside, "]"), frozenset(conditions)
    )


def wikisql_example(row: Row, line: int, tables: Tables | None, *, targets: bool) -> PromptExample:
    """A question, behind the names of its table's columns where they are known, with its SQL. Raises DataError."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"expected text, came {question!r}", line=line, field="question")
    names: Sequence[str] | None = None
    if tables is not None:
        names = tables.get(str(row.get("table_id")))
        if names is None:
            raise DataError(f"the tables' file has no table {row.get('table_id')!r}", line=line, field="table_id")
    opening = "" if names is None else f"Columns: {', '.join(names)}\n"
    prompt = f"{opening}Question: {' '.join(question.split())}\n"
    if not targets and row.get("sql") is None:
        return PromptExample(prompt, None, (), line)
    text = _sql(row.get("sql"), names, line)
    return PromptExample(prompt, text, (text,), line)


def read_tables(path: Path) -> Tables | None:
    """The headers that stand beside a file of questions: <name>.tables.jsonl, else tables.jsonl; None without either.

    A name that a table has twice is told apart: "Total", "Total (2)". Raises DataError for a damaged file.
    """
    places = (path.with_name(f"{path.stem}.tables.jsonl"), path.with_name("tables.jsonl"))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return None
    tables: dict[str, Sequence[str]] = {}
    for line, row in read_rows(found, on_fault=raise_at_once):
        header = row.get("header")
        if not isinstance(header, list) or not header or "id" not in row:
            reason = "expected a table's id and its header, a list of names"
            raise DataError(reason, source=str(found), line=line, field="header")
        tables[str(row["id"])] = _different([" ".join(str(name).split()) for name in header])
    return tables


def _different(names: Sequence[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        new, number = name, 1
        while new in taken:
            number += 1
            new = f"{name} ({number})"
        taken.append(new)
    return taken


def _sql(form: Any, names: Sequence[str] | None, line: int) -> str:
    if not isinstance(form, dict):
        raise DataError(f"expected sel, agg and conds, came {type(form).__name__}", line=line, field="sql")
    aggregate = _chosen(AGGREGATES, form.get("agg"), "sql.agg", line)
    column = f"[{_quoted(_name(form.get('sel'), names, 'sql.sel', line), ']')}]"
    conditions = form.get("conds")
    if not isinstance(conditions, list) or not all(isinstance(one, list) and len(one) == 3 for one in conditions):
        raise DataError("expected a list of [column, operator, value]", line=line, field="sql.conds")
    parts = []
    for place, operator, value in conditions:
        name = _quoted(_name(place, names, "sql.conds", line), "]")
        sign = _chosen(OPERATORS, operator, "sql.conds", line)
        parts.append(f"[{name}] {sign} '{_quoted(' '.join(str(value).split()), chr(39))}'")
    chosen = f"{aggregate}({column})" if aggregate else column
    return f"SELECT {chosen} FROM table" + (f" WHERE {' AND '.join(parts)}" if parts else "")


def _chosen(known: Sequence[str], number: Any, field: str, line: int) -> str:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(known):
        raise DataError(f"expected a number from 0 to {len(known) - 1}, came {number!r}", line=line, field=field)
    return known[number]


def _name(number: Any, names: Sequence[str] | None, field: str, line: int) -> str:
    if names is not None:
        return _chosen(names, number, field, line)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise DataError(f"expected a column's number, came {number!r}", line=line, field=field)
    return str(number)


def _quoted(text: str, mark: str) -> str:
    return text.replace(mark, mark * 2)


def _plain(text: str, mark: str) -> str:
    return text.replace(mark * 2, mark)
