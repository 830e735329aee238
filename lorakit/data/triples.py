"""Triples to texts: WebNLG (Gardent et al. 2017) and DART (Nan et al. 2021), as their files come.

Triples are written `subject : property : object | ...`, as the paper's repository does (examples/NLG of loralib); of DART
with properties in lower case. A text a row: those of the same triples are gathered for evaluation (group_references).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lorakit.data.examples import PromptExample
from lorakit.errors import DataError

WEBNLG = "webnlg"
WEBNLG_PARTS = ("webnlg:seen", "webnlg:unseen")
WEBNLG_KEYS = {"modifiedtripleset", "lexicalisations"}
DART_KEYS = {"tripleset", "annotations"}
SEEN = frozenset(
    ("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food")
    + ("Monument", "SportsTeam", "University", "WrittenWork")
)
"""The categories of the 2017 challenge's training set; its test set has five more."""
SEPARATOR = "\n"
"""A prompt is the triples and this, so that the completion begins a line of its own."""
_TRIPLE = ("subject", "property", "object")


def webnlg_examples(row: dict[str, Any], line: int, *, targets: bool, part: str | None) -> list[PromptExample]:
    """The examples of an entry, or of a whole file {"entries": [{"1": entry}, ..]} (`line` then counts entries).

    part: "seen" or "unseen" keeps the entries of those categories. Only texts that annotators called good are read (a
    release without comments has good ones alone), and only English ones. Raises DataError.
    """
    entries = row.get("entries")
    if entries is None:
        return _entry(row, line, targets, part)
    if not isinstance(entries, list):
        raise DataError(f"expected a list, came {type(entries).__name__}", line=line, field="entries")
    found = []
    for number, one in enumerate(entries, start=1):
        inner = next(iter(one.values())) if isinstance(one, dict) and len(one) == 1 else one
        if not isinstance(inner, dict):
            raise DataError(f"expected an entry, an object, came {type(inner).__name__}", line=number, field="entries")
        found += _entry(inner, number, targets, part)
    return found


def _entry(entry: dict[str, Any], line: int, targets: bool, part: str | None) -> list[PromptExample]:
    category = entry.get("category")
    if part is not None:
        if not isinstance(category, str):
            raise DataError("it is missing, and seen and unseen are told by it", line=line, field="category")
        if (category in SEEN) != (part == "seen"):
            return []
    triples = entry.get("modifiedtripleset")
    if not isinstance(triples, list) or not triples or not all(isinstance(one, dict) for one in triples):
        raise DataError("expected a list of triples", line=line, field="modifiedtripleset")
    parts = [[one.get(name) for name in _TRIPLE] for one in triples]
    texts = entry.get("lexicalisations") or []
    if not isinstance(texts, list) or not all(isinstance(one, dict) for one in texts):
        raise DataError("expected a list of texts with comments", line=line, field="lexicalisations")
    good = [one for one in texts if one.get("comment") in ("good", "", None) and one.get("lang") in ("en", "", None)]
    return _examples(parts, [one.get("lex") for one in good], line, targets, "lexicalisations")


def dart_examples(row: dict[str, Any], line: int, *, targets: bool) -> list[PromptExample]:
    """The examples of one entry of DART: a text each. Raises DataError."""
    triples, texts = row.get("tripleset"), row.get("annotations") or []
    if not isinstance(triples, list) or not triples or not all(isinstance(one, list) for one in triples):
        raise DataError("expected a list of [subject, property, object]", line=line, field="tripleset")
    if not isinstance(texts, list) or not all(isinstance(one, dict) for one in texts):
        raise DataError("expected a list of texts with sources", line=line, field="annotations")
    lowered = [
        [*one[:1], *(part.lower() if isinstance(part, str) else part for part in one[1:2]), *one[2:]] for one in triples
    ]
    return _examples(lowered, [one.get("text") for one in texts], line, targets, "annotations")


def _examples(
    triples: Sequence[Sequence[Any]], texts: Sequence[Any], line: int, targets: bool, field: str
) -> list[PromptExample]:
    for one in triples:
        if len(one) != 3 or not all(isinstance(part, str) and part.strip() for part in one):
            raise DataError(f"expected a triple of three texts, came {list(one)!r}", line=line)
    prompt = " | ".join(" : ".join(part.strip() for part in one) for one in triples) + SEPARATOR
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"expected text, came {text!r}", line=line, field=field)
    if texts:
        return [PromptExample(prompt, text.strip(), (text.strip(),), line) for text in texts]
    # An entry none of whose texts is good teaches nothing, and is no fault of the file: loralib drops it as well.
    return [] if targets else [PromptExample(prompt, None, (), line)]


def xml_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(number of the entry from 1, entry as in the challenge's JSON)` of a WebNLG .xml file. Raises DataError."""
    try:
        root = ElementTree.parse(path).getroot()  # expat bounds what entities grow to, and fetches nothing
    except ElementTree.ParseError as error:
        raise DataError(f"it is not XML: {error}", line=error.position[0]) from error
    number = 0
    for number, entry in enumerate(root.iter("entry"), start=1):
        triples = []
        for triple in entry.findall("./modifiedtripleset/mtriple"):
            parts = [part.strip() for part in (triple.text or "").split(" | ")]
            if len(parts) != 3:
                raise DataError(f"expected `subject | property | object`, came {triple.text!r}", line=number)
            triples.append(dict(zip(_TRIPLE, parts, strict=True)))
        texts = [
            {"comment": lex.get("comment"), "lang": lex.get("lang"), "lex": lex.findtext("text") or lex.text}
            for lex in entry.findall("lex")
        ]
        yield number, {"category": entry.get("category"), "modifiedtripleset": triples, "lexicalisations": texts}
    if not number:
        raise DataError(f"expected <entry> elements as WebNLG has them, came a <{root.tag}> without any")
