"""The SQL shapes over one table, each with its wordings.

A wording fixes the answer: which columns, in which order; where a group is shown, its key is named first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from . import wordings as w
from .slots import Slots, any_table, named_table
from .wordings import Wordings


@dataclass(frozen=True)
class Shape:
    """One form of query: its SQL in the one style used for it, and the wordings of the questions that ask for it."""

    name: str
    slots: Callable[[Random], Slots]
    sql: str
    wordings: Wordings


_AVERAGE: Final = Wordings(("average", "mean"), ("average", "mean"))
_TOTAL: Final = Wordings(("total", "summed"), ("total",))
_LOWEST: Final = Wordings(("lowest", "smallest", "minimum"), ("lowest", "minimum"))
_HIGHEST: Final = Wordings(("highest", "largest", "maximum"), ("highest", "maximum"))
_UNLESS: Final = Wordings(("",), ("",))  # no phrase at all

ROW_SHAPES: Final = (
    Shape(
        "column",
        named_table,
        "SELECT {a} FROM {t}",
        w.ALL_ROWS.cross(Wordings(("the {a}",), ("the {a}",))),
    ),
    Shape(
        "columns",
        named_table,
        "SELECT {p}, {q} FROM {t}",
        w.ALL_ROWS.cross(Wordings(("the {p} and {q}", "the {p} and the {q}"), ("the {p} and also the {q}",))),
    ),
    Shape(
        "distinct",
        any_table,
        "SELECT DISTINCT {cat} FROM {t}",
        Wordings(
            (
                "[Show|List|Give|Return] the [different|distinct|unique] {cats} of [all|the] {items}.",
                "[Which|What] [different|distinct|unique] {cats} do the {items} have?",
                "What are the [different|distinct|unique] {cats} [of|among] the {items}?",
                "[Show|List|Give] [each|every] {cat} of the {items} [only once|once|without duplicates].",
                "I [want|need] the {item} {cats} without [duplicates|repeats|repetition].",
                "Can you [list|show me] the [different|distinct|unique] {item} {cats}?",
                "[Show|List] the {cats} of the {items}, each {cat} [only once|once].",
                "Go through the {items} and [show|list] the [different|distinct] {cats}.",
                "What {cats} [are there|occur|do we find] among the {items}, [without duplicates|each only once]?",
                "For the {items}, [show|list|give] all [different|distinct|unique] {cats}.",
                "Find [each|every] [different|distinct|unique] {cat} of the {items}.",
            ),
            (
                "Look up the {cats} that our {items} have, with no duplicates.",
                "Could you get me every distinct {cat} that occurs among the {items}?",
            ),
        ),
    ),
    Shape("equal", named_table, "SELECT {a} FROM {t} WHERE {cat} = {lit}", w.ROWS.cross(w.EQUAL)),
    Shape("not_equal", named_table, "SELECT {a} FROM {t} WHERE {cat} != {lit}", w.ROWS.cross(w.NOT_EQUAL)),
    Shape("greater", named_table, "SELECT {a} FROM {t} WHERE {num} > {n}", w.ROWS.cross(w.GREATER)),
    Shape("less", named_table, "SELECT {a} FROM {t} WHERE {num} < {m}", w.ROWS.cross(w.LESS)),
    Shape("between", named_table, "SELECT {a} FROM {t} WHERE {num} BETWEEN {n} AND {m}", w.ROWS.cross(w.BETWEEN)),
    Shape("starts_with", named_table, "SELECT {a} FROM {t} WHERE name LIKE '{letter}%'", w.ROWS.cross(w.STARTS_WITH)),
    Shape("one_of", named_table, "SELECT {a} FROM {t} WHERE {cat} IN ({lit}, {lit2})", w.ROWS.cross(w.ONE_OF)),
    Shape("both", named_table, "SELECT {a} FROM {t} WHERE {cat} = {lit} AND {num} > {n}", w.ROWS.cross(w.BOTH)),
    Shape("either", named_table, "SELECT {a} FROM {t} WHERE {cat} = {lit} OR {num} < {n}", w.ROWS.cross(w.EITHER)),
    Shape(
        "above_average",
        named_table,
        "SELECT {a} FROM {t} WHERE {num} > (SELECT AVG({num}) FROM {t})",
        w.ROWS.cross(w.ABOVE_AVERAGE),
    ),
    Shape("ascending", named_table, "SELECT {a} FROM {t} ORDER BY {num} ASC", w.ROWS.cross(w.ASCENDING)),
    Shape("descending", named_table, "SELECT {a} FROM {t} ORDER BY {num} DESC", w.ROWS.cross(w.DESCENDING)),
    Shape("top", named_table, "SELECT {a} FROM {t} ORDER BY {num} DESC LIMIT {k}", w.TOP_ROWS.cross(w.MOST)),
    Shape("top_one", named_table, "SELECT {a} FROM {t} ORDER BY {num} DESC LIMIT 1", w.ONE_ROW.cross(w.LARGEST)),
    Shape("bottom_one", named_table, "SELECT {a} FROM {t} ORDER BY {num} ASC LIMIT 1", w.ONE_ROW.cross(w.SMALLEST)),
)

SUMMARY_SHAPES: Final = (
    Shape("count", any_table, "SELECT COUNT(*) FROM {t}", w.COUNTS.cross(_UNLESS)),
    Shape("count_equal", any_table, "SELECT COUNT(*) FROM {t} WHERE {cat} = {lit}", w.COUNTS.cross(w.EQUAL)),
    Shape("count_greater", any_table, "SELECT COUNT(*) FROM {t} WHERE {num} > {n}", w.COUNTS.cross(w.GREATER)),
    Shape(
        "count_distinct",
        any_table,
        "SELECT COUNT(DISTINCT {cat}) FROM {t}",
        Wordings(
            (
                "How many [different|distinct|unique] {cats} do the {items} have?",
                "Count the [different|distinct|unique] {cats} of [all|the] {items}.",
                "What is the number of [different|distinct|unique] {cats} [of|among] the {items}?",
                "[Show|Give|Tell] me the number of [different|distinct|unique] {item} {cats}.",
                "I [want|need] to know how many [different|distinct] {cats} there are [for|among] the {items}.",
                "Can you count the [different|distinct|unique] {item} {cats}?",
                "Find out how many [different|distinct|unique] {cats} the {items} have.",
                "How many {cats} do the {items} have, [without duplicates|each counted once]?",
                "How many [different|distinct|unique] {cats} [are there|do we find] [for|among|in] the {items}?",
                "For the {items}, [show|give] the number of [different|distinct|unique] {cats}.",
                "[Show|Give] the count of [different|unique] {item} {cats}.",
            ),
            (
                "What is the count of distinct {cats} that our {items} have?",
                "Could you tell me how many different {cats} occur among the {items}?",
            ),
        ),
    ),
    Shape("average", any_table, "SELECT AVG({num}) FROM {t}", w.SUMMARY.cross(_AVERAGE)),
    Shape("total", any_table, "SELECT SUM({num}) FROM {t}", w.SUMMARY.cross(_TOTAL)),
    Shape("lowest", any_table, "SELECT MIN({num}) FROM {t}", w.SUMMARY.cross(_LOWEST)),
    Shape("highest", any_table, "SELECT MAX({num}) FROM {t}", w.SUMMARY.cross(_HIGHEST)),
    Shape(
        "group_count",
        any_table,
        "SELECT {cat}, COUNT(*) FROM {t} GROUP BY {cat}",
        w.GROUPS.cross(
            Wordings(
                ("the number of {items}", "the count of {items}", "the number of its {items}", "the {item} count"),
                ("how many {items} it has",),
            )
        ),
    ),
    Shape(
        "group_average",
        any_table,
        "SELECT {cat}, AVG({num}) FROM {t} GROUP BY {cat}",
        w.GROUPS.cross(
            Wordings(
                ("the average {num} of its {items}", "the average {item} {num}", "the mean {num} of the {items}"),
                ("the mean {item} {num}", "the average {num} that its {items} have"),
            )
        ),
    ),
    Shape(
        "group_having",
        any_table,
        "SELECT {cat} FROM {t} GROUP BY {cat} HAVING COUNT(*) > {h}",
        Wordings(
            (
                "Which {cats} have [more than|over] {h} {items}?",
                "[Show|List|Give|Return] the {cats} [that have|with|having] [more than|over] {h} {items}.",
                "What are the {cats} [with|that have] [more than|over] {h} {items}?",
                "[Show|Give|Tell] me each {cat} [with|that has] [more than|over] {h} {items}.",
                "I [want|need] the {cats} [that have|with] [more than|over] {h} {items}.",
                "Find [all|the] {cats} where the number of {items} is [greater than|more than|above|over] {h}.",
                "Can you [list|show me] the {cats} [with|that have] more than {h} {items}?",
                "Group the {items} by {cat} and [show|list] the {cats} with [more than|over] {h} {items}.",
                "For which {cats} [are there|do we have] [more than|over] {h} {items}?",
                "[Show|List] each {cat} whose number of {items} is [above|over|greater than|more than] {h}.",
            ),
            (
                "Look up those {cats} whose number of {items} goes beyond {h}.",
                "Could you get me every {cat} that has more than {h} {items}, please?",
            ),
        ),
    ),
)
