"""The English of the questions: sentence frames and the phrases that go into them, for training and held out.

A frame has `<if>` where a phrase goes. Training crosses its own frames with its own phrases; so does the held-out side,
so that a held-out question differs from all of training's in both.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Wordings:
    """Templates for training, and others that are held out."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def cross(self, phrases: "Wordings") -> "Wordings":
        """Each of these frames with each of the phrases in the place of its `<if>`."""
        return Wordings(_cross(self.train, phrases.train), _cross(self.heldout, phrases.heldout))

    def rename(self, **names: str) -> "Wordings":
        """The same wordings with other text for some slots: `rename(items="{children}")`."""
        return Wordings(_rename(self.train, names), _rename(self.heldout, names))


def _cross(frames: tuple[str, ...], phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(frame.replace("<if>", phrase) for frame in frames for phrase in phrases)


def _rename(templates: tuple[str, ...], names: dict[str, str]) -> tuple[str, ...]:
    for old, new in names.items():
        templates = tuple(template.replace(f"{{{old}}}", new) for template in templates)
    return templates


# Frames that ask for a column of some rows, of all rows, or of one row.
ROWS: Final = Wordings(
    (
        "[Show|List|Give|Return] the {as} of [all|the] {items} <if>.",
        "What are the {as} of the {items} <if>?",
        "[Show|Give|Tell] me the {a} of [each|every] {item} <if>.",
        "For [all|the] {items} <if>, [show|list|give] the {a}.",
        "I [want|need] the {as} of {items} <if>.",
        "Which {as} do the {items} <if> have?",
        "Find [all|the] {items} <if> and [show|list|return] their {as}.",
        "Can you [list|show me] the {as} of {items} <if>?",
        "Take only {items} <if>: what is the {a} of each?",
        "[Please list|I would like to see] the {a} for each of the {items} <if>.",
    ),
    (
        "Look up the {as} of those {items} <if>.",
        "Could you get me the {a} for every {item} <if>, please?",
        "Of the {items} <if>, I would like to know the {as}.",
    ),
)
ALL_ROWS: Final = Wordings(
    (
        "[Show|List|Give|Return] <if> of [all|all the|the] {items}.",
        "What are <if> of the {items}?",
        "[Show|Give|Tell] me <if> of [each|every] {item}.",
        "For [each|every] {item}, [show|list|give] <if>.",
        "I [want|need] <if> of [all|the] {items}.",
        "Go through [all|the] {items} and [show|list|return] <if>.",
        "Can you [list|show me] <if> of all {items}?",
        "[Please list|I would like to see] <if> for each of the {items}.",
    ),
    (
        "Look up <if> of all our {items}.",
        "Could you get me <if> for every {item} there is, please?",
    ),
)
COUNTS: Final = Wordings(
    (
        "How many {items} <if> are there?",
        "Count [all|the] {items} <if>.",
        "What is the number of {items} <if>?",
        "[Show|Give|Tell] me the number of {items} <if>.",
        "Can you count the {items} <if>?",
        "I [want|need] to know how many {items} <if> there are.",
        "Find out how many {items} <if> exist.",
        "How many {items} <if> do we have?",
    ),
    (
        "What is the count of {items} <if>?",
        "Could you tell me how many {items} <if> you find?",
    ),
)
TOP_ROWS: Final = Wordings(
    (
        "[Show|List|Give|Return] the {as} of the {k} {items} <if>.",
        "What are the {as} of the {k} {items} <if>?",
        "For the {k} {items} <if>, [show|list|give] the {a}.",
        "I [want|need] the {as} of the {k} {items} <if>.",
        "Find the {k} {items} <if> and [show|list|return] their {as}.",
        "Can you [list|show me] the {as} of the {k} {items} <if>?",
        "Which {as} do the {k} {items} <if> have?",
    ),
    (
        "Look up the {as} of those {k} {items} <if>.",
        "Could you get me the {a} for each of the {k} {items} <if>?",
    ),
)
ONE_ROW: Final = Wordings(
    (
        "What is the {a} of the {item} <if>?",
        "[Show|Give|Return] the {a} of the {item} <if>.",
        "[Show|Give|Tell] me the {a} of the one {item} <if>.",
        "For the {item} <if>, [show|list|give] the {a}.",
        "I [want|need] the {a} of the {item} <if>.",
        "Which {a} does the {item} <if> have?",
        "Find the {item} <if> and [show|return] its {a}.",
        "Can you [give|show] me the {a} of the {item} <if>?",
    ),
    (
        "Look up the {a} of that {item} <if>.",
        "Could you get me the {a} for the single {item} <if>, please?",
    ),
)
SUMMARY: Final = Wordings(
    (
        "What is the <if> {num} of [all|the] {items}?",
        "[Show|Give|Find] the <if> {num} of [all|the] {items}.",
        "[Show|Give|Tell] me the <if> {item} {num}.",
        "For [all|all the] {items}, what is the <if> {num}?",
        "I [want|need] the <if> {num} [of|among] the {items}.",
        "Can you compute the <if> {num} of all {items}?",
        "Take all {items}: what is their <if> {num}?",
    ),
    (
        "Look up the <if> {num} for our {items}.",
        "Could you get me the <if> {num} that the {items} have?",
    ),
)
# The key of a group stands first in each of these, so that the order of the columns is said.
GROUPS: Final = Wordings(
    (
        "For each {cat}, [show|give|list] the {cat} and <if>.",
        "[Show|List|Give] [each|every] {cat} with <if>.",
        "[Show|List] every {cat} together with <if>.",
        "Group the {items} by {cat} and [show|give] the {cat} and <if>.",
        "Per {cat}, [show|give] the {cat} and <if>.",
        "I [want|need] each {cat} and <if>.",
        "Can you [list|show me] the {cats}, each with <if>?",
        "[Show|Find] <if> per {cat}, with the {cat} first.",
        "By {cat}: what are the {cat} and <if>?",
    ),
    (
        "Look up every {cat} along with <if>.",
        "Break the {items} down by {cat}, giving the {cat} and then <if>.",
    ),
)

EQUAL: Final = Wordings(
    (
        "whose {cat} is {v}",
        "with {cat} {v}",
        "with the {cat} {v}",
        "with {a_cat} of {v}",
        "where the {cat} is {v}",
        "having {cat} {v}",
        "with {v} as {cat}",
        "for which the {cat} is {v}",
        "whose {cat} equals {v}",
    ),
    ("whose {cat} happens to be {v}", "listed with {v} as the {cat}"),
)
NOT_EQUAL: Final = Wordings(
    (
        "whose {cat} is not {v}",
        "with a {cat} other than {v}",
        "where the {cat} is not {v}",
        "not having {cat} {v}",
        "without {v} as {cat}",
        "with any {cat} but {v}",
        "for which the {cat} is anything but {v}",
        "whose {cat} is different from {v}",
    ),
    ("whose {cat} isn't {v}", "listed with another {cat} than {v}"),
)
GREATER: Final = Wordings(
    (
        "whose {num} is [above|over|greater than|higher than|larger than|more than] {n}",
        "with {a_num} [above|over|greater than|higher than] {n}",
        "with {a_num} of [over|more than] {n}",
        "where the {num} is [above|over|greater than|larger than|more than] {n}",
        "having {a_num} [above|over|larger than] {n}",
        "for which the {num} [is more than|is above|exceeds] {n}",
        "whose {num} exceeds {n}",
    ),
    ("whose {num} goes beyond {n}", "with {a_num} bigger than {n}"),
)
LESS: Final = Wordings(
    (
        "whose {num} is [below|under|less than|lower than|smaller than] {m}",
        "with {a_num} [below|under|less than|lower than] {m}",
        "with {a_num} of [under|less than] {m}",
        "where the {num} is [below|under|less than|smaller than] {m}",
        "having {a_num} [below|under|smaller than] {m}",
        "for which the {num} is [less than|below] {m}",
        "whose {num} does not reach {m}",
    ),
    ("whose {num} stays beneath {m}", "with {a_num} that falls below {m}"),
)
BETWEEN: Final = Wordings(
    (
        "whose {num} is between {n} and {m}",
        "with {a_num} between {n} and {m}",
        "with {a_num} from {n} to {m}",
        "where the {num} [is|lies] between {n} and {m}",
        "having {a_num} from {n} to {m}",
        "whose {num} is in the range {n} to {m}",
        "whose {num} is at least {n} and at most {m}",
    ),
    ("whose {num} falls between {n} and {m}", "with {a_num} anywhere from {n} up to {m}"),
)
STARTS_WITH: Final = Wordings(
    (
        "whose name starts with {letter}",
        "whose name begins with {letter}",
        "with a name [starting|beginning] with {letter}",
        "where the name starts with {letter}",
        "with a name that starts with the letter {letter}",
        "having a name that begins with {letter}",
    ),
    ("whose name has {letter} as its first letter", "called something that starts with {letter}"),
)
ONE_OF: Final = Wordings(
    (
        "whose {cat} is {v} or {w}",
        "whose {cat} is either {v} or {w}",
        "with {cat} {v} or {w}",
        "with {a_cat} of {v} or {w}",
        "where the {cat} is {v} or {w}",
        "having {cat} {v} or {w}",
        "with {v} or {w} as {cat}",
        "whose {cat} is one of {v} and {w}",
    ),
    ("whose {cat} happens to be {v} or {w}", "listed with either {v} or {w} as the {cat}"),
)
BOTH: Final = Wordings(
    (
        "whose {cat} is {v} and whose {num} is [above|over|greater than|more than] {n}",
        "with {cat} {v} and {a_num} [above|over|greater than|higher than] {n}",
        "with {v} as {cat} and {a_num} [above|over] {n}",
        "where the {cat} is {v} and the {num} is [above|over|more than|larger than] {n}",
        "having {cat} {v} and {a_num} [above|over|larger than] {n}",
        "for which the {cat} is {v} and the {num} [exceeds|is more than] {n}",
    ),
    (
        "whose {cat} happens to be {v} and whose {num} goes beyond {n}",
        "listed with {v} as the {cat} and with {a_num} over {n}",
    ),
)
EITHER: Final = Wordings(
    (
        "whose {cat} is {v} or whose {num} is [below|under|less than] {n}",
        "with {cat} {v} or {a_num} [below|under|less than|lower than] {n}",
        "with {v} as {cat} or {a_num} [below|under] {n}",
        "where the {cat} is {v} or the {num} is [below|under|less than|smaller than] {n}",
        "having {cat} {v} or {a_num} [below|under|smaller than] {n}",
        "for which the {cat} is {v} or the {num} is [less than|below] {n}",
    ),
    (
        "whose {cat} happens to be {v} or whose {num} stays beneath {n}",
        "listed with {v} as the {cat} or with {a_num} under {n}",
    ),
)
ABOVE_AVERAGE: Final = Wordings(
    (
        "whose {num} is [above|over|greater than|higher than|more than] the average",
        "with {a_num} [above|over|greater than|higher than] the average",
        "with an above average {num}",
        "where the {num} is [above|over|larger than] the average {num}",
        "having {a_num} [above|over] the [average|mean]",
        "whose {num} exceeds the [average|mean] {num}",
    ),
    ("whose {num} goes beyond the average", "with {a_num} bigger than the average {num}"),
)
ASCENDING: Final = Wordings(
    (
        "[ordered|sorted] by {num}",
        "[ordered|sorted] by {num} [ascending|in ascending order|from low to high]",
        "in [ascending|increasing] order of {num}",
        "from the lowest to the highest {num}",
        "by increasing {num}",
        "with the [lowest|smallest] {num} first",
        "by {num}, [lowest|smallest] first",
        "starting with the [lowest|smallest] {num}",
        "from the [smallest|lowest] {num} upwards",
    ),
    ("arranged by {num} with the lowest first", "in order of {num}, from the smallest up"),
)
DESCENDING: Final = Wordings(
    (
        "[ordered|sorted] by {num} descending",
        "[ordered|sorted] by {num} [in descending order|from high to low]",
        "in [descending|decreasing] order of {num}",
        "from the highest to the lowest {num}",
        "by decreasing {num}",
        "with the [highest|largest] {num} first",
        "by {num}, [highest|largest] first",
        "starting with the [highest|largest] {num}",
        "from the [largest|highest] {num} downwards",
    ),
    ("arranged by {num} with the highest first", "in order of {num}, from the largest down"),
)
MOST: Final = Wordings(
    (
        "with the [highest|largest|greatest|biggest] {num}",
        "that come first by {num}, highest first",
        "having the [highest|largest] {num}, in descending order",
        "whose {num} is the [highest|largest|greatest]",
        "with the [top|maximum] {num}",
        "leading by {num}",
    ),
    ("holding the highest {num}, largest first", "ranked at the top by {num}, from the highest down"),
)
LARGEST: Final = Wordings(
    (
        "with the [highest|largest|greatest|biggest] {num}",
        "that has the [highest|largest|greatest] {num}",
        "having the [highest|largest|maximum] {num}",
        "whose {num} is the [highest|largest|greatest]",
        "with the maximum {num}",
    ),
    ("holding the highest {num}", "ranked at the top by {num}"),
)
SMALLEST: Final = Wordings(
    (
        "with the [lowest|smallest|least] {num}",
        "that has the [lowest|smallest|least] {num}",
        "having the [lowest|smallest|minimum] {num}",
        "whose {num} is the [lowest|smallest]",
        "with the minimum {num}",
    ),
    ("holding the lowest {num}", "ranked at the bottom by {num}"),
)
OF_A_PARENT: Final = Wordings(
    (
        "whose {parent} has {cat} {v}",
        "whose {parent} has the {cat} {v}",
        "whose {parent}'s {cat} is {v}",
        "with a {parent} whose {cat} is {v}",
        "with a {parent} of {cat} {v}",
        "where the {cat} of the {parent} is {v}",
        "where the {parent}'s {cat} is {v}",
        "having a {parent} with {cat} {v}",
        "for which the {parent} has {cat} {v}",
    ),
    ("whose {parent}'s {cat} happens to be {v}", "listed with a {parent} whose {cat} is {v}"),
)
