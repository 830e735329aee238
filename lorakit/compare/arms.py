"""The methods of a comparison, each at each of its sizes: an arm of the study."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.compare.defaults import SWEEP, SWEEPS, rates_around
from lorakit.errors import RecipeError

OWN = ("label", "sizes", "lr", "lrs", "combine")
"""Keys of an entry that are the comparison's; the others are the method's."""


@dataclass(frozen=True)
class Arm:
    """A method at one size.

    label: of its row; family: of its entry, whose sizes a line joins; size: what tells it from its family ("r=8"), None
    where the family has one member. swept: the first swept field and its value. document: the recipe's `method`.
    rates: learning rates to choose from, one where it is fixed.
    """

    label: str
    family: str
    size: str | None
    swept: tuple[str, float] | None
    document: Any
    rates: tuple[float, ...]

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.") or "method"


def arms_of(entries: Sequence[Any]) -> list[Arm]:
    """Every arm that the entries of compare.methods name. Raises RecipeError that lists every fault."""
    arms: list[Arm] = []
    faults: list[str] = []
    for at, entry in enumerate(entries):
        try:
            arms += _arms(entry)
        except RecipeError as error:
            faults.append(f"compare.methods[{at}]: {error}")
    for what in ("label", "folder"):
        seen: set[str] = set()
        for name in (getattr(arm, what) for arm in arms):
            if name in seen:
                faults.append(f"two methods are called {name!r}: give each a `label` of its own")
            seen.add(name)
        if faults:
            break
    if faults:
        raise RecipeError("the comparison has faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return arms


def _arms(entry: Any) -> list[Arm]:
    given: dict[str, Any] = {"name": entry} if isinstance(entry, str) else _mapping(entry)
    document = _document(given)
    parts = document if isinstance(document, list) else [document]
    names = [str(part["name"]) for part in parts]
    table = _table(given.get("sizes", {}), names)
    family = str(given.get("label") or " + ".join(names))
    rates = _rates(given, rates_around(names))
    arms = []
    for chosen in table:
        sized = copy.deepcopy(document)
        for key, value in chosen.items():
            _put(sized, key, value)
        size = ", ".join(f"{key.rpartition('.')[2]}={_short(chosen[key])}" for key in _telling(table)) or None
        numbers = [
            (key, float(v)) for key, v in chosen.items() if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        alone = len(table) == 1
        label = family if size is None or (alone and "label" in given) else f"{family} {size}"
        swept = None if alone or not numbers else numbers[0]
        arms.append(Arm(label, family, None if alone else size, swept, sized, rates))
    return arms


def _mapping(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or ("name" in entry) == ("combine" in entry):
        raise RecipeError(f"expected a method's name, or keys with either `name` or `combine`, got {entry!r}")
    return dict(entry)


def _document(given: Mapping[str, Any]) -> Any:
    """The `method` of a recipe: a mapping, or for a combination a list of them."""
    rest = {key: value for key, value in given.items() if key not in OWN}
    if "combine" not in given:
        return rest
    if rest:
        raise RecipeError(f"{', '.join(rest)}: a combination's fields stand with its methods")
    parts = given["combine"]
    if not isinstance(parts, list) or len(parts) < 2:
        raise RecipeError(f"combine: expected a list of at least two methods, got {parts!r}")
    return [{"name": part} if isinstance(part, str) else _mapping(part) for part in parts]


def _table(sizes: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """A mapping a size; several fields change together."""
    if sizes == SWEEP:
        if len(names) > 1 or names[0] not in SWEEPS:
            raise RecipeError(f"sizes: there is no sweep of {' + '.join(names)} to choose by itself. Name the sizes")
        sizes = SWEEPS[names[0]]
    if not isinstance(sizes, Mapping) or any(not isinstance(one, list | tuple) or not one for one in sizes.values()):
        raise RecipeError(f"sizes: expected fields with lists of values such as {{r: [2, 8]}}, got {sizes!r}")
    counts = {len(values) for values in sizes.values()}
    if len(counts) > 1:
        raise RecipeError(f"sizes: fields that change together need lists of one length, got {dict(sizes)!r}")
    return [dict(zip(sizes, values, strict=True)) for values in zip(*sizes.values(), strict=True)] or [{}]


def _telling(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that tell the sizes apart: the first, where its values differ, else all."""
    first = next(iter(table[0]), None)
    alone = first is not None and len({str(one[first]) for one in table}) == len(table)
    return [first] if alone and first is not None else list(table[0])


def _put(document: Any, key: str, value: Any) -> None:
    """Set a field; of a combination by the method's name: `lora.r`."""
    if not isinstance(document, list):
        document[key] = value
        return
    name, _, field = key.partition(".")
    place = next((part for part in document if part["name"] == name), None)
    if place is None or not field:
        names = ", ".join(str(part["name"]) for part in document)
        raise RecipeError(f"sizes: of a combination a size is METHOD.FIELD with a method of {names}, got {key!r}")
    place[field] = value


def _rates(given: Mapping[str, Any], known: Sequence[float]) -> tuple[float, ...]:
    if "lr" in given and "lrs" in given:
        raise RecipeError("lr fixes the learning rate, lrs has it searched: leave one out")
    values = [given["lr"]] if "lr" in given else given.get("lrs", list(known))
    if isinstance(values, str) or any(isinstance(value, bool) for value in values):
        raise RecipeError(f"lr, lrs: expected numbers above 0, got {values!r}")
    try:
        rates = sorted({float(value) for value in values})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lr, lrs: expected numbers above 0, got {values!r}") from error
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise RecipeError(f"lr, lrs: expected numbers above 0, got {values!r}")
    return tuple(rates)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_short(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
