"""One batch, many low-rank pairs, without gradients: each token of a step takes the pair of its own adapter.

A layer's pairs stand one below the other in a `Stack`, each with its true rank. A `Plan` says which adapter each token
of a step takes; `Steps`, made once a step and layout and shared by all layers that have it, are the way there (computed
in lorakit.core.ways):

- one adapter for all tokens: two plain products (Punica's and S-LoRA's kernels have no such case);
- runs of tokens (a prompt): two plain products on each run, a view of the input, no copy;
- single tokens (decoding) of adapters of one rank that stand side by side: a `Grid`, two batched products over views of
  the stack, so that each pair is read once and nothing is copied but, where they are out of order, the tokens;
- single tokens of few, unlike ranks: one product with every pair, times a mask of scales, one product back;
- of many, unlike ranks: each token's own pair is gathered (Chen et al., 2023, "Punica", section 4), and multiplied in
  batches of one rank.

Strict: a token is multiplied in a batch of matrices, in a grid or gathered, and so has the bits that it has alone. A run of
tokens has those that it has alone as a run of this length: cut in two, its last bits may be others, as in any product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lorakit.core.ways import Bound, Bucket, Grid, gathered, masked, rescaled, run

FEW = 128  # ranks up to which one product with every pair beats gathering each token's own
LONG = 16  # tokens from which a run is worth products of its own
LITTLE = 512  # tokens times ranks below which a mask costs less than putting tokens in order for a grid
GRIDS = 3  # more than so many in one step cost more than the other ways
LAYOUTS = 64  # of stacks for which a plan keeps its steps
BOUNDS = 4  # steps for which a stack keeps its views (and, with DoRA, tables)

Segment = tuple[int, int]  # (adapter, -1 for the base; number of tokens)
Single = tuple[int, "Span"]  # (token, its pair's rows)


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
        self._bound: dict[Steps, Bound] = {}

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
        self._bound.clear()

    def bound(self, steps: "Steps") -> Bound:
        """What the steps compute with this stack; kept, for the step of the next token is mostly the same."""
        found = self._bound.get(steps)
        if found is None:
            if len(self._bound) >= BOUNDS:
                self._bound.clear()
            found = self._bound[steps] = _bound(self, steps)
        return found


@dataclass
class Tables:
    """The low-rank pairs of an embedding, which are looked up, not multiplied: adapter -> (At (vocab, r), Bt (r, dim))."""

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spans: dict[int, Span] = field(default_factory=dict)
    key: object = None
    gains: dict[int, Tensor] = field(default_factory=dict)  # as in a Stack


@dataclass(slots=True, eq=False)
class Steps:
    """How a step's tokens reach their pairs in stacks of one layout. See the module."""

    runs: list[tuple[int, int, int]]  # (from, to, adapter) of every token that has one
    alone: Span | None = None
    long: list[tuple[int, int, Span]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
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
            if len(self._steps) >= LAYOUTS:
                self._steps.clear()
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
    way = _strictly if plan.strict else _freely
    way(steps, single, plan.total, like)
    return steps


def _strictly(steps: Steps, single: list[Single], total: int, like: Tensor) -> None:
    """Each adapter's first token in a grid, where there are few of those and that is most; what is left gathered."""
    first = [(token, span) for span, token in {span: token for token, span in reversed(single)}.items()]
    blocks = _blocks(first)
    if len(blocks) <= GRIDS and 4 * len(first) >= 3 * len(single):
        steps.grids = [_grid(block, total, like, strict=True) for block in blocks]
        single = [one for one in single if one not in first]
    steps.buckets = _buckets(single, total, like)


def _freely(steps: Steps, single: list[Single], total: int, like: Tensor) -> None:
    if not single:
        return
    window = (min(span.start for _, span in single), max(span.end for _, span in single))
    rows = window[1] - window[0]
    grids = [_grid(block, total, like, strict=False) for block in _blocks(single)]
    ordered = len(grids) == 1 and grids[0].ordered
    few = rows <= FEW
    if ordered or (len(grids) <= GRIDS and not (few and rows * len(single) < LITTLE)):
        steps.grids = grids
    elif few:
        steps.window = window
        steps.where, steps.mask = _mask(single, window, None if steps.long else total, like)
    else:
        steps.buckets = _buckets(single, total, like)


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


def _mask(single: list[Single], window: Segment, total: int | None, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """(tokens or None for all, mask). total: the number of all tokens, where all take part; those of no adapter get 0."""
    start, end = window
    rows = [[0.0] * (end - start) for _ in range(len(single) if total is None else total)]
    for k, (token, span) in enumerate(single):
        row = rows[k if total is None else token]
        row[span.start - start : span.end - start] = [span.scale] * span.rank
    mask = torch.tensor(rows, dtype=like.dtype, device=like.device)
    where = torch.tensor([token for token, _ in single], device=like.device) if total is None else None
    return where, mask


def _buckets(single: list[Single], total: int, like: Tensor) -> list[Bucket]:
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


def _blocks(single: list[Single]) -> list[list[Single]]:
    """The tokens, by the rows of their pairs, cut so that those of each part have one rank and stand side by side.

    Rows of another's between two of them are crossed where they are no more than those of a pair: a grid passes over them.
    """
    blocks: list[list[Single]] = []
    first = last = None
    for token, span in sorted(single, key=lambda one: (one[1].start, one[0])):
        side_by_side = (
            first is not None
            and last is not None
            and span.rank == first.rank
            and (span.start - first.start) % span.rank == 0
            and span.start - last.end <= span.rank
        )
        if not side_by_side:
            blocks.append([])
            first = span
        blocks[-1].append((token, span))
        last = span
    return blocks


def _grid(block: list[Single], total: int, like: Tensor, *, strict: bool) -> Grid:
    first, rank = block[0][1].start, block[0][1].rank
    lines: list[list[Single]] = [[] for _ in range((block[-1][1].end - first) // rank)]
    for token, span in block:
        lines[(span.start - first) // rank].append((token, span))
    depth = max(len(line) for line in lines)
    tokens = [token for token, _ in block]
    full = len(tokens) == depth * len(lines)
    ordered = full and tokens == list(range(tokens[0], tokens[-1] + 1))
    scales = {span.scale for _, span in block}
    made = Grid(first, rank, len(lines), depth)
    if strict or len(scales) > 1:
        column = [line[0][1].scale if line else 0.0 for line in lines]
        made.scales = torch.tensor(column, dtype=like.dtype, device=like.device).view(-1, 1, 1)
    else:
        made.scale = scales.pop()
    if ordered:
        made.ordered, made.tokens = True, None if len(tokens) == total else (tokens[0], tokens[-1] + 1)
        return made
    places = {token: k * depth + j for k, line in enumerate(lines) for j, (token, _) in enumerate(line)}
    take = [tokens[0]] * (depth * len(lines))  # a place of no token is given one, whose product no one takes
    for token, place in places.items():
        take[place] = token
    chosen = sorted(tokens)
    made.take = torch.tensor(take, device=like.device)
    made.back = torch.tensor([places[token] for token in chosen], device=like.device)
    made.where = None if len(chosen) == total else torch.tensor(chosen, device=like.device)
    return made


def _bound(stack: Stack, steps: Steps) -> Bound:
    made = Bound()
    if not steps.runs or steps.owner is None:
        return made
    gains = _table(stack.gains, steps.members, stack, 1)
    shifts = _table(stack.shifts, steps.members, stack, 0)
    if gains is not None or shifts is not None:
        made.rescale = partial(rescaled, gains, shifts, steps.owner)
    if steps.alone is not None:
        one = Grid(steps.alone.start, steps.alone.rank, 1, len(steps.owner), steps.alone.scale, ordered=True)
        made.ways.append(one.bound(stack.A, stack.Bt))
    for start, end, span in steps.long:
        made.ways.append(partial(run, start, end, *stack.cut(span.start, span.end), span.scale))
    made.ways += [one.bound(stack.A, stack.Bt) for one in steps.grids]
    if steps.window is not None and steps.mask is not None:
        made.ways.append(partial(masked, *stack.cut(*steps.window), steps.mask, steps.where))
    made.ways += [partial(gathered, stack.A, stack.Bt, bucket) for bucket in steps.buckets]
    return made


def _table(own: dict[int, Tensor], members: list[int], stack: Stack, neutral: int) -> Tensor | None:
    """(members + 1, out): a row a member, less `neutral`, and one of zeros for tokens of none; None where no one has any."""
    if not any(member in own for member in members):
        return None
    zero = stack.Bt.new_zeros(stack.Bt.shape[1])
    rows = [(own[member] - neutral).to(zero.dtype) if member in own else zero for member in members]
    return torch.stack([*rows, zero])


def add_batched_(y: Tensor, x: Tensor, stack: Stack, steps: Steps, bias: Tensor | None) -> Tensor:
    """Add to y, in place, what each token's adapter adds. y: (tokens, out), contiguous; x: (tokens, in), of y's type.

    bias: the layer's own, which DoRA's gain does not multiply.
    """
    stack.bound(steps).add_(y, x, bias)
    return y


def row_plan(index: Sequence[int], rows: int, *, strict: bool) -> Plan:
    """The plan of a batch whose entries each stand for as many of `rows` neighbouring rows."""
    repeat = rows // len(index)
    return Plan([(adapter, repeat) for adapter in index], strict=strict)
