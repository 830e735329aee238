"""Prefix-embedding tuning (Hu et al. 2021, section 5.1): trained embeddings before the prompt and behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lorakit.attach.method import Draft, Insert, Method
from lorakit.errors import UsageError
from lorakit.methods.body import backbone, check_length, check_room
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.prompt import Prompt
from lorakit.methods.prompt_tuning import begun, check_init


@dataclass(frozen=True)
class PromptEmbedding(Method):
    """`prefix_length` trained vectors before each prompt and `infix_length` behind it: dim * (prefix + infix) numbers.

    Where a row holds a prompt and its answer (training), lorakit.methods.prompt.ends tells where the prompt ends; the
    trainer does so for rows whose labels begin behind it. So must generation without the key/value cache, which reads the
    answer so far as prompt otherwise.
    """

    name: ClassVar[str] = "prefix-embedding"
    learning_rate: ClassVar[float] = 3.0e-3  # few vectors, which want larger steps than matrices

    prefix_length: int = 32
    """Virtual tokens before the prompt."""
    infix_length: int = 8
    """Virtual tokens behind the prompt's last token."""
    init: str = "vocabulary"
    """As lorakit.PromptTuning's."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_length("prefix_length", self.prefix_length, 0)
        check_length("infix_length", self.infix_length, 0)
        check_init(self.init)
        check_kept(self.modules_to_save)
        if not self.prefix_length + self.infix_length:
            raise UsageError("prefix_length and infix_length are both 0: nothing would be trained.")

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        path, body = backbone(model, "prefix-embedding tuning")
        check_room(model, self.prefix_length + self.infix_length, "a prefix and infix")
        tensors = {
            name: begun(body, count, self.init, None, dtype=dtype, generator=generator)
            for name, count in (("prefix", self.prefix_length), ("infix", self.infix_length))
            if count
        }
        insert = Insert(Prompt.on(body, self.prefix_length, self.infix_length), tensors)
        return keep(Draft(inserts={path: {"prompt": insert}}), model, self.modules_to_save)
