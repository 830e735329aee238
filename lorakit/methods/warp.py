"""WARP (Hambardzumyan et al. 2021, arXiv 2101.00121): a classifier out of a language model, by trained tokens around the input,
a [MASK] behind them, and a trained verbaliser embedding for each class in place of the vocabulary's.

The model's own head runs up to its last matrix; there the verbaliser's rows stand. While the adapter is on, the language model
is called with texts and class labels and returns a classifier's output: it writes no text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.attach.anatomy import output_head
from lorakit.attach.method import Draft, Insert, Method
from lorakit.attach.operation import Operation, Share
from lorakit.errors import AdapterError, TargetError, UsageError
from lorakit.methods.body import backbone, cache_given, check_ids, check_length, check_room, embedding_of, fresh, named
from lorakit.methods.places import last_real
from lorakit.methods.prompt import Prompt
from lorakit.methods.prompt_tuning import INITS, begun, check_init


@dataclass(frozen=True)
class Warp(Method):
    """`prefix_length` trained tokens, the input, `infix_length` more and a [MASK], whose output is held against the classes'
    embeddings: dim * (prefix + infix + labels) numbers. For models with a language-model head."""

    name: ClassVar[str] = "warp"
    learning_rate: ClassVar[float] = 3.0e-3  # few vectors, which want larger steps than matrices

    labels: int = 2
    """How many classes."""
    mask_token_id: int | None = None
    """The tokenizer's [MASK]; None = one more trained vector stands there (a decoder has no such token)."""
    prefix_length: int = 10
    """Trained tokens before the input."""
    infix_length: int = 10
    """Trained tokens between the input and the [MASK]."""
    verbaliser: Sequence[int] | None = None
    """Ids of one word a class, at whose embeddings the classes' own start; None = at random."""
    init: str = "vocabulary"
    """How the trained tokens start, as lorakit.PromptTuning's. With a mask_token_id and "mask" they start from its embedding,
    as in the paper."""

    def __post_init__(self) -> None:
        check_length("labels", self.labels, 2)
        check_length("prefix_length", self.prefix_length, 0)
        check_length("infix_length", self.infix_length, 0)
        if self.init != "mask":
            check_init(self.init)
        elif self.mask_token_id is None:
            raise UsageError(f"init 'mask' needs mask_token_id; the others are {', '.join(INITS)}.")
        check_ids("verbaliser", self.verbaliser)
        if self.mask_token_id is not None:
            check_length("mask_token_id", self.mask_token_id, 0)
        if self.verbaliser is not None and len(self.verbaliser) != self.labels:
            raise UsageError(
                f"verbaliser names one word for each of the {self.labels} classes, not {list(self.verbaliser)!r}."
            )

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        path, body = backbone(model, "WARP")
        head_path, head = language_head(model, body, path)
        check_room(model, self.prefix_length + self.infix_length + 1, "a prompt")
        table = embedding_of(body)
        self._check_ids(table)
        start = None if self.init != "mask" or self.mask_token_id is None else [self.mask_token_id]
        kind = "random" if self.init == "mask" else self.init
        tensors = {
            name: begun(body, count, kind, start, dtype=dtype, generator=generator)
            for name, count in (
                ("prefix", self.prefix_length),
                ("infix", self.infix_length),
                ("mask", int(self.mask_token_id is None)),
            )
            if count
        }
        around = MaskedPrompt.on(body, self.prefix_length, self.infix_length + 1, mask=self.mask_token_id)
        return Draft(
            inserts={
                path: {"prompt": Insert(around, tensors)},
                head_path: {"verbaliser": Insert(Verbalise(), {"classes": self._classes(head, dtype, generator)})},
                "": {"reading": Insert(ReadMask(), {})},
            }
        )

    def _check_ids(self, table: nn.Embedding) -> None:
        ids = [one for one in (self.mask_token_id, *(self.verbaliser or ())) if one is not None]
        wrong = [one for one in ids if not 0 <= one < table.num_embeddings]
        if wrong:
            raise UsageError(
                f"mask_token_id and verbaliser are ids of the vocabulary, 0 to {table.num_embeddings - 1}, not {wrong[0]!r}."
            )

    def _classes(self, head: nn.Linear, dtype: torch.dtype | None, generator: torch.Generator | None) -> Tensor:
        """(labels, dim)."""
        weight = head.weight.detach()
        if self.verbaliser is None:
            return fresh((self.labels, weight.shape[1]), weight, dtype=dtype, generator=generator, std=0.02)
        return weight[torch.tensor(list(self.verbaliser), device=weight.device)].to(dtype or weight.dtype).clone()


def language_head(model: Any, body: nn.Module, path: str) -> tuple[str, nn.Linear]:
    """(path, matrix) of the language-model head. Raises TargetError where there is none."""
    head = None if path == "" else model.get_output_embeddings()
    size = embedding_of(body).num_embeddings
    found = output_head(model)
    if not isinstance(head, nn.Linear) or head.weight.shape[0] != size or found is None:
        raise TargetError(
            f"WARP reads a [MASK] with a language-model head, and {type(model).__name__} has none that ends in a matrix. Load it "
            "with AutoModelForMaskedLM (or AutoModelForCausalLM)."
        )
    return found, head


@dataclass(frozen=True)
class MaskedPrompt(Prompt):
    """A prompt whose infix ends in a [MASK], the output of which goes to the input's last token."""

    mask: int | None

    @property
    def first(self) -> bool:
        return False

    def vectors(self, module: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        table = embedding_of(module)
        none = table.weight.new_empty(0, table.embedding_dim)
        masked = tensors["mask"] if self.mask is None else table(torch.tensor([self.mask], device=none.device))
        infix = tensors.get("infix", none)
        return tensors.get("prefix", none), torch.cat([infix, masked.to(infix)])


@dataclass(frozen=True)
class Verbalise(Operation):
    """Around the head's last matrix: the classes' embeddings in its place. Tensors: classes (labels, dim)."""

    by_token: ClassVar[bool] = True

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not share.strength:
            return call(*args, **kwargs)
        states = args[0] if args else next(iter(kwargs.values()))
        return F.linear(states, tensors["classes"].to(states))  # rows, tokens, labels


@dataclass(frozen=True)
class ReadMask(Operation):
    """Around the language model: the scores of the classes at the [MASK], (rows, labels), and their loss."""

    by_token: ClassVar[bool] = False

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not share.strength:
            return call(*args, **kwargs)
        from transformers.modeling_outputs import SequenceClassifierOutput

        given = named(module, args, kwargs)
        kept = given.get("logits_to_keep")
        if cache_given(module, given) is not None or isinstance(kept, Tensor) or kept:  # what generation asks for
            raise AdapterError(
                f"{type(module).__name__} is a classifier while its WARP adapter is on, and writes no text. Give it whole "
                "texts, or switch the adapter off with lorakit.use."
            )
        labels, mask = given.pop("labels", None), given.get("attention_mask")
        output = call(**{**given, "return_dict": True})
        scores = output.logits
        _check_labels(labels, scores)
        rows = torch.arange(scores.shape[0], device=scores.device)
        if mask is not None and mask.dim() != 2:
            raise UsageError(
                "WARP reads the last token of each row, which a mask of (rows, tokens) tells: give it one."
            )
        logits = scores[:, -1] if mask is None else scores[rows, last_real(mask) - 1]
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.view(-1))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


def _check_labels(labels: Tensor | None, scores: Tensor) -> None:
    """Raise UsageError unless there is one label a row. scores: (rows, tokens, labels)."""
    if labels is not None and labels.numel() != scores.shape[0]:
        raise UsageError(
            f"WARP classifies: expected labels of shape ({scores.shape[0]},), one class a row from 0 to {scores.shape[-1] - 1}, "
            f"got {tuple(labels.shape)}."
        )
