"""The SQL shapes that summarise, group or order one table, or compare its rows with their average."""

from typing import Final

from .shapes import Shape
from .slots import any_table, named_table

SUMMARIES: Final = (
    Shape(
        "average",
        any_table,
        "SELECT AVG({num}) FROM {t}",
        (
            "What is the average {num} of [all|the] {items}?",
            "[Show|Give|Compute] the average {item} {num}.",
            "[Show|Give] the mean {num} of all {items}.",
            "What {num} do {items} have on average?",
            "On average, what is the {num} of {an_item}?",
        ),
        (
            "Taking all the {items} together, tell me the mean of their {nums}.",
            "How high is the {num} of {items} on average?",
        ),
    ),
    Shape(
        "total",
        any_table,
        "SELECT SUM({num}) FROM {t}",
        (
            "What is the total {num} of [all|the] {items}?",
            "[Show|Give|Compute] the sum of all {item} {nums}.",
            "[Show|Give] the total {num} of all {items}.",
            "What do the {nums} of the {items} add up to?",
            "What is the sum of the {nums} of the {items}?",
        ),
        (
            "Taking all the {items} together, tell me the sum of their {nums}.",
            "Add up the {num} of every {item}.",
        ),
    ),
    Shape(
        "lowest",
        any_table,
        "SELECT MIN({num}) FROM {t}",
        (
            "What is the lowest {num} of [all|the|any] {items}?",
            "[Show|Give|Find] the minimum {item} {num}.",
            "[Show|Give] the smallest {num} of all {items}.",
            "What is the minimum {num} among the {items}?",
            "How low is the smallest {item} {num}?",
        ),
        (
            "Taking all the {items} together, tell me the lowest of their {nums}.",
            "What is the least {num} that any {item} has?",
        ),
    ),
    Shape(
        "highest",
        any_table,
        "SELECT MAX({num}) FROM {t}",
        (
            "What is the highest {num} of [all|the|any] {items}?",
            "[Show|Give|Find] the maximum {item} {num}.",
            "[Show|Give] the largest {num} of all {items}.",
            "What is the maximum {num} among the {items}?",
            "How high is the largest {item} {num}?",
        ),
        (
            "Taking all the {items} together, tell me the highest of their {nums}.",
            "What is the greatest {num} that any {item} has?",
        ),
    ),
    Shape(
        "average_equal",
        any_table,
        "SELECT AVG({num}) FROM {t} WHERE {cat} = {lit}",
        (
            "What is the average {num} of {items} [with|of] {cat} {v}?",
            "[Show|Give|Compute] the average {num} of the {items} whose {cat} is {v}.",
            "[Show|Give] the mean {num} of {items} where the {cat} is {v}.",
            "What {num} do {items} with {cat} {v} have on average?",
            "For the {cat} {v}, what is the average {item} {num}?",
        ),
        (
            "Looking only at {items} that have {v} as their {cat}, tell me the mean of their {nums}.",
            "How high is the {num} on average for {items} that have {a_cat} of {v}?",
        ),
    ),
    Shape(
        "group_count",
        any_table,
        "SELECT {cat}, COUNT(*) FROM {t} GROUP BY {cat}",
        (
            "For each {cat}, [show|give] the {cat} and the number of {items}.",
            "[Show|List] each {cat} with [its|the] number of {items}.",
            "[List|Show|Give] every {cat} and how many {items} it has.",
            "Count the {items} per {cat}, showing the {cat} first.",
            "[Give|Show] the {cats} of the {items} and the number of {items} in each.",
        ),
        (
            "Break the {items} down by {cat}: name the {cat}, then say how many there are.",
            "Next to each {cat}, put the count of its {items}.",
        ),
    ),
    Shape(
        "group_average",
        any_table,
        "SELECT {cat}, AVG({num}) FROM {t} GROUP BY {cat}",
        (
            "For each {cat}, [show|give] the {cat} and the average {num} of its {items}.",
            "[Show|List] each {cat} with the average {item} {num}.",
            "[List|Show|Give] every {cat} and the mean {num} of its {items}.",
            "Average the {num} of {items} per {cat}, showing the {cat} first.",
            "[Give|Show] the {cats} of the {items} and the average {num} in each.",
        ),
        (
            "Break the {items} down by {cat}: name the {cat}, then say how high the {num} is on average.",
            "Next to each {cat}, put the mean of the {nums} of its {items}.",
        ),
    ),
    Shape(
        "group_highest",
        any_table,
        "SELECT {cat}, MAX({num}) FROM {t} GROUP BY {cat}",
        (
            "For each {cat}, [show|give] the {cat} and the highest {num} of its {items}.",
            "[Show|List] each {cat} with the highest {item} {num}.",
            "[List|Show|Give] every {cat} and the maximum {num} of its {items}.",
            "Find the largest {num} of {items} per {cat}, showing the {cat} first.",
            "[Give|Show] the {cats} of the {items} and the maximum {num} in each.",
        ),
        (
            "Break the {items} down by {cat}: name the {cat}, then say what the highest {num} is.",
            "Next to each {cat}, put the maximum of the {nums} of its {items}.",
        ),
    ),
    Shape(
        "group_having",
        any_table,
        "SELECT {cat} FROM {t} GROUP BY {cat} HAVING COUNT(*) > {h}",
        (
            "Which {cats} have more than {h} {items}?",
            "[Show|List] the {cats} that have more than {h} {items}.",
            "[Show|Give] each {cat} with more than {h} {items}.",
            "What are the {cats} with over {h} {items}?",
            "[Find|List] every {cat} where the number of {items} is greater than {h}.",
        ),
        (
            "Name those {cats} for which we count more than {h} {items}.",
            "In which {cats} does the number of {items} exceed {h}?",
        ),
    ),
    Shape(
        "ascending",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num}",
        (
            "[Show|List] the {as} of all {items} [ordered|sorted] by {num}.",
            "[Show|List] the {as} of the {items} from the lowest to the highest {num}.",
            "What are the {as} of the {items}, [ordered|sorted] by {num}?",
            "[Sort|Order] the {items} by {num} and [show|give] the {a} of each.",
            "[Give|Return] {item} {as} in order of increasing {num}.",
        ),
        (
            "Put the {items} in order, smallest {num} first, and tell me the {a} of each.",
            "I would like the {a} of every {item}, with {num} rising down the list.",
        ),
    ),
    Shape(
        "descending",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num} DESC",
        (
            "[Show|List] the {as} of all {items} [ordered|sorted] by {num} descending.",
            "[Show|List] the {as} of the {items} from the highest to the lowest {num}.",
            "What are the {as} of the {items}, [ordered|sorted] by {num} from high to low?",
            "[Sort|Order] the {items} by {num}, highest first, and [show|give] the {a} of each.",
            "[Give|Return] {item} {as} in order of decreasing {num}.",
        ),
        (
            "Put the {items} in order, largest {num} first, and tell me the {a} of each.",
            "I would like the {a} of every {item}, with {num} falling down the list.",
        ),
    ),
    Shape(
        "top",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num} DESC LIMIT {k}",
        (
            "[Show|List] the {as} of the {k} {items} with the highest {num}.",
            "What are the {as} of the top {k} {items} by {num}?",
            "[Show|Give] the {a} of the {k} {items} that have the largest {num}, highest first.",
            "[Give|Return] the {as} of the {k} {items} of greatest {num}, in descending order.",
            "Which {as} do the {k} {items} with the largest {num} have?",
        ),
        (
            "Rank the {items} by {num} from the top down and tell me the {a} of the first {k}.",
            "Only the {k} {items} leading in {num}, please, best first: what is the {a} of each?",
        ),
    ),
    Shape(
        "bottom",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num} LIMIT {k}",
        (
            "[Show|List] the {as} of the {k} {items} with the lowest {num}.",
            "What are the {as} of the bottom {k} {items} by {num}?",
            "[Show|Give] the {a} of the {k} {items} that have the smallest {num}, lowest first.",
            "[Give|Return] the {as} of the {k} {items} of least {num}, in ascending order.",
            "Which {as} do the {k} {items} with the smallest {num} have?",
        ),
        (
            "Rank the {items} by {num} from the bottom up and tell me the {a} of the first {k}.",
            "Only the {k} {items} with minimal {num}, please, smallest first: what is the {a} of each?",
        ),
    ),
    Shape(
        "top_one",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num} DESC LIMIT 1",
        (
            "What is the {a} of the {item} with the [highest|largest] {num}?",
            "[Show|Give] the {a} of the {item} that has the [highest|greatest] {num}.",
            "Find the {item} with the [maximum|largest] {num} and [show|give] its {a}.",
            "Which {a} does the {item} with the highest {num} have?",
            "[Return|Show] the {a} of the {item} of greatest {num}.",
        ),
        (
            "No {item} has a higher {num} than this one: what is its {a}?",
            "Tell me the {a} of the single {item} leading in {num}.",
        ),
    ),
    Shape(
        "bottom_one",
        named_table,
        "SELECT {a} FROM {t} ORDER BY {num} LIMIT 1",
        (
            "What is the {a} of the {item} with the [lowest|smallest] {num}?",
            "[Show|Give] the {a} of the {item} that has the [lowest|least] {num}.",
            "Find the {item} with the [minimum|smallest] {num} and [show|give] its {a}.",
            "Which {a} does the {item} with the lowest {num} have?",
            "[Return|Show] the {a} of the {item} of least {num}.",
        ),
        (
            "No {item} has a lower {num} than this one: what is its {a}?",
            "Tell me the {a} of the single {item} with minimal {num}.",
        ),
    ),
    Shape(
        "above_average",
        named_table,
        "SELECT {a} FROM {t} WHERE {num} > (SELECT AVG({num}) FROM {t})",
        (
            "[Show|List] the {as} of {items} whose {num} is above [the average|average].",
            "What are the {as} of the {items} with {a_num} [above|over] the average {num}?",
            "[Give|Return] the {a} of every {item} with an above average {num}.",
            "Which {as} do the {items} have whose {num} is [greater|higher] than the average?",
            "For {items} with more than the average {num}, [show|list] the {a}.",
        ),
        (
            "Looking only at {items} whose {num} exceeds the mean of all {items}, what is the {a} of each?",
            "Please find the {as} for {items} that have a bigger {num} than {items} have on average.",
        ),
    ),
)
