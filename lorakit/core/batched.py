"""One batch, many low-rank pairs, without gradients: each token of a step takes the pair of its own adapter.

A layer's pairs stand one below the other in a `Stack`, each with its true rank. A `Plan` says which adapter each token
of a step takes; `Steps`, made once a step and layout and shared by all layers that have it, are the way there:

- one adapter for all tokens: two plain products (Punica's and S-LoRA's kernels have no such case);
- runs of tokens (a prompt): two plain products on each run, a view of the input, no copy;
- single tokens (decoding), few ranks in all: one product with every pair, times a mask of scales, one product back;
- single tokens, many ranks: each token's own pair is gathered (Chen et al., 2023, "Punica", section 4), and multiplied in
  batches of one rank. Strict: always this, so that a token's low-rank part has the bits that it has alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FEW = 128  # ranks up to which one product with every pair beats gathering each token's own
LONG = 16  # tokens from which a run is worth products of its own

Segment = tuple[int, int]  # (adapter, -1 for the base; number of tokens)


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of a stack that one adapter's pair takes, and its scale."""

    start: int
    rank: int
    scale: float

    @property
    def end(self) -> int:
        return self.start + self.rank


class Stack:
    """The low-rank pairs of one layer: A (rows, in), Bt (rows, out).

    spans: adapter -> its rows. key: equal for stacks whose spans are equal, so that layers share what a plan computes.
    gains: adapter -> DoRA's `m / ||W + s B A||`, (out,), with which its rows of Bt are multiplied already; shifts:
    adapter -> what it adds to the bias, (out,).
    """

    def __init__(self, A: Tensor, Bt: Tensor, spans: dict[int, Span], key: object) -> None:
        self.A, self.Bt, self.spans, self.key = A, Bt, spans, key
        self.gains: dict[int, Tensor] = {}
        self.shifts: dict[int, Tensor] = {}
        self._cuts: dict[Segment, tuple[Tensor, Tensor]] = {}

    def cut(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of some rows: A transposed (in, r) and Bt (r, out); kept, for making one costs as much as a small product."""
        views = self._cuts.get((start, end))
        if views is None:
            if len(self._cuts) > 4 * FEW:
                self._cuts.clear()
            views = self._cuts[start, end] = (self.A[start:end].t(), self.Bt[start:end])
        return views

    def replace(self, A: Tensor, Bt: Tensor) -> None:
        """Take larger tensors that hold the same rows."""
        self.A, self.Bt = A, Bt
        self._cuts.clear()


@dataclass
class Tables:
    """The low-rank pairs of an embedding, which are looked up, not multiplied: adapter -> (At (vocab, r), Bt (r, dim))."""

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spans: dict[int, Span] = field(default_factory=dict)
    key: object = None
    gains: dict[int, Tensor] = field(default_factory=dict)  # as in a Stack


@dataclass(slots=True)
class Bucket:
    """Single tokens with pairs of one rank. where: the tokens (n,), None = all; rows: (n r,) of the stack; scales: (n, 1, 1)."""

    where: Tensor | None
    rows: Tensor
    rank: int
    scales: Tensor


@dataclass(slots=True)
class Steps:
    """How a step's tokens reach their pairs in stacks of one layout. See the module."""

    runs: list[tuple[int, int, int]]  # (from, to, adapter) of every token that has one
    alone: Span | None = None
    long: list[tuple[int, int, Span]] = field(default_factory=list)
    window: Segment | None = None
    where: Tensor | None = None  # the tokens of the mask; None = all
    mask: Tensor | None = None  # (n, rows of the window)
    buckets: list[Bucket] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    owner: Tensor | None = None  # (tokens,) positions in `members`; those of no adapter come behind them all


class Plan:
    """Which adapter each token of one step takes, as runs in the tokens' order. Immutable.

    segments: (adapter, number of tokens); strict: see the module.
    """

    def __init__(self, segments: Sequence[Segment], *, strict: bool = False) -> None:
        self.segments, self.strict = tuple(segments), strict
        self.total = sum(length for _, length in self.segments)
        self._steps: dict[object, Steps] = {}

    def steps(self, stack: Stack | Tables, like: Tensor) -> Steps:
        """How this step is computed with stacks of `stack`'s layout, on the device and in the type of `like`."""
        key = (stack.key, like.dtype, like.device)
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = _steps(self, stack.spans, like)
        return found


def _steps(plan: Plan, spans: dict[int, Span], like: Tensor) -> Steps:
    runs = _runs(plan, spans)
    steps = Steps(runs)
    if not runs:
        return steps
    steps.members = list(dict.fromkeys(adapter for _, _, adapter in runs))
    place = {adapter: k for k, adapter in enumerate(steps.members)}
    owners = [len(place)] * plan.total
    for start, end, adapter in runs:
        owners[start:end] = [place[adapter]] * (end - start)
    steps.owner = torch.tensor(owners, device=like.device)
    if not plan.strict and len(runs) == 1 and runs[0][1] - runs[0][0] == plan.total:
        steps.alone = spans[runs[0][2]]
        return steps
    least = 2 if plan.strict else LONG
    steps.long = [(start, end, spans[adapter]) for start, end, adapter in runs if end - start >= least]
    single = [
        (token, spans[adapter]) for start, end, adapter in runs if end - start < least for token in range(start, end)
    ]
    if not single:
        return steps
    window = (min(span.start for _, span in single), max(span.end for _, span in single))
    if plan.strict or window[1] - window[0] > FEW:
        steps.buckets = _buckets(single, plan.total, like)
    else:
        steps.window = window
        steps.where, steps.mask = _mask(single, window, None if steps.long else plan.total, like)
    return steps


def _runs(plan: Plan, spans: dict[int, Span]) -> list[tuple[int, int, int]]:
    """(from, to, adapter): neighbours of one adapter joined, unless strict; those without a pair here left out."""
    runs: list[tuple[int, int, int]] = []
    position = 0
    for adapter, length in plan.segments:
        if adapter in spans and length:
            if runs and not plan.strict and runs[-1][1:] == (position, adapter):
                runs[-1] = (runs[-1][0], position + length, adapter)
            else:
                runs.append((position, position + length, adapter))
        position += length
    return runs


def _mask(
    single: list[tuple[int, Span]], window: Segment, total: int | None, like: Tensor
) -> tuple[Tensor | None, Tensor]:
    """(tokens or None for all, mask). total: the number of all tokens, where all take part; those of no adapter get 0."""
    start, end = window
    rows = [[0.0] * (end - start) for _ in range(len(single) if total is None else total)]
    for k, (token, span) in enumerate(single):
        row = rows[k if total is None else token]
        row[span.start - start : span.end - start] = [span.scale] * span.rank
    mask = torch.tensor(rows, dtype=like.dtype, device=like.device)
    where = torch.tensor([token for token, _ in single], device=like.device) if total is None else None
    return where, mask


def _buckets(single: list[tuple[int, Span]], total: int, like: Tensor) -> list[Bucket]:
    buckets = []
    for rank in dict.fromkeys(span.rank for _, span in single):
        chosen = [(token, span) for token, span in single if span.rank == rank]
        starts = torch.tensor([span.start for _, span in chosen])
        rows = (starts[:, None] + torch.arange(rank)).flatten().to(like.device)
        scales = torch.tensor([span.scale for _, span in chosen], dtype=like.dtype).view(-1, 1, 1).to(like.device)
        everyone = len(chosen) == total
        where = None if everyone else torch.tensor([token for token, _ in chosen], device=like.device)
        buckets.append(Bucket(where, rows, rank, scales))
    return buckets


def add_batched_(y: Tensor, x: Tensor, stack: Stack, steps: Steps, bias: Tensor | None) -> Tensor:
    """Add to y, in place, what each token's adapter adds. y: (tokens, out), contiguous; x: (tokens, in), of y's type.

    bias: the layer's own, which DoRA's gain does not multiply.
    """
    if not steps.runs:
        return y
    if stack.gains or stack.shifts:
        _rescale_(y, stack, steps, bias)
    if steps.alone is not None:
        At, Bt = stack.cut(steps.alone.start, steps.alone.end)
        return y.addmm_(x @ At, Bt, alpha=steps.alone.scale)
    for start, end, span in steps.long:
        At, Bt = stack.cut(span.start, span.end)
        y[start:end].addmm_(x[start:end] @ At, Bt, alpha=span.scale)
    if steps.window is not None and steps.mask is not None:
        At, Bt = stack.cut(*steps.window)
        if steps.where is None:
            y.addmm_((x @ At).mul_(steps.mask), Bt)
        else:
            y.index_add_(0, steps.where, (x[steps.where] @ At).mul_(steps.mask) @ Bt)
    for bucket in steps.buckets:
        _gathered_(y, x, stack, bucket)
    return y


def _gathered_(y: Tensor, x: Tensor, stack: Stack, bucket: Bucket) -> None:
    """Each token times the pair gathered for it."""
    own = x if bucket.where is None else x[bucket.where]
    A = stack.A.index_select(0, bucket.rows).view(len(own), bucket.rank, -1)  # (n, r, in)
    Bt = stack.Bt.index_select(0, bucket.rows).view(len(own), bucket.rank, -1)  # (n, r, out)
    inner = torch.bmm(own[:, None], A.transpose(1, 2)).mul_(bucket.scales)  # (n, 1, r)
    delta = torch.bmm(inner, Bt)[:, 0]
    if bucket.where is None:
        y.add_(delta)
    else:
        y.index_add_(0, bucket.where, delta)


def _rescale_(y: Tensor, stack: Stack, steps: Steps, bias: Tensor | None) -> None:
    """DoRA's gain on the base's product, and what adapters add to the bias, each on its own tokens."""
    zero = y.new_zeros(y.shape[1])
    owner = steps.owner
    if owner is None:
        raise TypeError("steps with runs have owners")
    if any(member in stack.gains for member in steps.members):
        table = torch.stack([stack.gains[m] - 1 if m in stack.gains else zero for m in steps.members] + [zero])
        plain = y if bias is None else y - bias.to(y.dtype)
        y.addcmul_(plain, table.to(y.dtype)[owner])
    if any(member in stack.shifts for member in steps.members):
        table = torch.stack([stack.shifts.get(m, zero) for m in steps.members] + [zero])
        y.add_(table.to(y.dtype)[owner])


def row_plan(index: Sequence[int], rows: int, *, strict: bool) -> Plan:
    """The plan of a batch whose entries each stand for as many of `rows` neighbouring rows."""
    repeat = rows // len(index)
    return Plan([(adapter, repeat) for adapter in index], strict=strict)
