"""Formats: how a row becomes an example, and how a format is told from a row's columns.

prompt-completion   {"prompt": .., "completion": ..}, optionally "references": [..]
messages            {"messages": [{"role": .., "content": ..}, ..]} or ShareGPT's {"conversations": [{"from", "value"}]}
alpaca              {"instruction": .., "input": .., "output": ..}, input may be empty or missing
text-label          {"text": .., "label": ..}, pairs as {"sentence1": .., "sentence2": .., "label": ..}
e2e                 lines `mr||reference`, or columns mr and ref
webnlg              triples with texts: the challenge's .xml (a file, or a folder of them) or .json (triples.py);
                    webnlg:seen and webnlg:unseen keep the categories that the training set has, or has not
dart                triples with texts: DART's .json (triples.py)
wikisql             questions with logical forms, and the tables' headers beside them (wikisql.py)
samsum              {"dialogue": .., "summary": ..}
squad               questions on contexts: SQuAD's .json, v1.1 or v2, or rows as hub sets have them (squad.py)
glue:<task>         the TSV files of GLUE (glue.py); `glue` alone tells the task from the file
prompts             prompts to answer, without completions: one a line of a .txt file, or {"prompt": ..}
imagefolder         a folder of images with a subfolder a class (image_classes.py)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.config import Columns
from lorakit.data.examples import ChatExample, Message, PromptExample, QuestionExample
from lorakit.data.labels import UNLABELLED, LabelRow
from lorakit.data.read import TEXT_LINE, Row
from lorakit.data.squad import question_examples
from lorakit.data.triples import DART_KEYS, WEBNLG, WEBNLG_KEYS, WEBNLG_PARTS, dart_examples, webnlg_examples
from lorakit.data.wikisql import WIKISQL_KEYS, Tables, wikisql_example
from lorakit.errors import DataError, UsageError

FORMATS = (
    "prompt-completion",
    "messages",
    "alpaca",
    "text-label",
    "e2e",
    WEBNLG,
    "dart",
    "wikisql",
    "samsum",
    "squad",
    "prompts",
    "imagefolder",
)
SAMSUM_ASKS = "\n\nSummary:\n"
"""A SAMSum prompt is the dialogue and this."""

E2E_MARK = "||"
E2E_SEPARATOR = "\n"
"""An E2E prompt is the meaning representation and this, so that the completion begins a line of its own."""

# Taori et al. 2023, Stanford Alpaca, the two prompts of its train.py.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

_TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("text", "pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
    ("sentence1", None),
)
_E2E_COLUMNS = (("mr", "ref"), ("meaning_representation", "human_reference"))
_TELLING = (
    (WEBNLG, {"entries"}),
    (WEBNLG, WEBNLG_KEYS),
    ("dart", DART_KEYS),
    ("wikisql", WIKISQL_KEYS),
    ("samsum", {"dialogue", "summary"}),
    ("squad", {"context", "question", "answers"}),
    ("squad", {"version", "data"}),
)
"""Formats and columns that no other format has."""

ParsedRow = PromptExample | ChatExample | QuestionExample | LabelRow
Parser = Callable[[Row, int], Sequence[ParsedRow]]
"""Takes a row and its line; returns the examples that it holds. Raises DataError (line and field set, no source)."""


@dataclass(frozen=True, slots=True)
class Parsing:
    """What a parser needs to know beside the row. `targets`: False accepts rows without completion or label.

    `part`: of webnlg, "seen", "unseen" or None. `tables`: of wikisql, the headers by table, None where there are none.
    """

    columns: Columns
    targets: bool
    keys: tuple[str, ...]
    part: str | None = None
    tables: Tables | None = None


def canonical_format(name: str) -> str:
    """The one spelling of a format's name ("Prompt/Completion" is prompt-completion). Raises UsageError."""
    known = name.strip().lower().replace("/", "-").replace("_", "-")
    if known in (*FORMATS, *WEBNLG_PARTS, "auto", "glue") or known.startswith("glue:"):
        return known
    choices = ", ".join((*FORMATS, *WEBNLG_PARTS))
    raise UsageError(f"data.format must be auto, glue, glue:<task> or one of {choices}; came {name!r}")


def detect_format(keys: Sequence[str], columns: Columns, *, targets: bool) -> str | None:
    """The format of rows with these keys, None if no format has them."""
    found = set(keys)
    if _messages_key(found, columns) is not None:
        return "messages"
    if {columns.prompt, columns.completion} <= found:
        return "prompt-completion"
    if {"instruction", "output"} <= found:
        return "alpaca"
    text, _ = _text_columns(keys, columns)
    if text in found and (columns.label in found or not targets):
        return "text-label"
    if any(set(pair) <= found for pair in _E2E_COLUMNS):
        return "e2e"
    for name, columns_of in _TELLING:
        if columns_of <= found:
            return name
    if columns.prompt in found and not targets:
        return "prompts"
    return None


def parser_for(name: str, parsing: Parsing) -> Parser:
    """The parser of a format (not glue, which is text-label with the task's columns, see load.py)."""
    several: dict[str, Parser] = {
        WEBNLG: lambda row, line: webnlg_examples(row, line, targets=parsing.targets, part=parsing.part),
        "dart": lambda row, line: dart_examples(row, line, targets=parsing.targets),
        "squad": lambda row, line: question_examples(row, line, targets=parsing.targets),
    }
    if name in several:
        return several[name]
    parsers: dict[str, Callable[[Row, int, Parsing], ParsedRow]] = {
        "prompt-completion": _prompt_completion,
        "messages": _messages,
        "alpaca": _alpaca,
        "text-label": _text_label,
        "e2e": _e2e,
        "wikisql": lambda row, line, parsing: wikisql_example(row, line, parsing.tables, targets=parsing.targets),
        "samsum": _samsum,
        "prompts": _prompt,
    }
    parse = parsers[name]
    if name == "text-label":
        text, pair = _text_columns(parsing.keys, parsing.columns)
        parsing = replace(parsing, columns=replace(parsing.columns, text=text, pair=pair))
    return lambda row, line: [parse(row, line, parsing)]


def _text(row: Row, field: str, line: int, *, empty: bool = False) -> str:
    """The text in a row's field. Raises DataError if it is missing or no usable text."""
    if row.get(field) is None:
        raise DataError(f"it is missing; the row has {', '.join(row) or 'nothing'}", line=line, field=field)
    return _checked_text(row[field], field, line, empty=empty)


def _checked_text(value: Any, field: str, line: int, *, empty: bool) -> str:
    """`value`, a text. Raises DataError if it is none, broken, or empty though it may not be."""
    if not isinstance(value, str):
        raise DataError(f"expected text, came {type(value).__name__}", line=line, field=field)
    if not empty and not value.strip():
        raise DataError("it is empty. Fill it in or remove the row", line=line, field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = "it holds half of a surrogate pair, which is no text; write the character out"
        raise DataError(reason, line=line, field=field) from error
    return value


def _prompt_completion(row: Row, line: int, parsing: Parsing) -> PromptExample:
    columns = parsing.columns
    prompt = _text(row, columns.prompt, line)
    if not parsing.targets and row.get(columns.completion) is None:
        return PromptExample(prompt, None, (), line)
    completion = _text(row, columns.completion, line)
    further = row.get(columns.references)
    if further is None:
        return PromptExample(prompt, completion, (completion,), line)
    if not isinstance(further, list) or not all(isinstance(text, str) for text in further):
        came = type(further).__name__
        raise DataError(f"expected a list of texts, came {came}", line=line, field=columns.references)
    return PromptExample(prompt, completion, tuple(dict.fromkeys((completion, *further))), line)


def _prompt(row: Row, line: int, parsing: Parsing) -> PromptExample:
    field = TEXT_LINE if TEXT_LINE in row and parsing.columns.prompt not in row else parsing.columns.prompt
    return PromptExample(_text(row, field, line), None, (), line)


def _alpaca(row: Row, line: int, parsing: Parsing) -> PromptExample:
    instruction = _text(row, "instruction", line)
    given = "" if row.get("input") is None else _text(row, "input", line, empty=True)
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    prompt = template.format(instruction=instruction, input=given)
    if not parsing.targets and row.get("output") is None:
        return PromptExample(prompt, None, (), line)
    output = _text(row, "output", line)
    return PromptExample(prompt, output, (output,), line)


def _e2e(row: Row, line: int, parsing: Parsing) -> PromptExample:
    if TEXT_LINE in row:
        meaning, mark, reference = _text(row, TEXT_LINE, line).partition(E2E_MARK)
        if not mark and parsing.targets:
            raise DataError(f"expected `meaning representation{E2E_MARK}reference`, came no {E2E_MARK}", line=line)
        row = {"mr": meaning, "ref": reference.strip()}
    names = next((pair for pair in _E2E_COLUMNS if pair[0] in row), _E2E_COLUMNS[0])
    prompt = _text(row, names[0], line).strip() + E2E_SEPARATOR
    if not parsing.targets and row.get(names[1]) in (None, ""):
        return PromptExample(prompt, None, (), line)
    reference = _text(row, names[1], line).strip()
    return PromptExample(prompt, reference, (reference,), line)


def _samsum(row: Row, line: int, parsing: Parsing) -> PromptExample:
    """A dialogue and its summary; the files end some lines in \\r\\n and some in \\n."""
    prompt = "\n".join(_text(row, "dialogue", line).split("\r\n")).strip() + SAMSUM_ASKS
    if not parsing.targets and row.get("summary") in (None, ""):
        return PromptExample(prompt, None, (), line)
    summary = _text(row, "summary", line).strip()
    return PromptExample(prompt, summary, (summary,), line)


def _messages_key(keys: set[str], columns: Columns) -> str | None:
    wanted = ("messages", "conversations") if columns.messages is None else (columns.messages,)
    return next((key for key in wanted if key in keys), None)


def _messages(row: Row, line: int, parsing: Parsing) -> ChatExample:
    field = _messages_key(set(row), parsing.columns) or parsing.columns.messages or "messages"
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise DataError("expected a list of turns with at least one in it", line=line, field=field)
    messages = tuple(_message(turn, number, field, line) for number, turn in enumerate(turns))
    if messages[0].role == "assistant":
        raise DataError(
            "the first turn is the assistant's; begin with the system's or the user's", line=line, field=field
        )
    if parsing.targets and not any(message.role == "assistant" for message in messages):
        raise DataError("no turn is the assistant's, so there is nothing to learn", line=line, field=field)
    return ChatExample(messages, line)


def _message(turn: Any, number: int, field: str, line: int) -> Message:
    where = f"{field}[{number}]"
    if not isinstance(turn, dict):
        raise DataError(f"expected an object with role and content, came {type(turn).__name__}", line=line, field=where)
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = str(turn.get(role_key)).strip().lower()
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        expected = ", ".join((*ROLES, *SHAREGPT_ROLES))
        raise DataError(
            f"expected one of {expected}; came {turn.get(role_key)!r}", line=line, field=f"{where}.{role_key}"
        )
    content = _joined_parts(turn.get(content_key))
    return Message(role, _checked_text(content, f"{where}.{content_key}", line, empty=role != "assistant"))


def _joined_parts(content: Any) -> Any:
    """A content given as a list of text parts, joined to one text; anything else as it is, to be checked."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def _text_columns(keys: Sequence[str], columns: Columns) -> tuple[str, str | None]:
    if columns.text is not None:
        return columns.text, columns.pair
    found = set(keys)
    for text, pair in _TEXT_COLUMNS:
        pair = columns.pair or pair
        if text in found and (pair is None or pair in found):
            return text, pair
    return "text", columns.pair


def _text_label(row: Row, line: int, parsing: Parsing) -> LabelRow:
    columns = parsing.columns
    text = _text(row, columns.text or "text", line)
    pair = None if columns.pair is None else _text(row, columns.pair, line)
    label = row.get(columns.label)
    if isinstance(label, str):
        label = label.strip() or None
    if isinstance(label, float) and math.isnan(label):  # how a table writes that there is none
        label = None
    if not parsing.targets and label in (None, UNLABELLED):
        return LabelRow(text, pair, None, line, columns.label)
    if label is None:
        reason = "it is empty" if columns.label in row else f"it is missing; the row has {', '.join(row) or 'nothing'}"
        raise DataError(f"{reason}. Fill it in or remove the row", line=line, field=columns.label)
    if not isinstance(label, str | int | float):
        raise DataError(f"expected a name or a number, came {type(label).__name__}", line=line, field=columns.label)
    return LabelRow(text, pair, label, line, columns.label)
