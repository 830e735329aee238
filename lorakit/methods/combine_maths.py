"""The arithmetic of combining low-rank updates of one layer, on stacks of blocks; nothing here knows a model.

A layer has E blocks of its own: 1, or a stack's experts, or a convolution's groups. The update of a block is `scale b^T a`
with a: (r, in) and b: (r, out). A result is (a, b, scale) in the same form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.delta import wide

Result = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Update:
    """One adapter's update of a layer and its weight. a: (E, r, in); b: (E, r, out), in float32 or float64."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float

    @property
    def strength(self) -> float:
        """What stands before `b^T a` in the weighted sum."""
        return self.weight * self.scale


@dataclass(frozen=True)
class Rule:
    """How tensors of one meaning (factors, or full updates) are made one.

    prune: "" keeps all entries; "magnitude" the `density` largest (TIES, section 4.1); "random" a Bernoulli draw's, over
    density (DARE, section 3.1). elect: how the sign of an entry is chosen, by the "total" of the values or the
    "frequency" of their signs, entries of the other sign being left out of a mean (TIES, section 4.2); "" adds all up.
    """

    prune: str = ""
    elect: str = ""
    density: float = 1.0
    generator: torch.Generator | None = None

    def pruned(self, tensor: Tensor) -> Tensor:
        """tensor: (E, ...), each block of which is pruned for itself."""
        if not self.prune or self.density == 1.0:
            return tensor
        if self.prune == "random":
            odds = torch.full(tensor.shape, self.density, dtype=torch.float32, device="cpu")
            return tensor * torch.bernoulli(odds, generator=self.generator).to(tensor) / self.density
        flat = tensor.flatten(1)
        count = max(1, int(self.density * flat.shape[1]))
        mask = torch.zeros_like(flat).scatter_(1, flat.abs().topk(count, dim=1).indices, 1.0)
        return (flat * mask).view(tensor.shape)

    def mixed(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor of n of a shape. The weights come after the election, which is the tensors' own (as in PEFT)."""
        stack = torch.stack(list(tensors))  # (n, E, ...)
        factors = stack.new_tensor(weights).view(-1, *[1] * (stack.dim() - 1))
        if not self.elect:
            return (stack * factors).sum(0)
        signs = stack.sign()
        votes = (stack if self.elect == "total" else signs).sum(0)
        kept = signs == torch.where(votes >= 0, 1.0, -1.0)
        return (stack * factors * kept).sum(0) / kept.sum(0).clamp_min(1)


def concatenated(updates: Sequence[Update]) -> Result:
    """The weighted sum itself, its rank the sum of the ranks. Only A is touched, and not that of the strongest update."""
    scale = max(abs(update.strength) for update in updates) or 1.0
    a = torch.cat([update.a * (update.strength / scale) for update in updates], dim=1)
    return a, torch.cat([update.b for update in updates], dim=1), scale


def truncated_sum(updates: Sequence[Update], r: int) -> Result:
    """The best approximation of rank r of the weighted sum (Eckart, Young 1936), from factors of the ranks' size alone.

    With `A^T = Qa Ra` and `B = Qb Rb` the sum is `Qb (Rb Ra^T) Qa^T`, and the small matrix in the middle has its singular
    values: the (out, in) update is never formed.
    """
    a, b, scale = concatenated(updates)
    qa, ra = torch.linalg.qr(a.transpose(1, 2))  # (E, in, k), (E, k, R)
    qb, rb = torch.linalg.qr(b.transpose(1, 2))
    left, right = _halves(rb @ ra.transpose(1, 2) * scale, r)
    return right @ qa.transpose(1, 2), (qb @ left).transpose(1, 2), 1.0


def on_factors(updates: Sequence[Update], rule: Rule) -> Result:
    """The rule on the A's and on the B's. Smaller ranks get zero directions, which no rule counts.

    An update's scaling is split between its factors, so that unlike scalings are compared as they act.
    """
    rank = max(update.a.shape[1] for update in updates)
    scale = max(abs(update.scale) for update in updates) or 1.0
    shares = [math.sqrt(abs(update.scale) / scale) for update in updates]
    roots = [math.sqrt(abs(update.weight)) for update in updates]
    many_a, many_b = [], []
    for update, share in zip(updates, shares, strict=True):
        pruned = rule.pruned(update.a * math.copysign(share, update.scale))
        many_a.append(torch.nn.functional.pad(pruned, (0, 0, 0, rank - pruned.shape[1])))
    for update, share in zip(updates, shares, strict=True):
        pruned = rule.pruned((update.b * share).transpose(1, 2))
        many_b.append(torch.nn.functional.pad(pruned, (0, rank - pruned.shape[2])))
    signed = [math.copysign(root, update.weight) for root, update in zip(roots, updates, strict=True)]
    return rule.mixed(many_a, signed), rule.mixed(many_b, roots).transpose(1, 2), scale


def on_updates(updates: Sequence[Update], rule: Rule, r: int) -> Result:
    """The rule on the full updates, as the papers mean it, and the best approximation of rank r of what comes out."""
    deltas = [rule.pruned(update.b.transpose(1, 2) @ update.a * update.scale) for update in updates]
    left, right = _halves(rule.mixed(deltas, [update.weight for update in updates]), r)
    return right, left.transpose(1, 2), 1.0


def _halves(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(E, m, r) and (E, r, n) whose product is the best of rank r, the singular values shared between them."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:, :r].sqrt()
    return u[:, :, :r] * root[:, None, :], root[:, :, None] * vh[:, :r]


def widest(tensors: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """(the type that holds every tensor's values, the type to compute in)."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype, wide(dtype)
