"""Questions -> the stretch of their context that a model marks as the answer (Devlin et al. 2019, sections 4.2 and 4.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.data import BatchOrder, QuestionExample, Window, collate, encode_question
from lorakit.errors import UsageError
from lorakit.generate.modes import device_of, evaluating
from lorakit.models import longest_row

_TASK = "question-answering"
LONGEST_ANSWER = 30
"""The most tokens of an answer, as in BERT's run_squad.py."""


@dataclass(frozen=True, slots=True)
class SpanAnswer:
    """`text`: the answer, "" for none. `start`: the place of its first character in the context, None for none.

    `score`: the sum of the logits of its first and last token. `none_score`: the same of "no answer", the least of all
    windows: one that does not hold the answer says rightly that it has none.
    """

    text: str
    start: int | None
    score: float
    none_score: float


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[QuestionExample],
    *,
    allow_none: bool = False,
    none_threshold: float = 0.0,
    longest_answer: int = LONGEST_ANSWER,
    batch_size: int = 32,
    max_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SpanAnswer]:
    """The best stretch for each question, in their order: of all windows the pair of places, first not behind last and both
    in the context, whose logits sum to the most.

    model: a question-answering model. allow_none: "" is an answer too (SQuAD v2), given where `none_score` passes the best
    stretch's score by more than `none_threshold`. longest_answer: the most tokens of an answer. max_length, stride: see
    `encode_question`. progress: called with (windows done, windows in all). Raises DataError, ModelError, UsageError.
    """
    if longest_answer < 1 or batch_size < 1:
        raise UsageError(f"longest_answer and batch_size must be at least 1, came {longest_answer} and {batch_size}.")
    limit = longest_row(model, tokenizer) if max_length is None else max_length
    known = [encode_question(one, tokenizer, max_length=limit, stride=stride) for one in questions]
    rows = [(number, window) for number, windows in enumerate(known) for window in windows]
    best: dict[int, SpanAnswer] = {}
    done = 0
    with evaluating(model):
        for batch in BatchOrder([len(window.row.input_ids) for _, window in rows], batch_size, seed=0).evaluation():
            starts, ends = _logits(model, tokenizer, [rows[row][1] for row in batch])
            for place, row in enumerate(batch):
                number, window = rows[row]
                found = _best(window, starts[place], ends[place], questions[number].context, longest_answer)
                best[number] = _better(best.get(number), found)
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    answers = [best[number] for number in range(len(questions))]
    return [_or_none(one, none_threshold) if allow_none else one for one in answers]


def _logits(model: Any, tokenizer: Any, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    batch = collate([window.row for window in windows], pad_id=tokenizer.pad_token_id, task=_TASK)
    del batch["labels"]
    output = model(**{name: tensor.to(device_of(model)) for name, tensor in batch.items()})
    return output.start_logits.float().cpu(), output.end_logits.float().cpu()  # B, T


def _best(window: Window, starts: Tensor, ends: Tensor, context: str, longest: int) -> SpanAnswer:
    """starts, ends: (seq,) logits. All pairs are weighed, not those of the twenty likeliest starts and ends."""
    places = [place for place, span in enumerate(window.offsets) if span]
    none = float(starts[window.empty] + ends[window.empty])
    if not places:  # a context of blanks alone has no token
        return SpanAnswer("", None, float("-inf"), none)
    first, last = places[0], places[-1] + 1
    scores = starts[first:last, None] + ends[None, first:last]  # (context, context)
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(longest - 1)
    score, at = scores.masked_fill(~allowed, float("-inf")).flatten().max(0)
    begin, end = (first + int(place) for place in divmod(int(at), last - first))
    left, right = window.offsets[begin], window.offsets[end]
    text = context[(left or (0, 0))[0] : (right or (0, 0))[1]]
    bare = text.strip()  # some tokenizers count the blank before a word to it
    start = (left or (0, 0))[0] + len(text) - len(text.lstrip())
    return SpanAnswer(bare, start, float(score), none)


def _better(one: SpanAnswer | None, other: SpanAnswer) -> SpanAnswer:
    if one is None:
        return other
    best = other if other.score > one.score else one
    return SpanAnswer(best.text, best.start, best.score, min(one.none_score, other.none_score))


def _or_none(answer: SpanAnswer, threshold: float) -> SpanAnswer:
    if answer.none_score - answer.score > threshold:
        return SpanAnswer("", None, answer.score, answer.none_score)
    return answer
