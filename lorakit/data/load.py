"""A source -> its examples: the format found or named, every row checked, labels mapped to ids."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

from lorakit.data.config import Columns
from lorakit.data.examples import Dataset, sample
from lorakit.data.faults import Faults, SparedFaults
from lorakit.data.formats import E2E_MARK, FORMATS, ParsedRow, Parsing, canonical_format, detect_format, parser_for
from lorakit.data.glue import GLUE_TASKS, GlueTask, detect_glue, glue_task
from lorakit.data.hub import class_names
from lorakit.data.image_classes import IMAGE_FOLDER, is_class_folder, load_class_folders
from lorakit.data.labels import LabelRow, LabelScheme, find_scheme, label_examples
from lorakit.data.read import TEXT_LINE, Row, first_line
from lorakit.data.source import Source, open_source
from lorakit.data.triples import WEBNLG
from lorakit.data.wikisql import Tables, read_tables
from lorakit.errors import DataError, UsageError

PEEKED = 20
"""How many rows are looked at to find the format; one bad row at the front must not hide it."""
PUBLISHED_BROKEN = ("glue:qqp", "samsum")
"""Sets whose published files hold a few rows without a text: left out and counted (Dataset.skipped), as others do too."""


def load_examples(
    source: str,
    *,
    format: str = "auto",
    split: str = "train",
    columns: Columns | None = None,
    targets: bool = True,
    label_names: Sequence[str] | None = None,
    regression: bool | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads a whole source.

    source: a file, a folder or a hub set `name[:config][@split]`. format: see formats.py. split: train, eval or test;
    chooses the file of a folder or the split of a hub set. columns: what the columns are called.
    targets: False accepts rows without completion or label (prompts to answer).
    label_names, regression: those of the training set, when this is not it; None finds them here, in all rows.
    limit, seed: keep a drawn sample of so many rows (examples.sample); all rows are checked all the same.
    Raises DataError for an empty source, an unknown format and bad rows (up to five in one message); UsageError.
    """
    wanted = canonical_format(format)
    if wanted == IMAGE_FOLDER or (wanted == "auto" and is_class_folder(source)):
        return load_class_folders(source, split=split, label_names=label_names, limit=limit, seed=seed)
    opened = open_source(source, split, tree=wanted.startswith(WEBNLG))
    task = _glue_task(wanted, opened)
    columns = _task_columns(columns or Columns(), task, opened)
    parsed, found, skipped = _parse(opened, wanted, task, columns, targets)
    labelled = [row for row in parsed if isinstance(row, LabelRow)]
    if not labelled:
        texts = [row for row in parsed if not isinstance(row, LabelRow)]
        return Dataset(tuple(sample(texts, limit, seed)), found, opened.name, skipped=skipped)
    if label_names is not None:
        scheme = LabelScheme(list(label_names), regression=False)
    elif regression or (task is not None and task.regression):
        scheme = LabelScheme(None, regression=True)
    else:
        scheme = _found_scheme(labelled, opened, columns.label, targets)
    faults = Faults(opened.name)
    examples = label_examples(labelled, scheme, faults)
    faults.close()
    kept = tuple(sample(examples, limit, seed))
    return Dataset(kept, found, opened.name, scheme.names, scheme.regression, skipped)


def _parse(
    opened: Source, wanted: str, task: GlueTask | None, columns: Columns, targets: bool
) -> tuple[list[ParsedRow], str, int]:
    """All examples of a source, their format's name, and how many broken rows were left out.

    Raises DataError for bad rows (of sets that are not published with some), or none at all.
    """
    name, _, part = wanted.partition(":")
    faults = _faults(f"glue:{task.name}" if task else "", opened)
    rows = opened.rows(_glue_header(task, opened), faults.add)
    peeked = list(islice(rows, PEEKED))
    if not peeked:
        faults.close()
        raise DataError("the data set is empty. Expected at least one row", source=opened.name)
    keys = tuple(dict.fromkeys(key for _, row in peeked for key in row))
    found = "text-label" if task else _format(name, peeked, keys, columns, targets, opened.name)
    tables = _tables(opened) if found == "wikisql" else None
    parse = parser_for(found, Parsing(columns, targets, keys, part or None, tables))
    meant = faults if task else _faults(found, opened)
    parsed: list[ParsedRow] = []
    for line, row in chain(peeked, rows):
        try:
            parsed.extend(parse(row, line))
        except DataError as error:
            meant.add(error)
    skipped = 0
    for gathered in (faults, meant):
        skipped = gathered.settle(len(parsed))
    if not parsed:
        reason = f"no row of it is {part}" if part else "no row of it has a text"
        raise DataError(f"{reason}. Expected at least one example", source=opened.name)
    return parsed, f"glue:{task.name}" if task else f"{found}:{part}" if part else found, skipped


def _faults(name: str, opened: Source) -> Faults:
    return SparedFaults(opened.name) if name in PUBLISHED_BROKEN else Faults(opened.name)


def _tables(opened: Source) -> Tables | None:
    return None if opened.path is None else read_tables(opened.path)


def _task_columns(columns: Columns, task: GlueTask | None, opened: Source) -> Columns:
    if task is None or opened.path is None:  # hub sets of GLUE have names of their own, which text-label knows
        return columns
    return replace(columns, text=task.text, pair=task.pair, label=task.label)


def _glue_task(wanted: str, opened: Source) -> GlueTask | None:
    if wanted.startswith("glue:"):
        task = glue_task(wanted.removeprefix("glue:"))
        if task is None:
            raise UsageError(f"data.format: expected glue: and one of {', '.join(GLUE_TASKS)}; came {wanted!r}")
        return task
    if wanted not in ("auto", "glue"):
        return None
    is_tsv = opened.path is not None and opened.path.suffix.lower() == ".tsv"
    task = detect_glue(first_line(opened.path).split("\t")) if is_tsv and opened.path is not None else None
    if task is None and wanted == "glue":
        raise DataError(
            "this is no GLUE file that can be told by its header. Name the task: glue:rte", source=opened.name
        )
    return task


def _glue_header(task: GlueTask | None, opened: Source) -> tuple[str, ...] | None:
    """The column names to read the file with; CoLA's test file has a header although its other files have none."""
    if task is None or task.header is None or opened.path is None:
        return None
    return None if task.text in first_line(opened.path).split("\t") else task.header


def _format(
    wanted: str, peeked: Sequence[tuple[int, Row]], keys: tuple[str, ...], columns: Columns, targets: bool, source: str
) -> str:
    if wanted != "auto":
        return wanted
    is_text = keys == (TEXT_LINE,)
    if is_text and any(E2E_MARK in row[TEXT_LINE] for _, row in peeked):
        return "e2e"
    if is_text and not targets:
        return "prompts"
    found = None if is_text else detect_format(keys, columns, targets=targets)
    if found is None and not is_text:
        # Where only the targets' column is absent, the format is clear and each row can say what it lacks.
        found = detect_format(keys, columns, targets=False)
        found = "prompt-completion" if found == "prompts" else found
    if found is None:
        came = "lines of text without ||" if is_text else f"rows with {', '.join(keys) or 'no columns'}"
        raise DataError(
            f"the format cannot be told: expected the columns of one of {', '.join(FORMATS)}; came {came}. "
            "Set data.format, and data.columns where yours are called otherwise",
            source=source,
            line=peeked[0][0],
        )
    return found


def _found_scheme(rows: Sequence[LabelRow], opened: Source, column: str, targets: bool) -> LabelScheme:
    names = None if opened.features is None else class_names(opened.features, column)
    scheme = find_scheme(rows) if names is None else LabelScheme(names, regression=False)
    if targets and scheme.names is not None and len(scheme.names) < 2:
        raise DataError(
            f"every row has the label {scheme.names[0]!r}; at least two are needed to tell apart. "
            "If this is a test set, give the training set's label names",
            source=opened.name,
        )
    return scheme
