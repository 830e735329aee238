"""Questions on contexts -> rows for a model that marks the answer's first and last token (Devlin et al. 2019, section 4.2).

A context that is too long for one row is cut into windows that overlap. In a window without the answer, and for a question
without one (SQuAD v2), both labels are the place of the [CLS] token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.encode import PROGRESS_EVERY, QUESTION_ANSWERING, Encoded, check_fit
from lorakit.data.examples import Dataset, QuestionExample
from lorakit.data.faults import Faults
from lorakit.data.tokens import longest_row
from lorakit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Window:
    """One row of a question. offsets: for each token the place in the context of its first character and behind its last;
    None for tokens of the question and special ones. empty: the place of the token that stands for "no answer"."""

    row: Encoded
    offsets: list[tuple[int, int] | None]
    empty: int


def encode_question(
    example: QuestionExample,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    stride: int | None = None,
) -> list[Window]:
    """The windows of one question, in the context's order.

    max_length: the most tokens of a row; None asks the tokenizer. stride: tokens that neighbours share; None = a third of
    max_length, at most half of a window's share of the context. The labels are of the first answer; where answers are not
    known they are the empty place. Raises DataError where the question leaves no room for the context, or a stride as long
    as that room; ModelError for a tokenizer that cannot say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "question-answering needs a tokenizer that knows its tokens' places (a fast one); this is none."
        )
    limit = longest_row(tokenizer, max_length)
    room = None if limit is None else _room(example, tokenizer, limit)
    overlap = _overlap(example, room, limit, stride)
    windowed: dict[str, Any] = {}
    if limit is not None:
        windowed = {
            "truncation": "only_second",
            "max_length": limit,
            "stride": overlap,
            "return_overflowing_tokens": True,
        }
    pair = [example.question.strip()], [example.context]
    found: Any = tokenizer(*pair, return_offsets_mapping=True, verbose=False, **windowed)
    return [_window(example, found, number, tokenizer) for number in range(len(found["input_ids"]))]


def encode_questions(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Window]]:
    """The windows of each question of a data set, in order. `progress(done, total)` is called now and then.

    Raises DataError that names the source and up to five bad questions, ModelError; see `encode_question`.
    """
    check_fit(dataset, QUESTION_ANSWERING)
    faults, found, total = Faults(dataset.source), [], len(dataset)
    questions = [example for example in dataset.examples if isinstance(example, QuestionExample)]
    for done, example in enumerate(questions, start=1):
        try:
            found.append(encode_question(example, tokenizer, max_length=max_length, stride=stride))
        except DataError as error:
            faults.add(error)
        if progress is not None and (done % PROGRESS_EVERY == 0 or done == total):
            progress(done, total)
    faults.close()
    return found


def _room(example: QuestionExample, tokenizer: "PreTrainedTokenizerBase", limit: int) -> int:
    """Tokens that a row has for the context. Raises DataError for fewer than one."""
    question = tokenizer(example.question.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    room = limit - len(question) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        reason = f"the question has {len(question)} tokens, which leaves no room for its context in {limit}"
        raise DataError(f"{reason}. Shorten it or raise data.max_length", line=example.line, field="question")
    return room


def _overlap(example: QuestionExample, room: int | None, limit: int | None, stride: int | None) -> int:
    if room is None or limit is None:
        return 0
    if stride is None:
        return min(limit // 3, room // 2)
    if stride >= room:
        reason = f"the question leaves {room} tokens of a row for its context, and data.stride repeats {stride} of them"
        raise DataError(f"{reason}. Lower data.stride or raise data.max_length", line=example.line, field="question")
    return stride


def _window(example: QuestionExample, found: Any, number: int, tokenizer: "PreTrainedTokenizerBase") -> Window:
    ids = list(found["input_ids"][number])
    sources = found.sequence_ids(number)
    offsets = [
        (begin, end) if source == 1 else None
        for (begin, end), source in zip(found["offset_mapping"][number], sources, strict=True)
    ]
    mark = tokenizer.cls_token_id
    empty = ids.index(mark) if mark is not None and mark in ids else 0
    types = list(found["token_type_ids"][number]) if "token_type_ids" in found else None
    return Window(Encoded(ids, _labels(example, offsets, empty), example.line, types), offsets, empty)


def _labels(example: QuestionExample, offsets: Sequence[tuple[int, int] | None], empty: int) -> list[int]:
    """[first, last] token of the first answer, [empty, empty] where this window does not hold the whole of it."""
    if not example.answers:
        return [empty, empty]
    text, begin = example.answers[0]
    end = begin + len(text)
    inside = [place for place, span in enumerate(offsets) if span and span[0] < end and span[1] > begin]
    known = [span for span in offsets if span]
    if not inside or not known or known[0][0] > begin or known[-1][1] < end:
        return [empty, empty]
    return [inside[0], inside[-1]]
