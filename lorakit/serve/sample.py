"""The next token of each request, each with settings and random numbers of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.serve.limits import SamplingParams


def next_tokens(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """(n,) from logits (n, vocabulary) in fp32: the likeliest where a request is greedy (temperature 0), else drawn."""
    tokens = logits.argmax(-1)
    for row, (one, generator) in enumerate(zip(params, generators, strict=True)):
        if generator is not None:
            tokens[row] = _drawn(logits[row], one, generator)
    return tokens


def _drawn(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One id, by nucleus and top-k sampling: the fewest likeliest ids whose probability reaches top_p."""
    count = min(params.top_k or logits.numel(), logits.numel())
    scores, ids = logits.topk(count)  # sorted, likeliest first
    chances = (scores.cpu().double() / params.temperature).softmax(-1)
    reached = chances.cumsum(-1)
    kept = reached[reached - chances < params.top_p]
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * kept[-1]
    place = min(int(torch.searchsorted(kept, drawn, right=True)), len(kept) - 1)
    return int(ids[place])
