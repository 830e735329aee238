"""Chats -> ids and which of them carry loss: the assistant's turns, each with the token that ends it.

Most chat templates have no `{% generation %}` markers, so the turns are found by rendering: the chat up to an
assistant's turn with the generation prompt, and the chat up to that turn's end, must both be beginnings of the whole. What
lies between is the turn, and a model asked at that point sees exactly what stood before it.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorakit.data.examples import ChatExample, Message
from lorakit.data.tokens import continuing_ids, end_id, ids_of
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(example: ChatExample, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """`(ids, carries_loss)` of a chat, equally long, up to the end of the last assistant turn.

    A template with markers says itself what carries loss. An end token right behind a marked stretch is counted in,
    and one is appended behind the last turn if no special token closes it: a model that never saw one never stops.
    Raises DataError (with the line) for a chat that the template refuses or rewrites, or a tokenizer without template.
    """
    messages = _up_to_last_answer(example)
    find = _marked_spans if _MARKER.search(_template(tokenizer)) else _answer_spans
    text, spans = find(messages, tokenizer, example.line)
    ids, loss = _align(text, spans, tokenizer, example.line)
    return _ended(ids, loss, tokenizer)


def render_prompt(example: ChatExample, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that a model is given to write the chat's last assistant turn (or the next one, if it has none)."""
    roles = [message.role for message in example.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)
    return _render(example.messages[:last], tokenizer, example.line, generation_prompt=True)


def _up_to_last_answer(example: ChatExample) -> tuple[Message, ...]:
    answers = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
    if not answers or answers[0] == 0:
        raise DataError(
            "expected a chat with an assistant's turn that answers an earlier turn", line=example.line, field="messages"
        )
    return example.messages[: answers[-1] + 1]


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "the tokenizer has no chat template, so a chat cannot become text. Use an instruction-tuned model, set "
            "tokenizer.chat_template, or give the data as prompt and completion"
        ) from error


def _render(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", line: int, *, generation_prompt: bool
) -> str:
    _template(tokenizer)
    turns = [asdict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:  # a template is a program: what it raises is its own choice
        roles = ", ".join(message.role for message in messages)
        reason = f"the chat template refuses the turns ({roles}): {error}"
        raise DataError(reason, line=line, field="messages") from error


def _marked_spans(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", line: int
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat and the stretches of it that the template's markers enclose.

    Not through `return_assistant_tokens_mask`: where a stretch ends in a blank, tokenizers that trim offsets (GPT-2's)
    make it mark everything behind, users' turns too.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _render(messages, tokenizer, line, generation_prompt=False)  # for its errors
    specials: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        [[asdict(message) for message in messages]],
        chat_template=_template(tokenizer),
        return_assistant_tokens_mask=True,
        **specials,
    )
    text, spans = str(rendered[0][0]), []
    for begin, end in rendered[1][0]:
        closed = tokenizer.eos_token is not None and text.startswith(tokenizer.eos_token, end)
        if begin < end:
            spans.append((begin, end + len(tokenizer.eos_token) if closed else end))
    if not spans:
        reason = "the chat template's generation markers mark nothing in this chat"
        raise DataError(reason, line=line, field="messages")
    return text, spans


def _align(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase", line: int
) -> tuple[list[int], list[bool]]:
    """The ids of `text`, and which of them lie in a span."""
    cuts: list[int] = []
    for start, _ in spans:
        head = _cut_ids(text[:start], cuts, tokenizer)
        if _cut_ids(text, cuts, tokenizer)[: len(head)] != head:
            cuts.append(start)  # a token would reach over the border; generation gets the ids of what is before it
    ids = _cut_ids(text, cuts, tokenizer)
    if cuts and tokenizer.decode(ids) != tokenizer.decode(ids_of(tokenizer, text)):
        raise DataError(
            "an assistant's turn begins in the middle of a token, and the tokenizer cannot begin one there. End the "
            "template's generation prompt in a special token",
            line=line,
            field="messages",
        )
    loss = [False] * len(ids)
    for start, end in spans:
        first = len(_cut_ids(text[:start], cuts, tokenizer))
        last = _reach(_cut_ids(text[:end], cuts, tokenizer), ids)
        loss[first:last] = [True] * (last - first)
    return ids, loss


def _cut_ids(text: str, cuts: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of `text` where no token reaches over a cut (a place in the text; cuts at or behind its end are idle)."""
    borders = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    ids = ids_of(tokenizer, text[: borders[1]])
    for begin, end in pairwise(borders[1:]):
        ids += continuing_ids(tokenizer, text[begin:end])
    return ids


def _reach(head: Sequence[int], ids: Sequence[int]) -> int:
    """How many of `ids` the text of `head` takes up; a last token that reaches over its end counts."""
    common = next((index for index, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1]), len(head))
    return common if common == len(head) else min(common + 1, len(ids))


def _answer_spans(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", line: int
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and from where to where each assistant turn stands in it (content and end of turn)."""
    text = _render(messages, tokenizer, line, generation_prompt=False)
    closing = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:index], tokenizer, line, generation_prompt=True)
        until = _render(messages[: index + 1], tokenizer, line, generation_prompt=False)
        if not (text.startswith(until) and until.startswith(before) and len(until) > len(before)):
            raise DataError(
                "the chat template rewrites earlier turns when later ones are added, so the text that carries loss "
                "cannot be told from the rest. Give the template {% generation %} markers, or the data as prompt and "
                "completion",
                line=line,
                field=f"messages[{index}]",
            )
        # A line break that a template puts behind the end-of-turn token is never generated: the model has stopped.
        bare = until.rstrip()
        end = len(bare) if len(bare) > len(before) and bare.endswith(tuple(closing)) else len(until)
        spans.append((len(before), end))
    return text, spans


def _ended(ids: list[int], loss: list[bool], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    last = len(loss) - 1 - loss[::-1].index(True)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ids[last] not in special and last + 1 < len(ids) and ids[last + 1] in special:
        last += 1  # markers that leave out the token that ends the turn
        loss[last] = True
    if ids[last] in special:
        return ids[: last + 1], loss[: last + 1]
    return [*ids[: last + 1], end_id(tokenizer)], [*loss[: last + 1], True]
