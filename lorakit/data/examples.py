"""What one row means, whatever file it stood in: a prompt with its completion, a chat, a text or an image with its label."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lorakit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `role`: system, developer, user, assistant or tool; `content`: its text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A text to continue. `references`: every completion that counts as right (the completion itself, if alone).

    `completion` is None, and `references` empty, where the source was read without targets. `line` is 1-based.
    """

    prompt: str
    completion: str | None
    references: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A chat of one or more turns. `line` is 1-based."""

    messages: tuple[Message, ...]
    line: int


@dataclass(frozen=True, slots=True)
class LabelExample:
    """A text, or a pair of texts, with a class id (int), a score (float), or None where read without targets."""

    text: str
    pair: str | None
    label: int | float | None
    line: int


@dataclass(frozen=True, slots=True)
class ImageExample:
    """The file of an image with a class id, or None where read without. `line` counts the images from 1."""

    path: str
    label: int | None
    line: int


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """A question about a context, answered by a stretch of it. `line` counts the questions of the source from 1.

    `answers`: (text, place of its first character in the context) for each answer that counts as right; () where the
    context holds none (SQuAD v2); None where read without. `id`: what the source calls the question.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None
    id: str
    line: int


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """The file of an image with what is to be seen on it. `line` counts the images from 1."""

    path: str
    text: str
    line: int


Example = PromptExample | ChatExample | LabelExample | ImageExample | CaptionedImage | QuestionExample
AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of one source, in the source's order.

    `format`: the name of the format found. `source`: what messages call it. `label_names`: the name of each class id,
    None where there are no classes. `regression`: labels are scores. `skipped`: broken rows that were left out, of sources
    that are published with such rows (faults.py); any other source with one is refused.
    """

    examples: tuple[Example, ...]
    format: str
    source: str
    label_names: list[str] | None = None
    regression: bool = False
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)


def sample(examples: Sequence[AnyExample], count: int | None, seed: int) -> list[AnyExample]:
    """`count` examples drawn without replacement, in their old order; all where `count` is None or too large.

    A drawn sample and not the first rows, because many files are sorted (E2E by its meaning representations). The same
    count and seed draw the same rows on every machine, and a smaller sample is a part of every larger one of its seed: 100
    rows against 1,000 differ in nothing but the 900 more. Raises UsageError for a count under 1.
    """
    if count is not None and count < 1:
        raise UsageError(f"A limit must be at least 1 row, came {count}. Leave it out to use every row.")
    if count is None or count >= len(examples):
        return list(examples)
    # One by one and not by random.sample, which draws in another way where it is asked for many.
    draw, chosen = random.Random(seed), set[int]()
    while len(chosen) < count:
        chosen.add(draw.randrange(len(examples)))
    return [examples[index] for index in sorted(chosen)]


def group_references(examples: Sequence[PromptExample]) -> list[PromptExample]:
    """One example a prompt, in order of first appearance, with the references of all rows that share the prompt.

    For evaluation against several references (E2E has about eight a meaning representation). Equal references of a
    prompt are kept once; completion and line are those of the prompt's first row.
    """
    first: dict[str, PromptExample] = {}
    references: dict[str, dict[str, None]] = {}
    for example in examples:
        first.setdefault(example.prompt, example)
        references.setdefault(example.prompt, {}).update(dict.fromkeys(example.references))
    return [replace(example, references=tuple(references[prompt])) for prompt, example in first.items()]


def references_of(example: PromptExample | ChatExample) -> tuple[str, ...]:
    """The texts that a model's answer to `example` is held against: of a chat, its last assistant turn."""
    if isinstance(example, PromptExample):
        return example.references
    answers = [message.content for message in example.messages if message.role == "assistant"]
    return tuple(answers[-1:])
