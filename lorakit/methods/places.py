"""Where virtual tokens stand among the real ones of a batch: in front of each row, and behind each row's prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """`prefix` virtual tokens, then a row's tokens, with `infix` more of them behind its prompt.

    length: tokens of a row, padding with them. ends: (rows,), the column behind each row's prompt; None = no infix.
    """

    prefix: int
    infix: int
    length: int
    ends: Tensor | None

    @property
    def total(self) -> int:
        """Columns of a row with the virtual tokens in it."""
        return self.prefix + self.length + self.infix

    def place(self, tokens: Tensor, prefix: Tensor, infix: Tensor) -> Tensor:
        """tokens: (rows, length, ...); prefix, infix: (rows or 1, prefix or infix, ...) -> (rows, total, ...)."""
        rows = tokens.shape[0]
        parts = [prefix.expand(rows, *prefix.shape[1:]), tokens, infix.expand(rows, *infix.shape[1:])]
        whole = torch.cat([part.to(tokens.dtype) for part in parts], 1)
        return whole if self.ends is None else _taken(whole, self._order(self.ends))

    def fill(self, tokens: Tensor, value: int) -> Tensor:
        """`place` with the same number for every virtual token. tokens: (rows, length)."""
        return self.place(tokens, tokens.new_full((1, self.prefix), value), tokens.new_full((1, self.infix), value))

    def strip(self, outputs: Tensor, *, first: bool) -> Tensor:
        """(rows, total, dim) -> (rows, length, dim). The last token of a prompt gets its infix's last output, which is what
        predicts the token behind it. first: the first token gets the output of the first virtual one."""
        if self.ends is None:
            own = outputs[:, self.prefix :]
        else:
            own = _taken(outputs, self._kept(self.ends))
        return torch.cat([outputs[:, :1], own[:, 1:]], 1) if first and self.prefix else own

    def _order(self, ends: Tensor) -> Tensor:
        """(rows, total): for each place, its number in prefix, tokens and infix laid end to end."""
        column = torch.arange(self.total - self.prefix, device=ends.device)[None]
        end = ends[:, None]
        behind = self.length + column - end  # which of the infix
        own = torch.where(column < end, column, torch.where(column < end + self.infix, behind, column - self.infix))
        front = torch.arange(self.prefix, device=ends.device).expand(ends.shape[0], -1)
        return torch.cat([front, self.prefix + own], 1)

    def _kept(self, ends: Tensor) -> Tensor:
        """(rows, length): the place whose output each token gets."""
        column = torch.arange(self.length, device=ends.device)[None]
        return self.prefix + column + torch.where(column >= ends[:, None] - 1, self.infix, 0)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values: (rows, n, ...); index: (rows, m) -> (rows, m, ...)."""
    return values[torch.arange(index.shape[0], device=index.device)[:, None], index]


def last_real(mask: Tensor) -> Tensor:
    """The column behind each row's last real token. mask: (rows, length), 0 at padding -> (rows,)."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask != 0) * columns).amax(1)


def first_real(mask: Tensor) -> Tensor:
    """The column of each row's first real token. mask: (rows, length), 0 at padding -> (rows,)."""
    return (mask != 0).long().argmax(1)


def widened(mask: Tensor, count: int, *, queries: bool, causal: bool) -> Tensor:
    """An attention mask over (rows, heads, queries, keys), boolean or added to the scores, with `count` keys in front that
    all see; queries: the virtual tokens ask too, each other only (and, not causal, what any token sees)."""
    boolean = mask.dtype == torch.bool
    shown, hidden = (True, False) if boolean else (0.0, torch.finfo(mask.dtype).min)
    wide = torch.cat([mask.new_full((*mask.shape[:-1], count), shown), mask], -1)
    if not queries:
        return wide
    front = mask.new_full((*mask.shape[:2], count, wide.shape[-1]), hidden)
    front[..., :count] = shown
    if causal:
        later = torch.ones(count, count, dtype=torch.bool, device=mask.device).triu(1)
        front[..., :count].masked_fill_(later, hidden)
    else:
        front[..., count:] = mask.amax(-2, keepdim=True) if not boolean else mask.any(-2, keepdim=True)
    return torch.cat([front, wide], -2)


def visible(queries: int, past: int, prefix: int, device: torch.device) -> Tensor:
    """(1, 1, queries, prefix + past + queries), true where a query of a causal model sees a key, the prefix with it."""
    keys: Any = torch.ones(queries, prefix + past + queries, dtype=torch.bool, device=device)
    return keys.tril(prefix + past)[None, None]  # type: ignore[no-any-return]


def hide_early(mask: Tensor, behind: Tensor, prefix: int, infix: int) -> Tensor:
    """A mask over (rows, heads, queries, prefix + infix + keys) without the infix for the tokens before a prompt's last one.

    behind: (rows,), the column behind each row's prompt, of the queries' own columns.
    """
    early = torch.arange(mask.shape[-2], device=mask.device)[None] < behind[:, None] - 1  # rows, queries
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    whole = mask.expand(behind.shape[0], *mask.shape[1:]).clone()
    whole[..., prefix : prefix + infix].masked_fill_(early[:, None, :, None], hidden)
    return whole
