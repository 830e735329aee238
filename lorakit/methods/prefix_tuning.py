"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190; "prefix-layer" in Hu et al. 2021, section 5.1): keys and values of virtual
positions in front of every attention layer's own (lorakit.methods.prefix), and of more behind the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.method import Draft, Method
from lorakit.errors import UsageError
from lorakit.methods.body import (
    backbone,
    cache_of,
    check_ids,
    check_length,
    check_room,
    embedding_of,
    fresh,
    is_causal,
    unadapted,
)
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.prefix import attentions, heads_of, prefix_draft

STD = 0.02  # of a fresh prefix: small beside a model's own keys and values, so that training starts near the base


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Keys and values of `prefix_length` virtual positions before the prompt and `infix_length` behind it at each layer: 2 *
    layers * width * (prefix + infix) numbers (the paper counts one vector a position: half). PEFT's PREFIX_TUNING folders are
    of this method, without an infix.

    infix_length: seen from a prompt's last token on; it takes no positions. Where a row holds a prompt and its answer
    (training, and generation without the key/value cache, which reads the answer so far as prompt otherwise),
    lorakit.methods.prompt.ends tells where the prompt ends. All tokens of an encoder see it.

    reparametrise: while it is trained, the prefix comes out of an MLP of one hidden layer (Li & Liang, section 4.3); a folder
    holds the result alone, and a loaded adapter is trained further without the MLP.
    """

    name: ClassVar[str] = "prefix-tuning"
    learning_rate: ClassVar[float] = 3.0e-3  # few vectors, which want larger steps than matrices

    prefix_length: int = 20
    """How many virtual positions before the prompt."""
    infix_length: int = 0
    """How many behind it."""
    reparametrise: bool = False
    """Train an MLP that makes the prefix, not the prefix itself."""
    hidden: int | None = None
    """The MLP's width; None = that of the embeddings."""
    tokens: Sequence[int] | None = None
    """Ids of tokens whose keys and values in a decoder the prefix starts from (section 7.4: real words do better)."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_length("prefix_length", self.prefix_length, 0)
        check_length("infix_length", self.infix_length, 0)
        if not self.count:
            raise UsageError("prefix_length and infix_length are both 0: nothing would be trained.")
        check_kept(self.modules_to_save)
        check_ids("tokens", self.tokens)
        if self.hidden is not None:
            check_length("hidden", self.hidden)
            if not self.reparametrise:
                raise UsageError("hidden is the width of the reparametrising MLP: set reparametrise, or leave it out.")
        if self.tokens is not None and (self.reparametrise or self.infix_length or len(self.tokens) != self.count):
            raise UsageError(
                f"tokens gives each of the {self.prefix_length} positions its start, so as many ids are needed, no infix and "
                f"no reparametrise; came {list(self.tokens)!r}."
            )

    @property
    def count(self) -> int:
        """How many keys and values each layer gets."""
        return self.prefix_length + self.infix_length

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        path, body = backbone(model, "prefix tuning")
        check_room(model, self.prefix_length, "a prefix")
        found = attentions(body)
        shapes = {below: heads_of(body, below, one) for below, one in found.items()}
        if self.reparametrise:
            made = self._behind_mlp(body, shapes, dtype, generator)
        elif self.tokens is not None:
            made = _read_from(model, body, list(self.tokens), shapes, dtype)
        else:
            like, count = embedding_of(body).weight, self.count
            made = {
                below: {
                    name: fresh((count, heads * width), like, dtype=dtype, generator=generator, std=STD)
                    for name in ("keys", "values")
                }
                for below, (heads, width) in shapes.items()
            }
        draft = prefix_draft(path, body, self.prefix_length, self.infix_length, shapes, made)
        return keep(draft, model, self.modules_to_save)

    def _behind_mlp(
        self, body: Any, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype | None, generator: Any
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors of each layer: the MLP's first half is one for all, its second is cut into the layers' own rows."""
        like = embedding_of(body).weight
        dim, hidden = like.shape[1], self.hidden or like.shape[1]

        def drawn(*shape: int, **how: float) -> Tensor:
            return fresh(shape, like, dtype=dtype, generator=generator, **how)

        shared = {
            "vectors": drawn(self.count, dim, std=1.0),
            "first_weight": drawn(hidden, dim, bound=dim**-0.5),
            "first_bias": drawn(hidden, bound=dim**-0.5),
        }
        return {
            below: {
                **shared,
                "second_weight": drawn(2 * heads * width, hidden, bound=hidden**-0.5),
                "second_bias": drawn(2 * heads * width, bound=hidden**-0.5),
            }
            for below, (heads, width) in shapes.items()
        }


@torch.no_grad()
def _read_from(
    model: nn.Module, body: Any, ids: list[int], shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """The keys and values that the model has for the tokens, by attention module. Raises UsageError for an encoder."""
    table = embedding_of(body)
    if not is_causal(body):
        raise UsageError("tokens are read by a decoder; an encoder has no keys and values to go on from. Leave it out.")
    if not all(isinstance(one, int) and 0 <= one < table.num_embeddings for one in ids):
        raise UsageError(
            f"tokens must be ids of the model's vocabulary, 0 to {table.num_embeddings - 1}; came {ids!r}."
        )
    if table.weight.is_meta:
        kind = dtype or table.weight.dtype
        return {
            path: {name: torch.empty(len(ids), heads * width, dtype=kind, device="meta") for name in ("keys", "values")}
            for path, (heads, width) in shapes.items()
        }
    mode = body.training
    body.eval()
    try:
        with unadapted(model):
            held = cache_of(body(input_ids=torch.tensor([ids], device=table.weight.device), use_cache=True))
    finally:
        body.train(mode)
    made = {}
    for path, layer in zip(shapes, held.layers, strict=True):
        pair = {"keys": layer.keys, "values": layer.values}  # 1, heads, length, width
        made[path] = {
            name: one[0].transpose(0, 1).flatten(1).to(dtype or one.dtype).contiguous() for name, one in pair.items()
        }
    return made
