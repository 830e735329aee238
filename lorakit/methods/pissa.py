"""Starts that are taken out of the base: PiSSA and OLoRA. The pair begins as a part of W, and W keeps the rest.

    PiSSA (Meng et al. 2024, arXiv 2404.02948, section 3): the r largest singular directions
    OLoRA (Buyukakyuz 2024, arXiv 2406.01775): the first r rows and columns of W = Q R

The papers write the residual `W - s B0 A0` into the base. Here the base stays as it is, bit for bit, and the adapter
computes `W + s (B A - B0 A0)`: the same function and the same gradients, while other adapters on the base, detach and
quantisation never see a changed W, and a bfloat16 base is not rounded a second time. On disk it is the ordinary pair of
rank 2 r (as PEFT's path_initial_model_for_weight_conversion writes).
"""

import re
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.kinds import LeafKind, LinearKind
from lorakit.attach.method import Pair
from lorakit.core.delta import is_dense
from lorakit.errors import UsageError
from lorakit.methods.variant import Variant, dense_weight

NITER = re.compile(r"pissa_niter_(\d+)")


class FromBase(Variant):
    """A start that is a rank-r part of the base's weight."""

    def check(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> None:
        weight = leaf._parameters["weight"]
        if not pair.scale > 0:
            raise UsageError(
                f"{path}: a start from the weight's own directions takes an alpha above 0; this makes a scale of {pair.scale:g}."
            )
        if not isinstance(kind, LinearKind) or weight is None or not is_dense(weight) or pair.parts is not None:
            raise UsageError(
                f"{path} ({type(leaf).__name__}) cannot start from its weight's own directions: that takes a whole, dense linear "
                "layer. Leave it out with exclude_modules, or use init='kaiming'."
            )

    def start(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> Pair:
        if not pair.A.is_meta:
            A, B = self.factors(dense_weight(leaf, kind), pair.A.shape[0], pair.scale)
            pair.A, pair.Bt = A.to(pair.A.dtype).contiguous(), B.t().to(pair.Bt.dtype).contiguous()
        pair.fixed_a, pair.fixed_bt = pair.A.clone(), pair.Bt.clone()
        return pair

    @abstractmethod
    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) with `scale * B A` the part of `weight`, (out, in), that the adapter starts as."""


class PiSSA(FromBase):
    """niter: subspace iterations of the fast randomised decomposition; None = the full one."""

    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2404.02948"

    def __init__(self, niter: int | None = None) -> None:
        self.niter = niter

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        if self.niter is None:
            V, S, Uh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(0)  # its sketch is drawn from the global generator, whatever stands there
                V, S, U = torch.svd_lowrank(weight, r, niter=self.niter)
            Uh = U.t()
        root = (S[:r] / scale).sqrt()
        return root[:, None] * Uh[:r], V[:, :r] * root


class OLoRA(FromBase):
    """See the module."""

    paper: ClassVar[str] = "Buyukakyuz 2024, arXiv 2406.01775"

    def factors(self, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]


def from_base(init: str) -> FromBase | None:
    """The variant that `init` names ("pissa", "pissa_niter_16", "olora"); None where it names another start."""
    fast = NITER.fullmatch(init)
    if fast:
        return PiSSA(int(fast[1]))
    return {"pissa": PiSSA, "olora": OLoRA}[init]() if init in ("pissa", "olora") else None
