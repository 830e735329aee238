"""While one adapter takes all traffic, its update is added to the base's weights, and its layers cost what the base's do.

The base's own parameters are put aside, not changed, and come back, bit for bit, when another adapter (or the base) is asked
for. Only float32 and float64 weights are merged: in half precision the sum is rounded, and greedy tokens could change.
Costs a second copy of the merged weights in memory, so it is for who asks for it (Engine's `merge_after`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import low_rank_kind
from lorakit.attach.site import Site
from lorakit.attach.slots import EMPTY
from lorakit.serve.bank import Bank, Version
from lorakit.serve.rows import Row

EXACT = (torch.float32, torch.float64)


class Merging:
    """after: steps in a row of one adapter alone until it is merged; None = never. All in the thread whose turn it is."""

    def __init__(self, bank: Bank, after: int | None) -> None:
        self.bank, self.after = bank, after
        self.merged: int | None = None
        self.merges = 0
        self._last, self._streak = -1, 0
        self._refused: set[int] = set()
        shared = [id(p) for _, p in bank.model.named_parameters(remove_duplicate=False)]
        self._tied = {one for one in shared if shared.count(one) > 1} if after is not None else set()

    def covers(self, versions: set[Version | None]) -> bool:
        """Called before each step with the adapters in it: whether the weights hold them, and no plan is wanted."""
        if self.after is None:
            return False
        version = next(iter(versions)) if len(versions) == 1 else None
        number = -1 if version is None else version.id
        self._streak = self._streak + 1 if number == self._last else 1
        self._last = number
        if version is None or self.merged not in (None, number):
            self.apart()
            return False
        if self.merged is None and self._streak > self.after and number not in self._refused:
            self._together(version)
        return self.merged == number

    def apart(self) -> None:
        """Put the base's own parameters back."""
        if self.merged is None:
            return
        base, host = self.bank.base, self.bank.host
        for path, parameter in base.aside.items():
            base.modules[path]._parameters["weight"] = parameter
        base.aside = {}
        self._switch(host.sites, on=True)
        self.merged = None

    def _together(self, version: Version) -> None:
        rows = self.bank.rows(version)
        base = self.bank.base
        if not all(self._fits(base.modules[path], row) for path, row in rows.layers.items()):
            self._refused.add(version.id)
            return
        made = {path: _merged(base.modules[path], row) for path, row in rows.layers.items()}
        base.aside = {path: base.modules[path]._parameters["weight"] for path in made}
        for path, weight in made.items():
            base.modules[path]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self._switch(self.bank.host.sites, on=False)
        self.merged = version.id
        self.merges += 1

    def _fits(self, leaf: nn.Module, row: Row) -> bool:
        weight = leaf._parameters["weight"]
        dense = weight is not None and type(weight) is nn.Parameter and weight.dtype in EXACT
        return dense and id(weight) not in self._tied and row.gain is None and row.shift is None

    def _switch(self, sites: dict[str, Site], *, on: bool) -> None:
        """The layers look at the bank's stacks, or are plain."""
        for site in list(sites.values()):  # loads in other threads add to them
            site.active, site.ready = (EMPTY,) if on else (), None


def _merged(leaf: Any, row: Row) -> Tensor:
    kind: Any = low_rank_kind(plain(type(leaf)))
    weight: Tensor = leaf._parameters["weight"].detach()
    A, Bt = row.A.to(weight.device), row.Bt.to(weight.device)
    return weight + kind.weight_delta(leaf, A, Bt, row.scale, weight.dtype)  # type: ignore[no-any-return]
