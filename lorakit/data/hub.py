"""Data sets that `datasets` reads: hub sets, and folders that its `save_to_disk` wrote."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("eval", "validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""What data sets call the split of each role, the commonest first (after our own name for it)."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form `name[:config][@split]` of a hub set (it need not exist)."""
    return _HUB_ID.fullmatch(source) is not None


def load_hub(source: str, role: str) -> Any:
    """The `datasets.Dataset` of a hub set, for `role` train, eval or test (an `@split` in `source` goes first).

    Downloaded once, then taken from the cache of `datasets`, offline too. Raises DataError with the hub's own words
    where it does not answer, does not know the set, or the set has no such split or configuration.
    """
    parts = _HUB_ID.fullmatch(source)
    if parts is None:
        raise DataError("expected a hub set like owner/name, owner/name:config or owner/name@split", source=source)
    import datasets

    try:
        loaded = datasets.load_dataset(parts["name"], parts["config"])
    except Exception as error:  # a foreign loader: network, files, the hub's answers; all are the user's to read
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"there is no such file or folder here, and the hub set could not be loaded: {reason}. Check the name, the "
            "connection and HF_HUB_OFFLINE, or download the set and give its path",
            source=source,
        ) from error
    return _split(loaded, parts["split"], role, source)


def is_saved_folder(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path, role: str) -> Any:
    """The `datasets.Dataset` that `save_to_disk` wrote, of several splits the one for `role`. Raises DataError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(f"the saved data set cannot be read: {error}", source=str(folder)) from error
    return loaded if isinstance(loaded, datasets.Dataset) else _split(loaded, None, role, str(folder))


def _split(loaded: Mapping[str, Any], wanted: str | None, role: str, source: str) -> Any:
    for name in (wanted,) if wanted else SPLIT_NAMES[role]:
        if name in loaded:
            return loaded[name]
    raise DataError(
        f"expected a split {wanted or ' or '.join(SPLIT_NAMES[role])}, came {', '.join(loaded)}. "
        "Name the one you mean: name@split",
        source=source,
    )


def numbered(loaded: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(row number from 1, row)` for each row of a `datasets.Dataset`."""
    yield from enumerate(loaded, start=1)


def class_names(features: Mapping[str, Any] | None, column: str) -> list[str] | None:
    """The names that the set's own `ClassLabel` gives to the ids of `column`, None if it has none."""
    import datasets

    feature = (features or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
