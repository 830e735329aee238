"""Adapted layers that share an input: the first that is called computes the outputs of all in one autograd node.

The others take theirs when they are called on the very same tensor, unchanged, in the same thread. What nobody takes
(a forward that calls only some of them) makes the group fall apart: from then on each runs alone. Only where gradients
are recorded, and never under torch.compile.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor, nn

from lorakit.attach.site import Site
from lorakit.core.siblings import Member, low_rank_siblings


class Group:
    """See the module. members: leaf and site of each layer, in the order in which their parent calls them."""

    def __init__(self, members: Sequence[tuple[nn.Module, Site]]) -> None:
        self.members = tuple(members)
        self.whole = True
        self._kept: dict[int, Tensor] = {}  # id of a leaf -> its output on _input
        self._input: weakref.ref[Tensor] | None = None
        self._version = self._thread = 0

    def taken(self, leaf: nn.Module, x: Tensor) -> Tensor | None:
        """The leaf's output, where it was computed with another member's on this very x."""
        if not self._kept:
            return None
        same = self._input is not None and self._input() is x and self._version == x._version
        if same and self._thread == get_ident():
            return self._kept.pop(id(leaf), None)
        self.whole = False  # someone did not come for what was computed
        self._kept.clear()
        return None

    def computed(
        self, leaf: nn.Module, x: Tensor, members: Sequence[tuple[nn.Module, Member]], dropout: float
    ) -> Tensor:
        """The leaf's output on x; the other members' are kept for them."""
        site: Site = leaf._lk_site  # type: ignore[assignment]
        outputs = low_rank_siblings(x, [member for _, member in members], dropout, site.mark, site.epoch)
        return self.keep(leaf, x, [other for other, _ in members], outputs)

    def keep(self, leaf: nn.Module, x: Tensor, leaves: Sequence[nn.Module], outputs: Sequence[Tensor]) -> Tensor:
        """The leaf's output of those that were computed on x for `leaves`; the others' are kept for them."""
        self._kept = {id(other): y for other, y in zip(leaves, outputs, strict=True)}
        self._input, self._version, self._thread = weakref.ref(x), x._version, get_ident()
        return self._kept.pop(id(leaf))


@contextmanager
def apart(leaves: Iterable[nn.Module]) -> Iterator[None]:
    """Within, each of `leaves` computes alone: their caller gives them unlike inputs."""
    sites = [leaf.__dict__["_lk_site"] for leaf in leaves if "_lk_site" in leaf.__dict__]
    groups = {id(site.group): site.group for site in sites if site.group is not None and site.group.whole}
    try:
        for group in groups.values():
            group.whole = False
        yield
    finally:
        for group in groups.values():
            group.whole = True
