"""Subspaces of updates beside each other: two adapters (Figures 3, 4, 6, 7), layers of one, an update and its weight (8)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.analyze.spectrum import Directions, directions
from lorakit.analyze.subspace import random_basis, random_similarity, similarity
from lorakit.analyze.updates import Update
from lorakit.errors import UsageError

SHOWN = 64  # directions of either side in a kept grid; the paper's figures show as many
WIDE, WIDEST = 16, 256  # the weight's directions that stand beside an update: so many times its rank, and at most
KINDS, LAYERS = 8, 4  # types of matrices, and layers, of which grids are kept
TOGETHER = 8  # directions that are compared between layers


@dataclass(frozen=True)
class Grid:
    """Similarities and their control between Gaussian matrices of the same shapes.

    what: "adapters" or "mean" (of all layers; between two adapters), "weight" (rows: dW, columns: W) or "layers" (rows and
    columns are layers, numbered by `layers`). phi, control: (i, j).
    """

    what: str
    kind: str
    layer: int | None
    phi: Tensor
    control: Tensor
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Match:
    """One module of two adapters: phi of the first directions, and of as many as the smaller rank has; its control."""

    path: str
    rank: int
    other_rank: int
    first: float
    whole: float
    random: float


def compare(ours: Sequence[Update], theirs: Sequence[Update]) -> tuple[list[Match], list[Grid]]:
    """Two adapters, module by module, by their right-singular vectors (the inputs that they read). Modules of one alone and
    updates that are zero are left out. Raises UsageError where the adapters share nothing, or are of unlike bases."""
    others = {update.path: update for update in theirs}
    shared = [(update, others[update.path]) for update in ours if update.path in others]
    _check(ours, theirs, shared)
    matches: list[Match] = []
    grids: dict[str, list[tuple[int | None, Tensor, int]]] = {}
    for one, two in shared:
        first, second = directions(one).right, directions(two).right
        if not first.shape[1] or not second.shape[1]:
            continue
        phi = similarity(first, second)
        matches.append(_match(one.path, phi, one.shape[1]))
        grids.setdefault(one.kind, []).append((one.layer, phi[:SHOWN, :SHOWN], one.shape[1]))
    return matches, _kept(grids)


def _check(ours: Sequence[Update], theirs: Sequence[Update], shared: Sequence[tuple[Update, Update]]) -> None:
    if not shared:
        raise UsageError(
            f"the adapters share no module: the first has {ours[0].path}, ..., the second {theirs[0].path}, .... Expected two "
            "of one base."
        )
    unlike = [one.path for one, two in shared if one.shape != two.shape]
    if unlike:
        raise UsageError(f"the adapters are of unlike bases: {', '.join(unlike[:3])} have other widths in each.")


def _match(path: str, phi: Tensor, width: int) -> Match:
    i, j = phi.shape
    k = min(i, j)
    random = float(random_similarity(width, k, k)[-1, -1])
    return Match(path, i, j, float(phi[0, 0]), float(phi[k - 1, k - 1]), random)


def _kept(grids: Mapping[str, list[tuple[int | None, Tensor, int]]]) -> list[Grid]:
    """The mean over the layers of each type, and the grids of some layers."""
    kept: list[Grid] = []
    for kind, group in grids.items():
        i, j = (min(phi.shape[side] for _, phi, _ in group) for side in (0, 1))
        mean = torch.stack([phi[:i, :j] for _, phi, _ in group]).mean(0)
        kept.append(Grid("mean", kind, None, mean, random_similarity(group[0][2], i, j)))
    for kind in list(grids)[:KINDS]:
        for layer, phi, width in spread(grids[kind]):
            kept.append(Grid("adapters", kind, layer, phi, random_similarity(width, *phi.shape)))
    return kept


def spread(items: Sequence[tuple[int | None, Tensor, int]]) -> list[tuple[int | None, Tensor, int]]:
    """The first, the last and some between, as the paper shows layers 1, 32, 64 and 96."""
    last = len(items) - 1
    return [items[at] for at in sorted({round(last * step / (LAYERS - 1)) for step in range(LAYERS)})]


def between_layers(found: Iterable[tuple[Update, Directions]]) -> list[Grid]:
    """phi(k, k) between the layers of each type of matrix, k the smallest of their ranks, at most TOGETHER."""
    kinds: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
    for update, own in found:
        if update.layer is not None and not update.is_part and own.values.numel():
            group = kinds.setdefault((update.kind, update.shape[1]), [])
            group.append((update.layer, own.right[:, :TOGETHER].clone()))
    grids = []
    for (kind, width), group in kinds.items():
        group = sorted(dict(group).items())
        k = min(basis.shape[1] for _, basis in group)
        if len(group) > 1:
            bases = torch.stack([basis[:, :k] for _, basis in group])
            drawn = torch.stack([random_basis(width, k, 100 + at) for at in range(len(group))])
            layers = tuple(layer for layer, _ in group)
            grids.append(Grid("layers", kind, None, _all_pairs(bases), _all_pairs(drawn), layers))
    return grids


def _all_pairs(bases: Tensor) -> Tensor:
    """phi(k, k) of each with each. bases: (L, n, k) -> (L, L)"""
    count, _, k = bases.shape
    flat = bases.transpose(0, 1).reshape(bases.shape[1], count * k)
    squares = (flat.t() @ flat).square().view(count, k, count, k)
    return (squares.sum((1, 3)) / k).clamp(0, 1)


def with_weight(update: Update, found: Directions, own: Directions) -> Grid:
    """Figure 8: the update's right-singular vectors (rows) beside the weight's (columns)."""
    first, second = found.right[:, :SHOWN], own.right[:, : min(WIDE * found.values.numel(), WIDEST)]
    control = random_similarity(update.shape[1], first.shape[1], second.shape[1])
    return Grid("weight", update.kind, update.layer, similarity(first, second), control)
