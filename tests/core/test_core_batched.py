"""Batches over stacks of pairs: against each token's own product in float64, and bit for bit alone and in a batch."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from lorakit.core.batched import LONG, Plan, Span, Stack, Steps, add_batched_, row_plan

IN, OUT = 24, 40
SCALES = (2.0, 0.7, 5.656854, 1.0, 0.25)


def stack_of(ranks: list[int], dtype: torch.dtype = torch.float32, seed: int = 0, gap: int = 0) -> Stack:
    """A stack of random pairs, adapter k with ranks[k]; gap: rows of no one between two pairs."""
    generator = torch.Generator().manual_seed(seed)
    spans, start = {}, 0
    for adapter, rank in enumerate(ranks):
        spans[adapter] = Span(start, rank, SCALES[adapter % len(SCALES)])
        start += rank + gap
    A = torch.randn(start, IN, generator=generator).to(dtype)
    Bt = torch.randn(start, OUT, generator=generator).to(dtype)
    return Stack(A, Bt, spans, ("test", tuple(ranks), gap))


def run(stack: Stack, segments: list[tuple[int, int]], x: Tensor, y: Tensor, *, strict: bool = False) -> Tensor:
    plan = Plan(segments, strict=strict)
    return add_batched_(y.clone(), x, stack, plan.steps(stack, x), None)


def written_out(stack: Stack, segments: list[tuple[int, int]], x: Tensor, y: Tensor) -> Tensor:
    out, position = y.double(), 0
    for adapter, length in segments:
        for token in range(position, position + length):
            if adapter in stack.spans:
                span = stack.spans[adapter]
                A, Bt = stack.A[span.start : span.end].double(), stack.Bt[span.start : span.end].double()
                out[token] += span.scale * (x[token].double() @ A.t() @ Bt)
        position += length
    return out


def batch(segments: list[tuple[int, int]], seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(length for _, length in segments)
    return (
        torch.randn(tokens, IN, generator=generator).to(dtype),
        torch.randn(tokens, OUT, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("ranks", "segments"),
    [
        ([4], [(0, 1)] * 5),  # one adapter for all
        ([4], [(0, 40)]),
        ([4, 8], [(-1, 3)]),  # none
        ([4, 8, 3], [(0, 1), (1, 1), (-1, 1), (2, 1), (1, 1)]),  # few, decoding, the base between
        ([64, 32, 16, 48], [(k % 4, 1) for k in range(9)]),  # many ranks: gathered, in buckets
        ([8] * 20, [(k, 1) for k in range(20)]),  # one bucket
        ([4, 8], [(0, 30), (1, 1), (-1, 20), (1, 17), (0, 2)]),  # prompts beside decoding
        ([64, 96], [(0, 30), (1, 1), (0, 1)]),
        ([4, 8], [(7, 3), (0, 1)]),  # an adapter without a pair here
    ],
)
def test_each_token_takes_its_own_pair(ranks: list[int], segments: list[tuple[int, int]], strict: bool) -> None:
    stack, (x, y) = stack_of(ranks), batch(segments)
    expected = written_out(stack, segments, x, y)
    torch.testing.assert_close(run(stack, segments, x, y, strict=strict).double(), expected, rtol=1e-5, atol=1e-4)


def test_random_mixtures() -> None:
    rng = random.Random(0)
    for seed in range(60):
        ranks = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 9))]
        segments = [(rng.randrange(-1, len(ranks)), rng.choice((0, 1, 1, 1, 5, LONG, 30))) for _ in range(12)]
        stack, (x, y) = stack_of(ranks, seed=seed, gap=rng.randrange(5)), batch(segments, seed)
        expected = written_out(stack, segments, x, y)
        actual = run(stack, segments, x, y, strict=seed % 2 == 0)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7])
def test_strict_has_the_bits_of_the_request_alone(dtype: torch.dtype, length: int) -> None:
    ranks = [4, 8, 8, 3, 16, 64, 8]
    stack = stack_of(ranks, dtype)
    segments = [(adapter, length) for adapter in (*range(7), *range(7), 3, 3, -1, 1)]
    x, y = batch(segments, dtype=dtype)
    zero = torch.zeros_like(y)
    together = run(stack, segments, x, zero, strict=True)
    for number, (adapter, _) in enumerate(segments):
        rows = slice(number * length, (number + 1) * length)
        alone = run(stack, [(adapter, length)], x[rows], zero[rows], strict=True)
        assert torch.equal(together[rows], alone), (number, adapter)


def test_gains_and_shifts_are_each_adapters_own() -> None:
    stack = stack_of([4, 8, 2])
    generator = torch.Generator().manual_seed(3)
    stack.gains[1] = torch.rand(OUT, generator=generator) + 0.5
    stack.shifts[2] = torch.randn(OUT, generator=generator)
    bias = torch.randn(OUT, generator=generator)
    segments = [(0, 1), (1, 20), (2, 1), (-1, 2), (1, 1)]
    x, y = batch(segments)
    actual = add_batched_(y.clone(), x, stack, Plan(segments).steps(stack, x), bias)
    expected = written_out(stack, segments, x, y)
    owner = list(itertools.chain.from_iterable([adapter] * length for adapter, length in segments))
    for token, adapter in enumerate(owner):
        if adapter == 1:
            expected[token] += ((stack.gains[1] - 1) * (y[token] - bias)).double()
        if adapter == 2:
            expected[token] += stack.shifts[2].double()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_ways_are_the_ones_meant() -> None:
    alike, unlike, many = stack_of([8] * 20), stack_of([8, 3, 4, 8, 5]), stack_of([30, 20, 40, 50, 10])
    like = torch.zeros(1)

    def steps(stack: Stack, *owners: int, strict: bool = False) -> Steps:
        return Plan([(owner, 1) for owner in owners], strict=strict).steps(stack, like)

    ordered = steps(alike, *range(20))
    assert [(one.ordered, one.count, one.depth) for one in ordered.grids] == [(True, 20, 1)]
    assert ordered.mask is None
    assert not ordered.buckets
    pairs = steps(alike, *(k // 2 for k in range(8)))
    assert [(one.ordered, one.count, one.depth) for one in pairs.grids] == [(True, 4, 2)]
    mixed_up = steps(alike, *reversed(range(9)))
    assert [(one.ordered, one.count) for one in mixed_up.grids] == [(False, 9)]
    assert steps(alike, 1, 0).mask is not None  # so little that putting in order costs more
    assert steps(unlike, *range(5)).mask is not None  # more grids than are worth it
    assert len(steps(many, *range(5)).buckets) == 5
    assert [one.count for one in steps(alike, *range(8), strict=True).grids] == [8]
    assert len(steps(alike, *[0, 1] * 4, strict=True).buckets) == 1
    assert steps(alike, 0, 0).alone == alike.spans[0]
    assert len(Plan([(0, LONG), (0, LONG), (1, LONG)]).steps(alike, like).long) == 2
    plan = Plan([(0, 1)])
    assert plan.steps(alike, like) is plan.steps(alike, like)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "owners",
    [
        [*range(12)],
        [*reversed(range(12))],
        [0, 2, 3, 5, 7, 8, 9, 11],  # with holes
        [3, 3, 1, 0, 0, 0, 2, 4, 5, 6, 7, 1],  # unlike numbers of tokens
        [-1, -1, 4, 5, 6, 7, 8, 9, 10, 11],  # tokens of the base before them
        [4, 5, 6, 7, -1, 8, 9, 10, 11, -1],
        [0, 1, 2, 3, 14, 15, 16, 17, 18, 19],  # two grids
        [0, 1, 2, 3, 10, 11, 12, 13, 16, 17, 18, 19, 7],
    ],
)
def test_grids_give_each_token_its_own(owners: list[int], strict: bool) -> None:
    stack = stack_of([4] * 20)
    segments = [(owner, 1) for owner in owners]
    x, y = batch(segments)
    expected = written_out(stack, segments, x, y)
    torch.testing.assert_close(run(stack, segments, x, y, strict=strict).double(), expected, rtol=1e-5, atol=1e-4)
    with_prompt = [*segments, (5, LONG + 3)]
    x, y = batch(with_prompt)
    expected = written_out(stack, with_prompt, x, y)
    torch.testing.assert_close(run(stack, with_prompt, x, y, strict=strict).double(), expected, rtol=1e-5, atol=1e-4)
    if strict:
        zero = torch.zeros_like(y)
        together = run(stack, with_prompt, x, zero, strict=True)
        for token, owner in enumerate(owners):
            own = slice(token, token + 1)
            assert torch.equal(together[own], run(stack, [(owner, 1)], x[own], zero[own], strict=True)), token


def test_what_a_stack_keeps_follows_its_tensors() -> None:
    stack = stack_of([4, 8])
    segments = [(0, 1), (1, 1)]
    x, y = batch(segments)
    plan = Plan(segments)
    add_batched_(y.clone(), x, stack, plan.steps(stack, x), None)
    A, Bt = stack.A * 2, stack.Bt * 3
    stack.replace(A, Bt)
    actual = add_batched_(y.clone(), x, stack, plan.steps(stack, x), None)
    torch.testing.assert_close(actual.double(), written_out(stack, segments, x, y), rtol=1e-5, atol=1e-4)


def test_rows_stand_for_their_neighbours() -> None:
    assert row_plan((1, -1), 6, strict=False).segments == ((1, 3), (-1, 3))


def test_rows_of_no_one_cannot_poison_a_token() -> None:
    stack = stack_of([4, 8])
    x, y = batch([(0, 1), (1, 1)])
    before = run(stack, [(0, 1), (-1, 1)], x, y)
    assert torch.equal(before[1], y[1])
