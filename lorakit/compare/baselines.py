"""What no training gives: the base's answers alone or after a few examples, and the most frequent class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorakit.compare.child import Child
from lorakit.compare.outcome import Outcome
from lorakit.data import ChatExample, Dataset, LabelExample, PromptExample
from lorakit.data.examples import ImageExample, Message, sample
from lorakit.errors import DataError
from lorakit.evaluate import score
from lorakit.generate import mean_nll

SEPARATOR = "\n\n"
"""Between the examples of a prompt; an answer ends where it stands."""
_LEADING = ("system", "developer")


def base_outcome(child: Child, shots: int, seed: int) -> Outcome:
    """The base on what the comparison measures, with `shots` training examples before each prompt (0 = zero-shot)."""
    child.read_data()
    child.open()
    # The loss is the eval loss of the other rows, whatever test set the metrics are taken on.
    dataset = child.eval_set if child.quality == "loss" else child.measured_set
    if dataset is None:
        raise DataError("there is neither data.eval nor data.test to measure on")
    if shots:
        dataset = with_examples(dataset, sample(child.train_set.examples, shots, seed))
        if any(isinstance(one, PromptExample) for one in dataset.examples):  # a chat's turns end by themselves
            stop = tuple(dict.fromkeys([*child.recipe.generate.stop, SEPARATOR]))
            child.recipe = replace(child.recipe, generate=replace(child.recipe.generate, stop=stop))
    metrics = _measured(child, dataset)
    return Outcome(seed, quality=metrics[child.quality], metrics=metrics)


def _measured(child: Child, dataset: Dataset) -> dict[str, float]:
    if child.quality == "loss":
        return {"loss": mean_nll(child.model, child._encode(dataset))}
    return child._generate(dataset).metrics


def with_examples(dataset: Dataset, shots: Sequence[Any]) -> Dataset:
    """The data set with the examples `shots` before each of its prompts."""
    return replace(dataset, examples=tuple(_after(example, shots) for example in dataset.examples))


def _after(example: Any, shots: Sequence[Any]) -> Any:
    if isinstance(example, PromptExample):
        before = "".join(f"{shot.prompt}{shot.completion}{SEPARATOR}" for shot in shots)
        return replace(example, prompt=before + example.prompt)
    turns: list[Message] = [turn for shot in shots for turn in shot.messages if turn.role not in _LEADING]
    chat: ChatExample = example
    lead = [turn for turn in chat.messages if turn.role in _LEADING]
    rest = [turn for turn in chat.messages if turn.role not in _LEADING]
    return replace(chat, messages=(*lead, *turns, *rest))


def majority_outcome(train: Dataset, measured: Dataset, metrics: Sequence[str], quality: str) -> Outcome:
    """Every row given the class that is most frequent in training."""
    known = [one.label for one in train.examples if isinstance(one, LabelExample | ImageExample)]
    wanted = [one.label for one in measured.examples if isinstance(one, LabelExample | ImageExample)]
    most = Counter(known).most_common(1)[0][0]
    found = score(metrics, [most] * len(wanted), wanted)
    return Outcome(0, quality=found[quality], metrics=found)
