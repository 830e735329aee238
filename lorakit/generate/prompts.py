"""A prompt as a user writes it -> token ids, the same that training put before an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data import ChatExample, PromptExample
from lorakit.data import prompt_ids as example_ids
from lorakit.errors import DataError

Prompt = str | Sequence[Mapping[str, str]] | PromptExample | ChatExample
"""A text; a chat as a list of {"role", "content"}, to be answered; or an example, whose own answer is left out."""


def prompt_ids(tokenizer: Any, prompt: Prompt, *, task: str, index: int) -> list[int]:
    """The ids of a prompt; a chat goes through the template, with the opening of the assistant's turn.

    task: causal-lm or seq2seq. index: 0-based, for messages. Raises DataError for an empty prompt, a malformed chat,
    a chat that the template refuses and a tokenizer without template.
    """
    if isinstance(prompt, str):
        ids = example_ids(PromptExample(prompt, None, (), index + 1), tokenizer, task=task)
    elif isinstance(prompt, PromptExample | ChatExample):
        ids = example_ids(prompt, tokenizer, task=task)
    else:
        ids = _chat_ids(tokenizer, prompt, f"prompt {index + 1}")
    if not ids:
        raise DataError(f"prompt {index + 1} is empty: there is nothing for the model to go on from.")
    return ids


def _chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], where: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(f"{where} is a chat, but the model's tokenizer has no chat template. Give it as one text.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: expected messages with 'role' and 'content', came {message!r}.")
    if not messages:
        return []
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: what it raises is its own choice
        raise DataError(f"{where}: the chat template refuses these messages ({error}).") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # the template wrote them
