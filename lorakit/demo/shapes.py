"""The SQL shapes over one table: each with its wordings for training and its held-out wordings.

A wording fixes the answer: which columns, in which order; where a group is shown, its key is named first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from .slots import Slots, any_table, named_table


@dataclass(frozen=True)
class Shape:
    """One form of query: its SQL in the one style used for it, and the templates of the questions that ask for it."""

    name: str
    slots: Callable[[Random], Slots]
    sql: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


SINGLE_TABLE: Final = (
    Shape(
        "column",
        named_table,
        "SELECT {a} FROM {t}",
        (
            "[Show|List|Give] the {a} of all {items}.",
            "What are the {as} of the {items}?",
            "For [each|every] {item}, [show|give] the {a}.",
            "I [want|need] the {a} of every {item}.",
            "[List|Show] all {item} {as}.",
        ),
        (
            "Could you tell me the {a} for each of our {items}?",
            "I would like to see one thing about every {item}: its {a}.",
        ),
    ),
    Shape(
        "columns",
        named_table,
        "SELECT {p}, {q} FROM {t}",
        (
            "[Show|List|Give] the {p} and {q} of all {items}.",
            "What are the {ps} and {qs} of the {items}?",
            "For [each|every] {item}, [show|give] the {p} and the {q}.",
            "I [want|need] the {p} and the {q} of every {item}.",
            "[List|Show] {item} {ps} together with their {qs}.",
            "[Return|Give me] all the {items} with {p} and {q}.",
        ),
        (
            "Could you tell me the {p} plus the {q} of each of our {items}?",
            "I would like to see two things about every {item}: its {p}, then its {q}.",
        ),
    ),
    Shape(
        "distinct",
        any_table,
        "SELECT DISTINCT {cat} FROM {t}",
        (
            "[List|Show] the different {cats} of the {items}.",
            "Which distinct {cats} do the {items} have?",
            "What different {cats} are there among the {items}?",
            "[Give|Show] every {cat} of the {items} once, without [duplicates|repeats].",
            "[Show|List] the unique {cats} [of|in] {t}.",
            "What are the distinct {item} {cats}?",
        ),
        (
            "Name each {cat} that occurs among our {items}, but no {cat} twice.",
            "I would like a list of {item} {cats} with no repetition.",
        ),
    ),
    Shape(
        "equal",
        named_table,
        "SELECT {a} FROM {t} WHERE {cat} = {lit}",
        (
            "[Show|List] the {as} of {items} whose {cat} is {v}.",
            "What are the {as} of the {items} with {cat} {v}?",
            "[Give|Return] the {a} of every {item} where the {cat} is {v}.",
            "Which {as} do the {items} with {cat} {v} have?",
            "For {items} with the {cat} {v}, [show|list] the {a}.",
            "I [want|need] the {as} of all {v} {items}.",
        ),
        (
            "Looking only at {items} that have {v} as their {cat}, what is the {a} of each?",
            "Please find the {as} for {items} that have {a_cat} of {v}.",
        ),
    ),
    Shape(
        "not_equal",
        named_table,
        "SELECT {a} FROM {t} WHERE {cat} != {lit}",
        (
            "[Show|List] the {as} of {items} whose {cat} is not {v}.",
            "What are the {as} of the {items} with a {cat} other than {v}?",
            "[Give|Return] the {a} of every {item} except those with {cat} {v}.",
            "Which {as} do the {items} have whose {cat} is different from {v}?",
            "For {items} not having the {cat} {v}, [show|list] the {a}.",
            "Without the {items} of {cat} {v}, what are the {as}?",
        ),
        (
            "Leave out {items} with {v} as their {cat} and tell me the {a} of all others.",
            "Please find the {as} for {items} where the {cat} isn't {v}.",
        ),
    ),
    Shape(
        "greater",
        named_table,
        "SELECT {a} FROM {t} WHERE {num} > {n}",
        (
            "[Show|List] the {as} of {items} whose {num} is [above|over|greater than] {n}.",
            "What are the {as} of the {items} with {a_num} [above|over] {n}?",
            "[Give|Return] the {a} of every {item} where the {num} is [more than|higher than] {n}.",
            "Which {as} do the {items} have whose {num} is larger than {n}?",
            "For {items} with {num} [greater than|over] {n}, [show|list] the {a}.",
            "I [want|need] the {as} of {items} whose {num} goes over {n}.",
        ),
        (
            "Looking only at {items} whose {num} exceeds {n}, what is the {a} of each?",
            "Please find the {as} for {items} that have {a_num} bigger than {n}.",
        ),
    ),
    Shape(
        "less",
        named_table,
        "SELECT {a} FROM {t} WHERE {num} < {m}",
        (
            "[Show|List] the {as} of {items} whose {num} is [below|under|less than] {m}.",
            "What are the {as} of the {items} with {a_num} [below|under] {m}?",
            "[Give|Return] the {a} of every {item} where the {num} is [less than|lower than] {m}.",
            "Which {as} do the {items} have whose {num} is smaller than {m}?",
            "For {items} with {num} [less than|under] {m}, [show|list] the {a}.",
            "I [want|need] the {as} of {items} whose {num} stays under {m}.",
        ),
        (
            "Looking only at {items} whose {num} falls short of {m}, what is the {a} of each?",
            "Please find the {as} for {items} that do not reach {a_num} of {m}.",
        ),
    ),
    Shape(
        "between",
        named_table,
        "SELECT {a} FROM {t} WHERE {num} BETWEEN {n} AND {m}",
        (
            "[Show|List] the {as} of {items} whose {num} is between {n} and {m}.",
            "What are the {as} of the {items} with {a_num} from {n} to {m}?",
            "[Give|Return] the {a} of every {item} where the {num} is between {n} and {m}.",
            "Which {as} do the {items} have whose {num} is in the range {n} to {m}?",
            "For {items} with {num} between {n} and {m}, [show|list] the {a}.",
        ),
        (
            "Looking only at {items} whose {num} lies anywhere from {n} up to {m}, what is the {a} of each?",
            "Please find the {as} for {items} with {a_num} of at least {n} and at most {m}.",
        ),
    ),
    Shape(
        "starts_with",
        named_table,
        "SELECT name FROM {t} WHERE name LIKE '{letter}%'",
        (
            "[Show|List] the names of {items} [that start|starting] with {letter}.",
            "Which {item} names [begin|start] with {letter}?",
            "What are the names of the {items} whose name starts with {letter}?",
            "[Give|Return] every {item} name beginning with the letter {letter}.",
            "[Find|List] {items} by name where the name begins with {letter}.",
        ),
        (
            "Which names of {items} have {letter} as their first letter?",
            "Please find all {item} names with an initial {letter}.",
        ),
    ),
    Shape(
        "one_of",
        named_table,
        "SELECT {a} FROM {t} WHERE {cat} IN ({lit}, {lit2})",
        (
            "[Show|List] the {as} of {items} whose {cat} is {v} or {w}.",
            "What are the {as} of the {items} with {cat} {v} or {w}?",
            "[Give|Return] the {a} of every {item} where the {cat} is either {v} or {w}.",
            "Which {as} do the {items} with {cat} {v} or {w} have?",
            "For {items} with the {cat} {v} or {w}, [show|list] the {a}.",
            "[Show|Give] the {as} of {items} whose {cat} is one of {v} and {w}.",
        ),
        (
            "Looking only at {items} that have {v} or else {w} as their {cat}, what is the {a} of each?",
            "Please find the {as} for {items} whose {cat} is on this list: {v}, {w}.",
        ),
    ),
    Shape(
        "both",
        named_table,
        "SELECT {a} FROM {t} WHERE {cat} = {lit} AND {num} > {n}",
        (
            "[Show|List] the {as} of {items} whose {cat} is {v} and whose {num} is [above|over|greater than] {n}.",
            "What are the {as} of the {items} with {cat} {v} and {a_num} [above|over] {n}?",
            "[Give|Return] the {a} of every {item} where the {cat} is {v} and the {num} is [more|higher] than {n}.",
            "Which {items} with {cat} {v} have {a_num} larger than {n}? [Show|List] the {a}.",
            "For {items} with the {cat} {v} and {num} [greater than|over] {n}, [show|list] the {a}.",
        ),
        (
            "Looking only at {items} that have {v} as their {cat} and whose {num} exceeds {n}, "
            "what is the {a} of each?",
            "Please find the {as} for {items} that have {a_cat} of {v} and also {a_num} bigger than {n}.",
        ),
    ),
    Shape(
        "either",
        named_table,
        "SELECT {a} FROM {t} WHERE {cat} = {lit} OR {num} < {n}",
        (
            "[Show|List] the {as} of {items} whose {cat} is {v} or whose {num} is [below|under|less than] {n}.",
            "What are the {as} of the {items} with {cat} {v} or {a_num} [below|under] {n}?",
            "[Give|Return] the {a} of every {item} where the {cat} is {v} or the {num} is [less than|lower than] {n}.",
            "Which {items} have the {cat} {v} or {a_num} smaller than {n}? [Show|List] the {a}.",
            "For {items} with the {cat} {v} or {num} [less than|under] {n}, [show|list] the {a}.",
        ),
        (
            "Looking only at {items} that have {v} as their {cat} or whose {num} falls short of {n}, "
            "what is the {a} of each?",
            "Please find the {as} for {items} that have {a_cat} of {v} or else a smaller {num} than {n}.",
        ),
    ),
    Shape(
        "count",
        any_table,
        "SELECT COUNT(*) FROM {t}",
        (
            "How many {items} are there?",
            "Count [all|all the|the] {items}.",
            "What is the number of {items}?",
            "[Give|Show] the number of [all|the] {items}.",
            "How many {items} do we have?",
        ),
        (
            "How many rows does the {t} table hold?",
            "How many {items} exist altogether?",
        ),
    ),
    Shape(
        "count_equal",
        any_table,
        "SELECT COUNT(*) FROM {t} WHERE {cat} = {lit}",
        (
            "How many {items} have the {cat} {v}?",
            "Count the {items} whose {cat} is {v}.",
            "What is the number of {items} with {cat} {v}?",
            "[Give|Show] the number of {items} where the {cat} is {v}.",
            "For the {cat} {v}, how many {items} are there?",
        ),
        (
            "Tell me how many {items} exist that have {v} as their {cat}.",
            "What is the size of the group of {items} that have {a_cat} of {v}?",
        ),
    ),
    Shape(
        "count_greater",
        any_table,
        "SELECT COUNT(*) FROM {t} WHERE {num} > {n}",
        (
            "How many {items} have {a_num} [above|over|greater than] {n}?",
            "Count the {items} whose {num} is [above|over] {n}.",
            "What is the number of {items} with {a_num} [more than|higher than] {n}?",
            "[Give|Show] the number of {items} where the {num} is larger than {n}.",
            "With a {num} over {n}, how many {items} are there?",
        ),
        (
            "Tell me how many {items} exist whose {num} exceeds {n}.",
            "What is the size of the group of {items} that have {a_num} bigger than {n}?",
        ),
    ),
    Shape(
        "count_distinct",
        any_table,
        "SELECT COUNT(DISTINCT {cat}) FROM {t}",
        (
            "How many different {cats} do the {items} have?",
            "Count the distinct {cats} of the {items}.",
            "What is the number of different {cats} among the {items}?",
            "[Give|Show] the number of distinct {item} {cats}.",
            "How many unique {cats} are there in {t}?",
        ),
        (
            "Tell me how many {cats} occur among our {items}, counting no {cat} twice.",
            "Over how many separate {cats} are the {items} spread?",
        ),
    ),
)
