"""The last block only where its output is needed: a classification head reads one position of each example.

Keys and values of the last block come from all positions; its queries, attention output, MLP and norms run on those that
the head reads. The result is that of the whole block, since a position's output reaches the others through nothing but
attention in later blocks, and there are none. (Where the base has dropout, other masks of the same distribution are drawn.)
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.alone import by_token
from lorakit.attach.anatomy import blocks
from lorakit.attach.group import apart
from lorakit.attach.kinds import qualified
from lorakit.data.pack import SEGMENTS, ends
from lorakit.train.loss import Batch, LossSum, Objective
from lorakit.train.prefix import standing_in

ATTENTION = ("eager", "sdpa")  # whose masks are (batch, 1, seq, seq) or None, so that a row of them can be taken


def pruned_objective(objective: Objective, model: nn.Module) -> Objective:
    """The same objective, with the last block run only at the position that the model's head reads.

    It goes outside packed_objective. It is returned as it came where the model is none of HEADS. The block runs whole for
    packed rows of causal models, and while it or its attention carries a hook or an adapter of its own (not one of a layer
    inside).
    """
    head = HEADS.get(_qualified(model))
    if head is None:
        return objective

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        with last_block_pruned(model, batch):
            return objective.loss(model, batch)

    return replace(objective, loss=loss)


@contextmanager
def last_block_pruned(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside the with-statement, `model` on `batch` runs its last block where the head reads; an exception restores it too.

    batch: input_ids, and segments where its rows are packed (the model is then called with what lorakit.train.packed makes
    of it). Does nothing where the model is none of HEADS. Outputs that the head does not read (other positions' hidden
    states) are not those of the whole model.
    """
    head, found = HEADS.get(_qualified(model)), blocks(model)
    fits = head is not None and found is not None and head.fits(model, found[1][-1])
    read = head.read(model, batch) if head is not None and fits else None
    if head is None or found is None or read is None:
        yield
        return
    block = found[1][-1]
    forward = partial(_pruned, block, head, read)
    with _checkpointed(block, forward) as forward, standing_in({block: forward}):
        yield


@contextmanager
def pruned_forward(model: nn.Module) -> Iterator[None]:
    """Inside the with-statement each call of `model` is as in last_block_pruned; its inputs must be named, as it has them."""
    inner = model.forward

    def forward(**inputs: Any) -> Any:
        with last_block_pruned(model, inputs):
            return inner(**inputs)

    with standing_in({model: forward} if _qualified(model) in HEADS else {}):
        yield


def _pruned(block: nn.Module, head: "Head", read: "Read", hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return read.give(head.block(block, read.at, hidden, *args, **kwargs), hidden)


@contextmanager
def _checkpointed(block: Any, forward: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """`forward`, checkpointed where the block is, and the block's own checkpointing off inside the with-statement.

    transformers checkpoints a block's forward (5.23), or its call (5.17), which would look the forward up anew in the backward
    pass, when it is the block's own again.
    """
    if not (block.gradient_checkpointing and block.training):
        yield forward
        return
    checkpoint = block._gradient_checkpointing_func

    def recomputed(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(partial(forward, **kwargs), hidden, *args)  # type: ignore[no-any-return]

    block.gradient_checkpointing = False
    try:
        yield recomputed
    finally:
        block.gradient_checkpointing = True


@dataclass(frozen=True)
class Read:
    """Which positions of a batch are read."""

    at: Tensor
    """(rows, n): n positions of each row; n is 1 but for packed rows."""
    give: Callable[[Tensor, Tensor], Tensor]
    """(the block's output at those positions (rows, n, d), its input (rows, seq, d)) -> what the model goes on with."""


@dataclass(frozen=True)
class Head:
    """How one family's head reads its model, and the forward of its blocks at some positions."""

    read: Callable[[nn.Module, Batch], Read | None]
    """(model, batch) -> what is read; None = it is not known."""
    block: Callable[..., Tensor]
    """block(module, at, hidden_states, ...) -> its output there: (rows, n, d)."""
    attention: str
    """The path of the self-attention inside a block."""

    def fits(self, model: Any, block: nn.Module) -> bool:
        """Whether the block is, for now, just what its class says, and its attention one whose masks are known."""
        config = model.config
        through = [block.get_submodule(self.attention.rpartition(".")[0]), block.get_submodule(self.attention)]
        plain_ones = by_token(model) and all(_untouched(module) for module in (block, *through))
        read = config.output_hidden_states or config.output_attentions
        decodes = getattr(config, "add_cross_attention", False) or (self.block is _bert and config.is_decoder)
        upcast = getattr(config, "reorder_and_upcast_attn", False)
        return plain_ones and not read and not decodes and not upcast and config._attn_implementation in ATTENTION


def _untouched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not {"forward", "_lk_site"} & module.__dict__.keys()


def _qualified(module: nn.Module) -> str:
    return qualified(plain(type(module)))


# -- what the heads read -----------------------------------------------------------------------------------------------


def _first(model: nn.Module, batch: Batch) -> Read:
    """Position 0 of each row, and of packed ones that of each example (lorakit.train.packed hands them to the head)."""
    ids = batch["input_ids"]
    if SEGMENTS not in batch:
        return Read(ids.new_zeros(ids.shape[0], 1), lambda out, _: out)
    segments = batch[SEGMENTS]
    row, column = ends(segments, first=True)
    number = segments[row, column] - 1
    at = ids.new_zeros(ids.shape[0], int(segments.max())).index_put((row, number), column)

    def give(out: Tensor, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden, dtype=out.dtype).index_put((row, column), out[row, number])

    return Read(at, give)


def _last_token(model: Any, batch: Batch) -> Read | None:
    """The rightmost token that is not padding, found as transformers' sequence classifiers find it."""
    if SEGMENTS in batch:
        return None
    ids, pad = batch["input_ids"], model.config.get_text_config().pad_token_id
    places = torch.arange(ids.shape[1], device=ids.device)
    last = ((ids != pad) * places).argmax(-1) if pad is not None else places[-1:].expand(ids.shape[0])
    at = last[:, None]

    def give(out: Tensor, hidden: Tensor) -> Tensor:  # zero elsewhere: the head looks the position up itself
        return torch.zeros_like(hidden, dtype=out.dtype).scatter(1, at[..., None].expand_as(out), out)

    return Read(at, give)


# -- the blocks --------------------------------------------------------------------------------------------------------


def _bert(
    block: Any, at: Tensor, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **kwargs: Any
) -> Tensor:
    """BertLayer and RobertaLayer: (rows, seq, d) -> (rows, n, d)."""
    attention = block.attention.self
    here = _rows(hidden, at)  # (rows, n, d)
    projected = _projected((attention.query, here), (attention.key, hidden), (attention.value, hidden))
    query, key, value = (_heads(one, attention.attention_head_size) for one in projected)
    context = _attend(attention, query, key, value, _mask(attention_mask, at), attention.dropout.p)
    return block.feed_forward_chunk(block.attention.output(context, here))  # type: ignore[no-any-return]


def _llama(
    block: Any,
    at: Tensor,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *_: Any,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """LlamaDecoderLayer: (rows, seq, d) -> (rows, n, d)."""
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    here = _rows(normed, at)
    projected = _projected((attention.q_proj, here), (attention.k_proj, normed), (attention.v_proj, normed))
    query, key, value = (_heads(one, attention.head_dim) for one in projected)
    cos, sin = (one.expand(len(at), -1, -1) for one in position_embeddings)  # (batch, seq, head)
    query, key = _rotated(query, _rows(cos, at), _rows(sin, at)), _rotated(key, cos, sin)
    mask = _causal_mask(at, hidden.shape[1]) if attention_mask is None else _mask(attention_mask, at)
    context = _attend(attention, query, key, value, mask, attention.attention_dropout)
    out = _rows(hidden, at) + attention.o_proj(context)
    return out + block.mlp(block.post_attention_layernorm(out))  # type: ignore[no-any-return]


def _gpt2(
    block: Any,
    at: Tensor,
    hidden: Tensor,
    past: None = None,
    attention_mask: Tensor | None = None,
    *_: Any,
    **kwargs: Any,
) -> Tensor:
    """GPT2Block: (rows, seq, d) -> (rows, n, d). Its q, k and v are one product."""
    attention = block.attn
    query, key, value = (
        _heads(part, attention.head_dim) for part in attention.c_attn(block.ln_1(hidden)).split(attention.split_size, 2)
    )
    query = _rows(query.transpose(1, 2).flatten(2), at).view(*at.shape, -1, attention.head_dim).transpose(1, 2)
    mask = _causal_mask(at, hidden.shape[1]) if attention_mask is None else _mask(attention_mask, at)
    context = _attend(attention, query, key, value, mask, attention.attn_dropout.p)
    out = _rows(hidden, at) + attention.resid_dropout(attention.c_proj(context))
    return out + block.mlp(block.ln_2(out))  # type: ignore[no-any-return]


# -- their parts -------------------------------------------------------------------------------------------------------


def _projected(*calls: tuple[nn.Module, Tensor]) -> list[Tensor]:
    """Each layer on its own input, where lorakit.attach.group expects one input for all."""
    with apart(leaf for leaf, _ in calls):
        return [leaf(x) for leaf, x in calls]


def _heads(x: Tensor, size: int) -> Tensor:
    """(batch, seq, heads * size) -> (batch, heads, seq, size)."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """(rows, seq, d), (rows, n) -> (rows, n, d)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _mask(mask: Tensor | None, at: Tensor) -> Tensor | None:
    """The mask's lines of the queries: (rows or 1, heads or 1, seq, seq) -> (rows, heads or 1, n, seq)."""
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = mask.expand(len(at), -1, -1, -1)
    return mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def _causal_mask(at: Tensor, length: int) -> Tensor:
    """Which keys the queries see where the model was given no mask: (rows, 1, n, seq), boolean."""
    return (torch.arange(length, device=at.device) <= at[..., None])[:, None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (batch, heads, seq, size); cos and sin (batch, seq, size)."""
    from transformers.models.llama.modeling_llama import rotate_half

    return x * cos[:, None] + rotate_half(x) * sin[:, None]  # type: ignore[no-any-return,no-untyped-call]


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The model's own attention over n queries a row: -> (rows, n, heads * size)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[plain(type(attention)).__module__].eager_attention_forward
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    if eager is interface and mask is not None and mask.dtype == torch.bool:  # it adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    share = dropout if attention.training else 0.0
    context, _ = interface(attention, query, key, value, mask, dropout=share, scaling=attention.scaling)
    return context.flatten(2)  # type: ignore[no-any-return]


_FIRST, _LLAMA = Head(_first, _bert, "attention.self"), Head(_last_token, _llama, "self_attn")
_GPT2 = Head(_last_token, _gpt2, "attn")

HEADS: Mapping[str, Head] = {
    "transformers.models.bert.modeling_bert.BertForSequenceClassification": _FIRST,
    "transformers.models.roberta.modeling_roberta.RobertaForSequenceClassification": _FIRST,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaForSequenceClassification": _FIRST,
    "transformers.models.llama.modeling_llama.LlamaForSequenceClassification": _LLAMA,
    "transformers.models.gpt2.modeling_gpt2.GPT2ForSequenceClassification": _GPT2,
}
"""The models whose last block is known, by qualified name."""
