"""Whether a run may go on: the same recipe, the same rows."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.data import Encoded, ImageExample
from lorakit.errors import RecipeError, UsageError
from lorakit.run.folder import RunFolder
from lorakit.run.recipe import Recipe, load_recipe, to_mapping

FREE = (
    "output",
    "data.test",
    "generate.",
    "evaluate.",
    "train.epochs",
    "train.max_steps",
    "train.save_every",
    "train.log_every",
)
"""Keys that may change when a run goes on: they do not reach into the steps that are done (a prefix ends in a dot)."""


def check_same(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UsageError where there is nothing to go on from, RecipeError where the run was begun by another recipe."""
    if not folder.has_checkpoint():
        raise UsageError(f"{folder.path} has no checkpoint to go on from. Start the run without --resume.")
    begun, wanted = (dict(_flat(to_mapping(one))) for one in (load_recipe(folder.recipe), recipe))
    faults = [
        f"{key}: {begun.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*begun, *wanted})
        if begun.get(key) != wanted.get(key) and not any(key == one or key.startswith(one) for one in FREE)
    ]
    if faults:
        raise RecipeError(
            f"the run in {folder.path} was begun by another recipe:\n"
            + "".join(f"  - {fault}\n" for fault in faults)
            + "Go on with the same, or start anew (--overwrite, or another output)."
        )


def _flat(document: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def fingerprint(rows: Sequence[Encoded | ImageExample]) -> str:
    """A hash of encoded rows: other data, another order, another tokenizer give another.

    Of images: their names, sizes in bytes and labels; reading them all would take as long as an epoch.
    """
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(_identity(row)).encode())
    return whole.hexdigest()


def _identity(row: Encoded | ImageExample) -> list[Any]:
    if isinstance(row, ImageExample):
        path = Path(row.path)
        return [path.parent.name, path.name, path.stat().st_size, row.label]
    return [row.input_ids, row.labels]
