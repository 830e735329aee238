"""The next token of each request, each with settings and random numbers of its own."""

import torch
from torch import Tensor

from lorakit.errors import NotFiniteError
from lorakit.serve.limits import SamplingParams


def likeliest(logits: Tensor) -> tuple[Tensor, list[bool]]:
    """Of logits (n, vocabulary) in fp32: (n,) the likeliest ids, ties to the lower, and whether a row is one to choose from.

    It is not with a NaN or an infinity among its numbers; -inf is an id that may not come, and all cannot be.
    """
    tokens = logits.argmax(-1)  # a NaN counts as the greatest
    return tokens, logits.gather(-1, tokens[:, None])[:, 0].isfinite().tolist()


def drawn(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One id, by nucleus and top-k sampling: the fewest likeliest ids whose probability reaches top_p.

    logits: (vocabulary,), a row that `likeliest` finds one to choose from.
    """
    count = min(params.top_k or logits.numel(), logits.numel())
    scores, ids = logits.topk(count)  # sorted, likeliest first
    below = scores.cpu().double() - float(scores[0])  # first: divided by a tiny temperature, the scores would overflow
    chances = (below / params.temperature).softmax(-1)
    reached = chances.cumsum(-1)
    kept = reached[reached - chances < params.top_p]
    point = torch.rand((), generator=generator, dtype=torch.float64) * kept[-1]
    place = min(int(torch.searchsorted(kept, point, right=True)), len(kept) - 1)
    return int(ids[place])


def no_choice() -> NotFiniteError:
    """What a request fails with that has no row to choose from."""
    return NotFiniteError(
        "no token can be chosen: expected finite logits, came NaN or infinity. The adapter's weights are too large for the "
        "base, or the base's own are damaged. Serve another version."
    )
