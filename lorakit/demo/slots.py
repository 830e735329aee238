"""What the blanks of a template stand for: one table and its columns, or a child table and its parent.

A template is written with `{slots}` and `[one|of|these]`; the same slots fill the SQL beside it.
"""

import re
from collections.abc import Mapping
from random import Random
from typing import Final

from .database import CATEGORIES, COLUMNS, NUMBERS, PARENTS

Slots = Mapping[str, str]

_NAMED: Final = tuple(table for table, columns in COLUMNS.items() if "name" in columns)
_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")
_SPACE_BEFORE_MARK: Final = re.compile(r" +(?=[.?,:])")  # an empty phrase leaves its blank behind
_LIMITS: Final = range(2, 7)  # how many rows "the first k" asks for


def named_table(rng: Random) -> Slots:
    """Slots of a shape that shows columns of one table whose rows have names (see `_single`)."""
    return _single(rng, rng.choice(_NAMED))


def any_table(rng: Random) -> Slots:
    """Slots of a shape over one table, sales too."""
    return _single(rng, rng.choice(tuple(COLUMNS)))


def child_and_parent(rng: Random) -> Slots:
    """Slots of a join: c, child(ren) the table with the foreign key; t, parent(s) the one it refers to.

    x, xs: a number of the child; y: a name, number or category of the parent; cat, cats, a_cat, v, lit: a category of
    the parent and a value; k: how many; m: how many children at least.
    """
    child, parent = rng.choice(PARENTS)
    number = _pick(rng, child, NUMBERS)
    category = _pick(rng, parent, CATEGORIES)
    shown = rng.choice([column for column in COLUMNS[parent] if column != "id"])
    value = rng.choice(CATEGORIES[category])
    return {
        "c": child, "child": child, "children": plural(child), "t": parent, "parent": parent, "parents": plural(parent),
        "x": number, "xs": plural(number), "y": shown, "ys": plural(shown),
        "cat": category, "cats": plural(category), "a_cat": _with_article(category),
        "v": value, "lit": literal(category, value),
        "k": str(rng.choice(_LIMITS)), "m": str(rng.randint(1, 5)),
    }  # fmt: skip


def expand(template: str, slots: Slots, rng: Random) -> str:
    """The template with one of each `[a|b]` chosen and every `{slot}` filled in."""
    text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template).format_map(slots)
    return _SPACE_BEFORE_MARK.sub("", text).replace("  ", " ")


def plural(noun: str) -> str:
    """city -> cities, price -> prices: every noun of this schema is regular."""
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def literal(column: str, value: str) -> str:
    """The value as SQL writes it: years are numbers, everything else is quoted."""
    return value if column == "year" else f"'{value}'"


def _single(rng: Random, table: str) -> dict[str, str]:
    """Slots of one table.

    t, item(s): the table; p, q: two columns that differ; cat: a category, v and w two of its values; num: a number,
    n < m two thresholds from the middle of its range; a: a column other than cat and num (each ends in s for its
    plural: ps, qs, cats, nums); k: how many rows; h: how many rows a group has at least; letter: a name's first.
    """
    number, category = _pick(rng, table, NUMBERS), _pick(rng, table, CATEGORIES)
    columns = [column for column in COLUMNS[table] if column in NUMBERS or column in CATEGORIES or column == "name"]
    first, second = rng.sample(columns, 2)
    shown = rng.choice([column for column in columns if column not in (number, category)] or [number])
    value, other = rng.sample(CATEGORIES[category], 2)
    low, high = _thresholds(rng, NUMBERS[number])
    return {
        "t": table, "item": table, "items": plural(table), "an_item": _with_article(table),
        "p": first, "ps": plural(first), "q": second, "qs": plural(second),
        "cat": category, "cats": plural(category), "a_cat": _with_article(category),
        "v": value, "w": other, "lit": literal(category, value), "lit2": literal(category, other),
        "num": number, "nums": plural(number), "a_num": _with_article(number), "n": str(low), "m": str(high),
        "a": shown, "as": plural(shown),
        "k": str(rng.choice(_LIMITS)), "h": str(rng.randint(2, 6)), "letter": rng.choice("ABCDEFGHJKLMNP"),
    }  # fmt: skip


def _pick(rng: Random, table: str, among: Mapping[str, object]) -> str:
    return rng.choice([column for column in COLUMNS[table] if column in among])


def _thresholds(rng: Random, values: range) -> tuple[int, int]:
    """Two round numbers between the fifth and the four fifths of the range, a fifth of it apart at least."""
    fifth = len(values) * values.step // 5
    unit = 100 if values.stop > 1000 else 10 if values.stop > 100 else 1
    low = rng.randint(values.start + fifth, values.start + 2 * fifth)
    high = rng.randint(values.start + 3 * fifth, values.start + 4 * fifth)
    return max(unit, low // unit * unit), max(2 * unit, high // unit * unit)


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
