"""SQuAD's files, v1.1 (Rajpurkar et al. 2016) and v2.0 (2018): questions, each answered by a stretch of its context."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.examples import QuestionExample
from lorakit.errors import DataError


def question_examples(row: Mapping[str, Any], line: int, *, targets: bool) -> list[QuestionExample]:
    """The questions of a whole file {"data": [{"paragraphs": [..]}]}, or the one of a hub set's row.

    Of a file, `line` counts its questions from 1. targets: False accepts questions without answers. Raises DataError, whose
    field says where in the file the fault is.
    """
    if "data" not in row:
        return [_row(row, line, targets)]
    found: list[QuestionExample] = []
    for a, article in enumerate(_list(row, "data", "data")):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"data[{a}].paragraphs")):
            where = f"data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", f"{where}.context", None)
            for q, entry in enumerate(_list(paragraph, "qas", f"{where}.qas")):
                found.append(_entry(entry, context, f"{where}.qas[{q}]", len(found) + 1, targets))
    return found


def _entry(entry: Any, context: str, where: str, number: int, targets: bool) -> QuestionExample:
    question = _text(entry, "question", f"{where}.question", None)
    name = str(entry.get("id", number))
    if entry.get("is_impossible") is True:
        return QuestionExample(question, context, (), name, number)
    answers = entry.get("answers")
    if not answers and not targets:
        return QuestionExample(question, context, None, name, number)
    if not isinstance(answers, list) or not answers:
        reason = "expected at least one answer, or is_impossible: true (SQuAD v2)"
        raise DataError(reason, field=f"{where}.answers")
    pairs = []
    for answer in answers:
        if not isinstance(answer, dict):
            raise DataError(f"expected text and answer_start, came {answer!r}", field=f"{where}.answers")
        pairs.append(_checked(answer.get("text"), answer.get("answer_start"), context, f"{where}.answers", None))
    return QuestionExample(question, context, tuple(pairs), name, number)


def _row(row: Mapping[str, Any], line: int, targets: bool) -> QuestionExample:
    """A hub set's row: answers are {"text": [..], "answer_start": [..]}, both empty where there is no answer."""
    question, context = (_text(row, field, field, line) for field in ("question", "context"))
    name, answers = str(row.get("id", line)), row.get("answers")
    if answers is None and not targets:
        return QuestionExample(question, context, None, name, line)
    texts, starts = (answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        reason = "expected text and answer_start, two lists of one length"
        raise DataError(reason, line=line, field="answers")
    pairs = [_checked(text, start, context, "answers", line) for text, start in zip(texts, starts, strict=True)]
    return QuestionExample(question, context, tuple(pairs), name, line)


def _checked(text: Any, start: Any, context: str, where: str, line: int | None) -> tuple[str, int]:
    if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"expected text and answer_start, came {text!r} and {start!r}", line=line, field=where)
    if start < 0 or context[start : start + len(text)] != text:
        came = context[max(0, start) : max(0, start) + len(text)]
        reason = f"the context has {came!r} at {start}, not the answer {text!r}. Correct answer_start"
        raise DataError(reason, line=line, field=where)
    return text, start


def _list(value: Any, key: str, where: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"expected a list, came {type(found).__name__}: this is no file of SQuAD's form", field=where)
    return found


def _text(value: Any, key: str, where: str, line: int | None) -> str:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"expected text, came {found!r}", line=line, field=where)
    return found
