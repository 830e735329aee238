"""Texts -> classes or scores, images -> classes, with a classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from lorakit.data import BatchOrder, ImageExample, LabelExample, collate, collate_images, encode
from lorakit.errors import UsageError
from lorakit.generate.modes import device_of, evaluating
from lorakit.models import longest_row

_TASK = "sequence-classification"


@dataclass(frozen=True, slots=True)
class Prediction:
    """`label`: the likeliest class id, None for a regression. `scores`: a probability a class, or the one number."""

    label: int | None
    scores: tuple[float, ...]


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | tuple[str, str] | LabelExample],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """A prediction for each text, pair of texts or example (its label is not looked at), in their order.

    model: a sequence classifier. max_length: the most tokens of a row; None is what the model takes. truncate: cut a
    longer row (the longer text of a pair first) instead of raising. progress: called with (rows done, rows in all).
    Raises DataError, with the row's line, for a text that is too long. Modes are as before when it returns.
    """
    examples = [_example(text, index + 1) for index, text in enumerate(texts)]
    limit = longest_row(model, tokenizer) if max_length is None else max_length
    if limit is not None and limit < 1:
        raise UsageError(f"max_length must be at least 1, came {limit}.")
    rows = [encode(row, tokenizer, task=_TASK, max_length=limit, truncate=truncate) for row in examples]
    found: dict[int, Prediction] = {}
    with evaluating(model):
        for batch in BatchOrder([len(row.input_ids) for row in rows], batch_size, seed=0).evaluation():
            tensors = collate([rows[row] for row in batch], pad_id=tokenizer.pad_token_id, task=_TASK)
            del tensors["labels"]
            logits = model(**{name: tensor.to(device_of(model)) for name, tensor in tensors.items()}).logits  # B, C
            found.update(zip(batch, _predictions(logits.float()), strict=True))
            if progress is not None:
                progress(len(found), len(rows))
    return [found[row] for row in range(len(rows))]


def classify_images(
    model: Any,
    processor: Any,
    images: Sequence[str | PathLike[str] | ImageExample],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """A prediction for each image, given as its file or as an example (its label is not looked at), in their order.

    model: an image classifier. processor: its image processor. progress: called with (images done, images in all).
    Raises DataError that names a file which is no image or damaged. Modes are as before when it returns.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, came {batch_size}.")
    rows = [
        ImageExample(image.path if isinstance(image, ImageExample) else fspath(image), None, index + 1)
        for index, image in enumerate(images)
    ]
    found: list[Prediction] = []
    with evaluating(model):
        for begin in range(0, len(rows), batch_size):
            pixels = collate_images(rows[begin : begin + batch_size], processor)["pixel_values"]
            logits = model(pixel_values=pixels.to(device_of(model), model.dtype)).logits  # B, C
            found += _predictions(logits.float())
            if progress is not None:
                progress(len(found), len(rows))
    return found


def _predictions(logits: Any) -> list[Prediction]:
    """logits: (batch, classes), one class for a regression."""
    if logits.shape[-1] == 1:
        return [Prediction(None, tuple(values)) for values in logits.tolist()]
    labels, scores = logits.argmax(-1).tolist(), logits.softmax(-1).tolist()
    return [Prediction(label, tuple(values)) for label, values in zip(labels, scores, strict=True)]


def _example(text: str | tuple[str, str] | LabelExample, line: int) -> LabelExample:
    if isinstance(text, LabelExample):
        return LabelExample(text.text, text.pair, 0, text.line)  # encode wants some label; ours is dropped again
    first, second = (text, None) if isinstance(text, str) else text
    return LabelExample(first, second, 0, line)
