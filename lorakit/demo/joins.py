"""The SQL shapes over a child table and the parent that it refers to."""

from typing import Final

from .shapes import Shape
from .slots import child_and_parent

JOINS: Final = (
    Shape(
        "join_columns",
        child_and_parent,
        "SELECT {c}.{x}, {t}.{y} FROM {c} JOIN {t} ON {c}.{t} = {t}.id",
        (
            "[Show|List|Give] the {x} of each {child} and the {y} of its {parent}.",
            "For [each|every] {child}, [show|give] its {x} and the {y} of its {parent}.",
            "What are the {xs} of the {children} and the {ys} of their {parents}?",
            "[List|Show] all {children} with their {x} and the {y} of the {parent}.",
            "I [want|need] every {child}'s {x} together with its {parent}'s {y}.",
        ),
        (
            "Pair the {x} of every single {child} with the {y} of the {parent} it belongs to.",
            "I would like to see two things about every {child}: its {x}, then the {y} of its {parent}.",
        ),
    ),
    Shape(
        "join_filter",
        child_and_parent,
        "SELECT {c}.{x} FROM {c} JOIN {t} ON {c}.{t} = {t}.id WHERE {t}.{cat} = {lit}",
        (
            "[Show|List] the {xs} of {children} whose {parent} has the {cat} {v}.",
            "What are the {xs} of the {children} with a {parent} of {cat} {v}?",
            "[Give|Return] the {x} of every {child} where the {parent}'s {cat} is {v}.",
            "Which {xs} do the {children} have whose {parent} has {cat} {v}?",
            "For {children} whose {parent}'s {cat} is {v}, [show|list] the {x}.",
        ),
        (
            "Looking only at {children} that belong to a {parent} with {v} as its {cat}, what is the {x} of each?",
            "Please find the {xs} for {children} of any {parent} that has {a_cat} of {v}.",
        ),
    ),
    Shape(
        "join_count",
        child_and_parent,
        "SELECT COUNT(*) FROM {c} JOIN {t} ON {c}.{t} = {t}.id WHERE {t}.{cat} = {lit}",
        (
            "How many {children} have a {parent} with the {cat} {v}?",
            "Count the {children} whose {parent} has {cat} {v}.",
            "What is the number of {children} whose {parent}'s {cat} is {v}?",
            "[Give|Show] the number of {children} where the {parent}'s {cat} is {v}.",
            "For {parents} of {cat} {v}, how many {children} are there?",
        ),
        (
            "Tell me how many {children} exist that belong to a {parent} with {v} as its {cat}.",
            "What is the size of the group of {children} of any {parent} that has {a_cat} of {v}?",
        ),
    ),
    Shape(
        "join_total",
        child_and_parent,
        "SELECT SUM({c}.{x}) FROM {c} JOIN {t} ON {c}.{t} = {t}.id WHERE {t}.{cat} = {lit}",
        (
            "What is the total {x} of {children} whose {parent} has the {cat} {v}?",
            "[Show|Give|Compute] the sum of the {xs} of {children} with a {parent} of {cat} {v}.",
            "[Show|Give] the total {x} of all {children} where the {parent}'s {cat} is {v}.",
            "What do the {xs} of the {children} whose {parent}'s {cat} is {v} add up to?",
            "For {parents} of {cat} {v}, what is the total {x} of their {children}?",
        ),
        (
            "Looking only at {children} that belong to a {parent} with {v} as its {cat}, "
            "tell me the sum of their {xs}.",
            "Add up the {x} of every {child} of any {parent} that has {a_cat} of {v}.",
        ),
    ),
    Shape(
        "join_group_count",
        child_and_parent,
        "SELECT {t}.{cat}, COUNT(*) FROM {c} JOIN {t} ON {c}.{t} = {t}.id GROUP BY {t}.{cat}",
        (
            "For each {parent} {cat}, [show|give] the {cat} and the number of {children}.",
            "[Show|List] each {cat} of the {parents} with the number of their {children}.",
            "[List|Show|Give] every {parent} {cat} and how many {children} it has.",
            "Count the {children} per {cat} of their {parent}, showing the {cat} first.",
            "[Give|Show] the {cats} of the {parents} and the number of {children} in each.",
        ),
        (
            "Break the {children} down by {cat} of their {parent}: name the {cat}, then say how many there are.",
            "Next to each {parent} {cat}, put the count of its {children}.",
        ),
    ),
    Shape(
        "join_group_total",
        child_and_parent,
        "SELECT {t}.{cat}, SUM({c}.{x}) FROM {c} JOIN {t} ON {c}.{t} = {t}.id GROUP BY {t}.{cat}",
        (
            "For each {parent} {cat}, [show|give] the {cat} and the total {x} of the {children}.",
            "[Show|List] each {cat} of the {parents} with the total {x} of their {children}.",
            "[List|Show|Give] every {parent} {cat} and the sum of its {child} {xs}.",
            "Add up the {xs} of the {children} per {cat} of their {parent}, showing the {cat} first.",
            "[Give|Show] the {cats} of the {parents} and the total {child} {x} in each.",
        ),
        (
            "Break the {children} down by {cat} of their {parent}: name the {cat}, then say what the {xs} sum to.",
            "Next to each {parent} {cat}, put the sum of the {xs} of its {children}.",
        ),
    ),
    Shape(
        "join_top",
        child_and_parent,
        "SELECT {t}.name FROM {c} JOIN {t} ON {c}.{t} = {t}.id ORDER BY {c}.{x} DESC LIMIT {k}",
        (
            "[Show|List] the {parent} names of the {k} {children} with the highest {x}.",
            "What are the names of the {parents} of the top {k} {children} by {x}?",
            "[Show|Give] the name of the {parent} for the {k} {children} that have the largest {x}, highest first.",
            "[Give|Return] the {parent} names for the {k} {children} of greatest {x}, in descending order.",
            "Which {parent} names belong to the {k} {children} with the largest {x}?",
        ),
        (
            "Rank the {children} by {x} from the top down and tell me the name of the {parent} of the first {k}.",
            "Only the {k} {children} leading in {x}, please, best first: what is the name of the {parent} of each?",
        ),
    ),
    Shape(
        "busy_parents",
        child_and_parent,
        "SELECT {t}.name FROM {c} JOIN {t} ON {c}.{t} = {t}.id GROUP BY {t}.id HAVING COUNT(*) > {m}",
        (
            "[Show|List] the names of {parents} that have more than {m} {children}.",
            "What are the names of the {parents} with over {m} {children}?",
            "[Give|Return] the name of every {parent} with more than {m} {children}.",
            "Which {parents} have more than {m} {children}? [Show|List] the names.",
            "[Find|List] the {parents} by name where the number of {children} is greater than {m}.",
        ),
        (
            "Name those {parents} for which we count more than {m} {children}.",
            "Please find the names for {parents} whose number of {children} exceeds {m}.",
        ),
    ),
    Shape(
        "without_children",
        child_and_parent,
        "SELECT name FROM {t} WHERE id NOT IN (SELECT {t} FROM {c})",
        (
            "[Show|List] the names of {parents} that have no {children}.",
            "What are the names of the {parents} without [any {children}|{children}]?",
            "[Give|Return] the name of every {parent} that does not have any {child}.",
            "Which {parents} have no {children}? [Show|List] the names.",
            "[Find|List] the {parents} by name where there are no {children}.",
        ),
        (
            "Name those {parents} that do not have a single {child}.",
            "Please find the names for {parents} that lack {children} altogether.",
        ),
    ),
    Shape(
        "with_children",
        child_and_parent,
        "SELECT name FROM {t} WHERE id IN (SELECT {t} FROM {c})",
        (
            "[Show|List] the names of {parents} that have [some|any] {children}.",
            "What are the names of the {parents} with at least one {child}?",
            "[Give|Return] the name of every {parent} that has [a|one or more] {child}.",
            "Which {parents} have {children}? [Show|List] the names.",
            "[Find|List] the {parents} by name where there is [a|at least one] {child}.",
        ),
        (
            "Which {parents} turn up among the {children}? Tell me their names.",
            "Please find the names for {parents} that do have {children}.",
        ),
    ),
)
