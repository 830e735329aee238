"""Labels as written -> class ids or scores, with the training set's names for the classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.data.examples import LabelExample
from lorakit.data.faults import Faults
from lorakit.errors import DataError

UNLABELLED = -1
"""What hub sets write for a class that is kept secret."""


@dataclass(frozen=True, slots=True)
class LabelRow:
    """A `LabelExample` whose label still is what the file says, None where it says nothing. `field`: its column."""

    text: str
    pair: str | None
    label: str | int | float | None
    line: int
    field: str


@dataclass(frozen=True, slots=True)
class LabelScheme:
    """How labels are read: the class names in order of their ids, or scores (then `names` is None)."""

    names: list[str] | None
    regression: bool


def find_scheme(rows: Sequence[LabelRow]) -> LabelScheme:
    """The scheme of a training set. Any label that is no whole number among numbers makes it scores; whole numbers are
    classes in numeric order; everything else is classes in the order of their sorted names.
    """
    labels = [row.label for row in rows if row.label is not None]
    numbers = [_number(label) for label in labels]
    if labels and all(number is not None for number in numbers):
        values = {number for number in numbers if number is not None}
        if any(value != int(value) for value in values):
            return LabelScheme(None, regression=True)
        names = [str(int(value)) for value in sorted(values)]
    else:
        names = sorted({_name(label) for label in labels})
    return LabelScheme(names or None, regression=False)


def label_examples(rows: Sequence[LabelRow], scheme: LabelScheme, faults: Faults) -> list[LabelExample]:
    """The rows with ids or scores for labels. A label that the scheme does not have goes to `faults`."""
    index = {name: number for number, name in enumerate(scheme.names or [])}
    examples = []
    for row in rows:
        try:
            label = None if row.label is None else _value(row.label, scheme, index)
        except DataError as error:
            faults.add(DataError(str(error), line=row.line, field=row.field))
            continue
        examples.append(LabelExample(row.text, row.pair, label, row.line))
    return examples


def _value(label: str | int | float, scheme: LabelScheme, index: dict[str, int]) -> int | float:
    number = _number(label)
    if scheme.regression:
        if number is None:
            raise DataError(f"label out of range: expected a finite number, came {label!r}")
        return number
    name = _name(label)
    if name in index:
        return index[name]
    # A set whose names are known (hub sets) may hold ids; where the names are numbers themselves that would be a guess.
    names_are_words = not any(_number(known) is not None for known in index)
    if isinstance(label, int) and not isinstance(label, bool) and names_are_words and 0 <= label < len(index):
        return label
    known = ", ".join(list(index)[:10]) + (", ..." if len(index) > 10 else "")
    raise DataError(
        f"label out of range: expected one of the {len(index)} labels of the training set ({known}), came {label!r}"
    )


def _number(label: str | int | float) -> float | None:
    """The label as a finite number, None if it is not one."""
    if isinstance(label, bool):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _name(label: str | int | float) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    number = _number(label)
    return str(int(number)) if number is not None and number == int(number) else str(label)
