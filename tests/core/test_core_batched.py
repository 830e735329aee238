"""Batches over stacks of pairs: against each token's own product in float64, and bit for bit alone and in a batch."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from lorakit.core.batched import FEW, LONG, Plan, Span, Stack, add_batched_, row_plan

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
    few, many = stack_of([8] * (FEW // 8)), stack_of([8] * (FEW // 8 + 1))
    like = torch.zeros(1)
    decoding = Plan([(k, 1) for k in range(FEW // 8)]).steps(few, like)
    assert decoding.mask is not None
    assert not decoding.buckets
    gathered = Plan([(k, 1) for k in range(FEW // 8 + 1)]).steps(many, like)
    assert gathered.mask is None
    assert len(gathered.buckets) == 1
    assert Plan([(0, 1), (0, 1)]).steps(few, like).alone == few.spans[0]
    assert len(Plan([(0, LONG), (0, LONG), (1, LONG)]).steps(few, like).long) == 2
    plan = Plan([(0, 1)])
    assert plan.steps(few, like) is plan.steps(few, like)


def test_rows_stand_for_their_neighbours() -> None:
    assert row_plan((1, -1), 6, strict=False).segments == ((1, 3), (-1, 3))


def test_rows_of_no_one_cannot_poison_a_token() -> None:
    stack = stack_of([4, 8])
    x, y = batch([(0, 1), (1, 1)])
    before = run(stack, [(0, 1), (-1, 1)], x, y)
    assert torch.equal(before[1], y[1])
