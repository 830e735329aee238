"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353): `m (W + s B A) / ||W + s B A||`.

The norm is taken per output (the paper's columns, with W as (in, out)); m, of the same length, starts at ||W||, is trained,
and the norm counts as a constant in backward (section 4.3). How it is computed: lorakit.attach.kinds.base.
"""

from typing import ClassVar

import torch
from torch import nn

from lorakit.attach.kinds import LeafKind
from lorakit.attach.method import Pair
from lorakit.core.delta import is_dense, wide
from lorakit.errors import UsageError
from lorakit.methods.variant import Variant


class DoRA(Variant):
    """See the module."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353"

    def check(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> None:
        weight = leaf._parameters["weight"]
        if weight is None or not is_dense(weight):
            raise UsageError(
                f"{path} is quantised, and DoRA needs the lengths of its weight's rows. Leave use_dora out, or load the base "
                "unquantised."
            )
        if pair.A.dim() > 2 and pair.A.shape[1] != weight.shape[1]:
            raise UsageError(
                f"{path}: its A reaches across the groups of the {type(leaf).__name__} (PEFT writes such files), so `W + s B A` "
                "has no rows of W's shape, and DoRA no lengths of them. Train it again with lorakit, or without use_dora."
            )

    def start(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> Pair:
        weight = leaf._parameters["weight"]
        if weight is None or pair.A.is_meta:
            pair.magnitude = torch.empty(kind.shape(leaf)[1], dtype=pair.A.dtype, device="meta")
            return pair
        A, Bt = (factor.to(wide(weight.dtype)) for factor in pair.factors())
        with torch.no_grad():
            pair.magnitude = kind.norms(leaf, A, Bt, pair.scale).to(pair.A.dtype)
        return pair
