"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained vectors in front of the input's embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.method import Draft, Insert, Method
from lorakit.errors import UsageError
from lorakit.methods.body import backbone, check_ids, check_length, check_room, embedding_of, fresh, rows_of
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.prompt import Prompt

INITS = ("vocabulary", "random")


@dataclass(frozen=True)
class PromptTuning(Method):
    """`length` trained vectors in front of each input. PEFT's PROMPT_TUNING folders are of this method."""

    name: ClassVar[str] = "prompt-tuning"
    learning_rate: ClassVar[float] = 1.0e-2  # few vectors, which want larger steps than matrices

    length: int = 20
    """How many virtual tokens; they take as many positions."""
    init: str = "vocabulary"
    """How they start: "vocabulary", the embeddings of tokens drawn at random; "random", even on [-0.5, 0.5], as in the paper."""
    tokens: Sequence[int] | None = None
    """Ids of the tokens (of a text that says what to do) whose embeddings they start from, in place of `init`; repeated where
    they are fewer than `length`."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_length("length", self.length)
        check_init(self.init)
        check_ids("tokens", self.tokens)
        check_kept(self.modules_to_save)

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        path, body = backbone(model, "prompt tuning")
        check_room(model, self.length, "a prompt")
        prefix = begun(body, self.length, self.init, self.tokens, dtype=dtype, generator=generator)
        insert = Insert(Prompt.on(body, self.length, 0), {"prefix": prefix})
        return keep(Draft(inserts={path: {"prompt": insert}}), model, self.modules_to_save)


def check_init(init: Any) -> None:
    """Raise UsageError for a start of another name."""
    if init not in INITS:
        raise UsageError(f"init must be one of {', '.join(INITS)}, not {init!r}.")


def begun(
    body: Any,
    count: int,
    init: str,
    tokens: Sequence[int] | None,
    *,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The first values of `count` virtual tokens: (count, dim)."""
    table = embedding_of(body)
    if tokens is not None:
        return rows_of(body, list(tokens), count, dtype)
    if table.weight.is_meta:
        return torch.empty(count, table.embedding_dim, dtype=dtype or table.weight.dtype, device="meta")
    if init == "random":
        shape = (count, table.embedding_dim)
        return fresh(shape, table.weight, dtype=dtype, generator=generator, bound=0.5)
    ids = torch.randint(table.num_embeddings, (count,), generator=generator)
    return rows_of(body, ids.tolist(), count, dtype)
