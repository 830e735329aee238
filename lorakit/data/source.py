"""From what a recipe says (a file, a folder, a hub set) to rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.data import hub
from lorakit.data.faults import OnFault
from lorakit.data.read import SUFFIXES, Row, read_rows
from lorakit.errors import DataError

PATH_MARKS = ("/", ".", "~")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source. `name`: for messages. `path`: the file, if it is one. `features`: its types, if it has them.

    `rows(header, on_fault)` yields `(line, row)`; see `read.read_rows` for both.
    """

    name: str
    path: Path | None
    features: dict[str, Any] | None
    rows: Callable[[tuple[str, ...] | None, OnFault], Iterator[tuple[int, Row]]]


def open_source(source: str, role: str = "train", *, tree: bool = False) -> Source:
    """Opens a file, a folder (its file for `role`), a folder of `save_to_disk`, or a hub set.

    role: train, eval or test; chooses among the files of a folder and the splits of a set. GLUE's MNLI has two files for
    each of eval and test, dev_matched.tsv and dev_mismatched.tsv: both are read, one behind the other.
    tree: a folder is all of the .xml files below it, or below its subfolder for `role` (WebNLG's releases).
    Raises DataError where there is no such thing.
    """
    if role not in hub.SPLIT_NAMES:
        raise DataError(f"expected one of {', '.join(hub.SPLIT_NAMES)}, came {role!r}", source=source, field="split")
    path = Path(source).expanduser()
    if path.is_dir() and (several := _several(path, role, tree)):
        return _files(path, several)
    if path.is_dir():
        return _set(source, hub.load_saved(path, role)) if hub.is_saved_folder(path) else _file(_choose(path, role))
    if path.exists() or path.suffix.lower() in SUFFIXES or source.startswith(PATH_MARKS) or not hub.is_hub_id(source):
        return _file(path)
    return _set(source, hub.load_hub(source, role))


def _file(path: Path) -> Source:
    features = _parquet_features(path) if path.suffix.lower() == ".parquet" and path.is_file() else None
    return Source(str(path), path, features, lambda header, on_fault: read_rows(path, header=header, on_fault=on_fault))


def _is_data(file: Path) -> bool:
    """Whether a file of a folder can be the data; WikiSQL's tables are read beside the questions."""
    return file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.endswith("tables.jsonl")


def _several(folder: Path, role: str, tree: bool) -> list[Path]:
    """The files of `folder` that are one data set together; none where it is not of such a kind."""
    if tree:
        inner = next((folder / name for name in hub.SPLIT_NAMES[role] if (folder / name).is_dir()), folder)
        return sorted(inner.rglob("*.xml"))
    for name in hub.SPLIT_NAMES[role]:
        pair = [folder / f"{name}_{part}.tsv" for part in ("matched", "mismatched")]
        if all(file.is_file() for file in pair):
            return pair
    return []


def _files(folder: Path, paths: Sequence[Path]) -> Source:
    """Several files as one source; `path` is the first, whose suffix and header are those of all."""

    def rows(header: tuple[str, ...] | None, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
        for path in paths:
            yield from read_rows(path, header=header, on_fault=partial(_named, on_fault, path.relative_to(folder)))

    return Source(str(folder), paths[0], None, rows)


def _named(on_fault: OnFault, path: Path, error: DataError) -> None:
    """A fault in one of several files: the source is the folder, so the file stands in the message."""
    on_fault(DataError(f"{path}: {error}"))


def _set(name: str, loaded: Any) -> Source:
    return Source(name, None, dict(loaded.features), lambda header, on_fault: hub.numbered(loaded))


def _parquet_features(path: Path) -> dict[str, Any] | None:
    """What `datasets` wrote about the columns into the file's schema."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return dict(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path)))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"it is no readable Parquet file: {error}", source=str(path)) from error


def _choose(folder: Path, role: str) -> Path:
    """The file of `folder` for `role`: train.jsonl, dev.tsv, test-00000-of-00001.parquet; or its only data file."""
    files = sorted(file for file in folder.iterdir() if _is_data(file))
    for name in hub.SPLIT_NAMES[role]:
        found = [file for file in files if file.stem == name or file.name.startswith((f"{name}-", f"{name}."))]
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise DataError(f"several files could be the {role} data: {listed}. Name one of them", source=str(folder))
        if found:
            return found[0]
    if len(files) == 1 and role == "train":
        return files[0]
    listed = ", ".join(file.name for file in files) or f"no file ending in {', '.join(SUFFIXES)}"
    names = ", ".join(hub.SPLIT_NAMES[role])
    raise DataError(
        f"expected a file for the {role} data (its name begins with {names}), came {listed}. Name the file itself",
        source=str(folder),
    )
