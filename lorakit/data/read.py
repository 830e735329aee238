"""Rows of a file with the line each one begins at, streamed: JSONL, JSON, CSV, TSV, Parquet, plain text, WebNLG's XML.

The standard library reads the text formats, since `datasets` does not say which line of a file a row stood in; Parquet
has no lines, so its rows are numbered from 1.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.faults import OnFault, raise_at_once, with_source
from lorakit.data.triples import xml_rows
from lorakit.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".xml")
_BLANKS = re.compile(r"[ \t\r\n]*")
TEXT_LINE = "line"
"""The one key of a row of a .txt file: the line's text without its end."""


def read_rows(
    path: Path, *, header: Sequence[str] | None = None, on_fault: OnFault = raise_at_once
) -> Iterator[tuple[int, Row]]:
    """Yields `(line, row)` for each row of a file; the suffix says how it is read.

    Blank lines are skipped, a byte-order mark is dropped, text is UTF-8. CSV follows RFC 4180 (quoted fields may span
    lines: a row's line is its first). TSV knows no quotes, as GLUE's files need it: a quote is a character like others.

    path: the file. header: column names of a .tsv file that begins with data instead of a line of names.
    on_fault: gets the error of a bad row (line set, no source); reading goes on behind it where the format allows.
    Raises DataError for a file that is missing, unreadable or of an unknown kind.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError("there is no such file. Check the path; it is taken from the current folder", source=str(path))
    if suffix not in SUFFIXES:
        raise DataError(
            f"expected a file ending in {', '.join(SUFFIXES)}, came {suffix or 'no ending'}", source=str(path)
        )
    try:
        match suffix:
            case ".jsonl":
                yield from _jsonl(path, on_fault)
            case ".json":
                yield from _json(path, on_fault)
            case ".csv":
                yield from _csv(path, on_fault)
            case ".tsv":
                yield from _tsv(path, header, on_fault)
            case ".parquet":
                yield from _parquet(path)
            case ".xml":
                yield from xml_rows(path)
            case _:
                yield from ((line, {TEXT_LINE: text}) for line, text in _filled_lines(path, on_fault))
    except DataError as error:
        raise with_source(error, str(path)) from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", source=str(path)) from error


def first_line(path: Path) -> str:
    """The first filled line of a text file, "" where there is none that can be read (`read_rows` says why)."""
    try:
        return next((text for _, text in _filled_lines(path, lambda error: None)), "")
    except OSError:
        return ""


def _lines(path: Path, on_fault: OnFault) -> Iterator[tuple[int, str]]:
    """`(line, text)` with line ends kept; only "\\n" ends a line, as editors count (str.splitlines splits at more)."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                on_fault(DataError(f"it is not UTF-8 text ({error.reason}). Save the file as UTF-8", line=line))


def _filled_lines(path: Path, on_fault: OnFault) -> Iterator[tuple[int, str]]:
    for line, text in _lines(path, on_fault):
        text = text.rstrip("\r\n")
        if text.strip():
            yield line, text


def _jsonl(path: Path, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    for line, text in _filled_lines(path, on_fault):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            on_fault(DataError(f"it is not JSON: {error}. A .jsonl file holds one JSON object a line", line=line))
            continue
        yield from _object(value, line, on_fault)


def _object(value: object, line: int, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    if isinstance(value, dict):
        yield line, value
    else:
        on_fault(DataError(f"expected a JSON object like {{...}}, came {type(value).__name__}", line=line))


def _json(path: Path, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    """A list of objects, or objects one after the other; read value by value, so that each one's line is known."""
    text = "".join(part for _, part in _lines(path, raise_at_once))
    decoder, position, line, counted = json.JSONDecoder(), _skip_blanks(text, 0), 1, 0
    in_list = text.startswith("[", position)
    position = _skip_blanks(text, position + 1) if in_list else position
    while position < len(text) and not (in_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            on_fault(DataError(f"it is not JSON: {error}", line=line))
            return
        yield from _object(value, line, on_fault)
        position = _skip_blanks(text, position)
        if in_list and text.startswith(",", position):
            position = _skip_blanks(text, position + 1)
        elif in_list and not text.startswith("]", position):
            break
    if in_list and text[position:].rstrip() != "]":
        line += text.count("\n", counted, position)
        on_fault(DataError("expected a comma or the list's end here: the file is cut off or damaged", line=line))


def _skip_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    return found.end() if found else position


def _csv(path: Path, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    reader = csv.reader((text for _, text in _lines(path, raise_at_once)), strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            on_fault(
                DataError(f"it is not CSV: {error}. Quote fields that hold quotes, commas or line ends", line=line)
            )
            continue
        if not fields:
            continue
        if names is None:
            names = _checked_header(fields, line)
        else:
            yield from _table_row(names, fields, line, on_fault)


def _tsv(path: Path, header: Sequence[str] | None, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    names = None if header is None else list(header)
    for line, text in _filled_lines(path, on_fault):
        fields = text.split("\t")
        if names is None:
            names = _checked_header(fields, line)
        else:
            yield from _table_row(names, fields, line, on_fault)


def _checked_header(fields: list[str], line: int) -> list[str]:
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the header names {', '.join(map(repr, twice))} more than once. Rename the columns", line=line)
    return names


def _table_row(names: list[str], fields: list[str], line: int, on_fault: OnFault) -> Iterator[tuple[int, Row]]:
    if len(fields) == len(names):
        yield line, dict(zip(names, fields, strict=True))
    else:
        columns = f"{len(names)} columns ({', '.join(names)})"
        on_fault(
            DataError(f"expected {columns}, came {len(fields)}. Look for a missing or unquoted separator", line=line)
        )


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"it is no readable Parquet file: {error}", line=line + 1) from error
