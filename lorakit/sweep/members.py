"""The members of a sweep: every combination of the values that are varied, each a recipe and a folder."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UsageError
from lorakit.run.document import read_yaml
from lorakit.run.folder import RunFolder
from lorakit.run.recipe import Recipe, load_recipe, to_mapping
from lorakit.run.stamp import sources_of, stamp
from lorakit.store.files import write_json

SEED = "train.seed"
SOURCES = "sources.json"
"""In a member's folder: the stamp of what it was trained on."""
LONGEST = 60  # characters of a folder's name


@dataclass(frozen=True)
class Plan:
    """One member: what it changes (key -> value), its name and its whole recipe, whose output is its folder."""

    changes: Mapping[str, Any]
    name: str
    recipe: Recipe = field(repr=False)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.output)

    def done(self) -> bool:
        """Whether its folder holds this very run of the same data, finished. Raises FileError, RecipeError where its files are
        damaged."""
        folder = self.folder
        if not (folder.recipe.is_file() and folder.summary.is_file()):
            return False
        folder.read_summary()
        same = to_mapping(load_recipe(folder.recipe)) == to_mapping(self.recipe)
        return same and self._known_sources() == stamp(sources_of(self.recipe))

    def mark(self, sources: Sequence[str]) -> None:
        """Say what the finished run was of: the stamp that was taken before it was read."""
        write_json(self.folder.path / SOURCES, list(sources))

    def _known_sources(self) -> Any:
        try:
            return json.loads((self.folder.path / SOURCES).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never marked, or damaged: it is made again
            return None


def parse_vary(items: Sequence[str]) -> dict[str, list[Any]]:
    """{"method.r": [1, 2]} from ["method.r=1,2"]. Values are YAML, so that a list of targets is [q_proj, v_proj]."""
    found: dict[str, list[Any]] = {}
    for item in items:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign or not key or not text.strip():
            raise UsageError(f"expected KEY=VALUE,VALUE such as method.r=1,2,4, got {item!r}.")
        if key in found:
            raise UsageError(f"{key} is varied twice. Name all its values in one.")
        found[key] = read_yaml(f"[{text}]", item)
    return found


def plan_members(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    vary: Mapping[str, Sequence[Any]],
    variants: Sequence[Mapping[str, Any]],
    seeds: Sequence[int] | None,
    output: str | Path | None,
    overrides: Sequence[str],
) -> tuple[Path, list[Plan]]:
    """(the sweep's folder, its members in order: seeds run fastest). Raises UsageError, RecipeError."""
    base = load_recipe(recipe, overrides)
    root = Path(base.output if output is None else output).expanduser()
    document = to_mapping(base)
    plans = []
    for changes in _combinations(vary, variants, seeds):
        name = name_of(changes)
        try:
            own = load_recipe({**_changed(document, changes), "output": str(root / name)})
        except LorakitError as error:
            raise type(error)(f"{name}: {error}") from error
        plans.append(Plan(changes, name, own))
    repeated = {one.name for one in plans if sum(one.name == other.name for other in plans) > 1}
    if repeated:
        raise UsageError(f"two members of the sweep are the same: {', '.join(sorted(repeated))}. Name each value once.")
    return root, plans


def _combinations(
    vary: Mapping[str, Sequence[Any]], variants: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    axes = dict(vary)
    if seeds is not None:
        if SEED in axes:
            raise UsageError(f"seeds and {SEED} are the same. Say one of them.")
        axes[SEED] = list(seeds)
    for key, values in axes.items():
        if key == "output":
            raise UsageError("output cannot be varied: each member has a folder of its own in the sweep's.")
        if any(key in one for one in variants):
            raise UsageError(f"{key} is varied, and the variants set it too. Leave it out of one of the two.")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UsageError(f"{key}: expected a list of values to try, got {values!r}.")
    for variant in variants or ({},):
        for values in itertools.product(*axes.values()):
            yield {**variant, **dict(zip(axes, values, strict=True))}


def _changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    whole = copy.deepcopy(dict(document))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UsageError(f"{key}: {section!r} has no keys below it.")
        place[last] = copy.deepcopy(value)
    return whole


def name_of(changes: Mapping[str, Any]) -> str:
    """A member's name, from what it changes alone: the same again when the sweep is widened. "r-4_lr-1e-4_seed-0"."""
    parts = [f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in changes.items()]
    whole = "_".join(parts)
    plain = re.sub(r"[^\w.+=-]+", "-", whole).strip("-.") or "only"
    scalars = all(isinstance(value, int | float | str | None) for value in changes.values())
    if (plain == whole and len(plain) <= LONGEST and scalars) or not changes:
        return plain
    mark = hashlib.sha256(repr(sorted((key, repr(value)) for key, value in changes.items())).encode()).hexdigest()[:8]
    return f"{plain[:LONGEST]}-{mark}"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{key}-{_word(one)}" for key, one in value.items())
    return "-".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
