"""Examples -> token ids and labels; what carries no loss has the label -100.

A prompt and its completion are tokenized apart and joined, so that the ids before the answer are those that generation
is given. The completion ends in the end-of-sequence token, which carries loss: a model learns to stop only from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.examples import ChatExample, Dataset, Example, LabelExample, PromptExample, QuestionExample
from lorakit.data.faults import Faults, with_source
from lorakit.data.template import encode_chat, render_prompt
from lorakit.data.tokens import continuing_ids, end_id, ids_of, longest_row, opening_ids
from lorakit.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token without loss (what torch's cross-entropy ignores by default)."""

CAUSAL_LM = "causal-lm"
SEQ2SEQ = "seq2seq"
CLASSIFICATION = "sequence-classification"
QUESTION_ANSWERING = "question-answering"

_NEEDED: dict[str, tuple[type[Example], ...]] = {
    CAUSAL_LM: (PromptExample, ChatExample),
    SEQ2SEQ: (PromptExample,),
    CLASSIFICATION: (LabelExample,),
    QUESTION_ANSWERING: (QuestionExample,),
}
_NEEDED_WORDS = {
    CAUSAL_LM: "prompts with completions, or chats",
    SEQ2SEQ: "prompts with completions",
    CLASSIFICATION: "texts with labels",
    QUESTION_ANSWERING: "questions on contexts",
}
PROGRESS_EVERY = 100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row for the model.

    labels: causal-lm: one id a token of `input_ids`, -100 without loss; seq2seq: the target's ids; classification: the
    class id or score; question-answering: the first and the last token of the answer. token_type_ids: which text of a
    pair a token is of, where the model's tokenizer tells.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    line: int
    token_type_ids: list[int] | None = None


def encode(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: str,
    max_length: int | None,
    truncate: bool = False,
) -> Encoded:
    """One example for `task` (causal-lm, seq2seq or sequence-classification; a question may be several: encode_questions).

    max_length: the most tokens of a row; None asks the tokenizer. truncate: cut a longer row instead of raising. Cut
    are: a prompt at its beginning (behind the begin token) before a completion at its end; a chat, a seq2seq source
    and target at their ends; of a pair the longer text. Raises DataError, UsageError for an unknown task.
    """
    check_task(task)
    if not isinstance(example, _NEEDED[task]):
        came = type(example).__name__
        raise DataError(f"the task {task} needs {_NEEDED_WORDS[task]}, came a {came}", line=example.line)
    if task == QUESTION_ANSWERING:
        raise UsageError("a question on a long context is several rows: use encode_questions.")
    limit = longest_row(tokenizer, max_length)
    if isinstance(example, LabelExample):
        return _label(example, tokenizer, limit, truncate)
    if isinstance(example, ChatExample):
        return _chat(example, tokenizer, limit, truncate)
    if task == SEQ2SEQ:
        return _seq2seq(example, tokenizer, limit, truncate)
    return _causal(example, tokenizer, limit, truncate)


def encode_all(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: str,
    max_length: int | None,
    truncate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """All examples, in order. `progress(done, total)` is called now and then, and at the end.

    Raises DataError that names the source and up to five bad rows (too long, without a completion or label ...).
    """
    check_fit(dataset, task)
    faults = Faults(dataset.source)
    encoded, total = [], len(dataset)
    for done, example in enumerate(dataset.examples, start=1):
        try:
            encoded.append(encode(example, tokenizer, task=task, max_length=max_length, truncate=truncate))
        except DataError as error:
            if error.line is None:  # not the row's fault: every other row would say the same
                raise with_source(error, dataset.source) from error
            faults.add(error)
        if progress is not None and (done % PROGRESS_EVERY == 0 or done == total):
            progress(done, total)
    faults.close()
    return encoded


def prompt_text(example: PromptExample | ChatExample, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What generation is given: the prompt; of a chat all up to its last assistant turn, with the generation prompt."""
    return example.prompt if isinstance(example, PromptExample) else render_prompt(example, tokenizer)


def prompt_ids(
    example: PromptExample | ChatExample, tokenizer: "PreTrainedTokenizerBase", *, task: str = CAUSAL_LM
) -> list[int]:
    """The ids of `prompt_text`, the same that stand before the answer in training."""
    text = prompt_text(example, tokenizer)
    if isinstance(example, ChatExample):
        return ids_of(tokenizer, text)  # the template writes the begin token itself
    return ids_of(tokenizer, text, special=True) if task == SEQ2SEQ else opening_ids(tokenizer, text)


def check_task(task: str) -> None:
    """Raises UsageError for a task that this room cannot encode for."""
    if task not in _NEEDED:
        raise UsageError(f"task must be one of {', '.join(_NEEDED)}; came {task!r}")


def check_fit(dataset: Dataset, task: str) -> None:
    """Raises DataError for an empty data set or one of another kind than `task` needs, UsageError for an unknown task."""
    check_task(task)
    if not dataset.examples:
        raise DataError("the data set is empty. Expected at least one row", source=dataset.source)
    if not isinstance(dataset.examples[0], _NEEDED[task]):
        raise DataError(
            f"the task {task} needs {_NEEDED_WORDS[task]}, but the data are {dataset.format}. "
            "Change the task or the data",
            source=dataset.source,
        )


def _completion(example: PromptExample) -> str:
    if example.completion is None:
        raise DataError("it is missing, and training and loss need it", line=example.line, field="completion")
    return example.completion


def _too_long(count: int, limit: int, line: int, field: str) -> DataError:
    return DataError(
        f"the row has {count} tokens, the most is {limit}. Shorten or remove it, raise data.max_length if the "
        "model takes more, or set data.truncate to cut such rows",
        line=line,
        field=field,
    )


def _causal(example: PromptExample, tokenizer: "PreTrainedTokenizerBase", limit: int | None, truncate: bool) -> Encoded:
    prompt = opening_ids(tokenizer, example.prompt)
    completion = [*continuing_ids(tokenizer, _completion(example)), end_id(tokenizer)]
    count = len(prompt) + len(completion)
    if limit is not None and count > limit:
        if not truncate:
            raise _too_long(count, limit, example.line, "prompt")
        begin = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else []
        completion = completion[: max(1, limit - len(begin) - 1)]
        rest = prompt[len(begin) :]
        prompt = begin + rest[max(0, len(rest) - max(0, limit - len(begin) - len(completion))) :]
    return Encoded(prompt + completion, [IGNORE] * len(prompt) + completion, example.line)


def _chat(example: ChatExample, tokenizer: "PreTrainedTokenizerBase", limit: int | None, truncate: bool) -> Encoded:
    ids, loss = encode_chat(example, tokenizer)
    if limit is not None and len(ids) > limit:
        if not truncate:
            raise _too_long(len(ids), limit, example.line, "messages")
        ids, loss = ids[:limit], loss[:limit]
        if not any(loss):
            reason = (
                f"no assistant's turn begins in the first {limit} tokens, so nothing is left to learn. Remove the row"
            )
            raise DataError(reason, line=example.line, field="messages")
    labels = [number if counts else IGNORE for number, counts in zip(ids, loss, strict=True)]
    return Encoded(ids, labels, example.line)


def _seq2seq(
    example: PromptExample, tokenizer: "PreTrainedTokenizerBase", limit: int | None, truncate: bool
) -> Encoded:
    cut = {"truncation": True, "max_length": limit} if truncate and limit is not None else {}
    source = list(tokenizer(example.prompt, verbose=False, **cut)["input_ids"])
    target = list(tokenizer(text_target=_completion(example), verbose=False, **cut)["input_ids"])
    if target[-1:] != [end_id(tokenizer)]:
        target = [*target[: limit - 1 if cut and limit is not None else None], end_id(tokenizer)]
    for ids, field in ((source, "prompt"), (target, "completion")):
        if limit is not None and len(ids) > limit:
            raise _too_long(len(ids), limit, example.line, field)
    return Encoded(source, target, example.line)


def _label(example: LabelExample, tokenizer: "PreTrainedTokenizerBase", limit: int | None, truncate: bool) -> Encoded:
    if example.label is None:
        raise DataError("it is missing, and training and loss need it", line=example.line, field="label")
    cut = {"truncation": True, "max_length": limit} if truncate and limit is not None else {}
    row = tokenizer(example.text, example.pair, verbose=False, **cut)
    ids = list(row["input_ids"])
    if limit is not None and len(ids) > limit:
        raise _too_long(len(ids), limit, example.line, "text")
    types = list(row["token_type_ids"]) if "token_type_ids" in row else None
    return Encoded(ids, example.label, example.line, types)
