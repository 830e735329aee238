"""What the runs of a comparison share: the data sets, read once, and the base model, loaded once.

Runs in one process on one model can be compared in time. Detaching restores the base bit for bit; that it did is checked
by a hash after every run, and a base that a run left changed is loaded anew.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.api import adapters, detach, use
from lorakit.data import Dataset, PromptExample
from lorakit.data.examples import sample
from lorakit.errors import DataError, TrainingError
from lorakit.models import Loaded


class Base:
    """The one loaded model. What no file gives it (a fresh head, a pooler) is drawn per seed, as a run of its own would, and
    what is drawn afterwards (dropout) goes on from there.
    """

    def __init__(self) -> None:
        self._loaded: Loaded | None = None
        self._hash = ""
        self._draws = False
        self._drawn: dict[int, dict[str, Tensor]] = {}
        self._random: dict[int, Tensor] = {}

    def at(self, seed: int, load: Callable[[], Loaded]) -> Loaded:
        """The base with the fresh values of `seed`. load: loads it, with torch's generator at that seed."""
        if self._loaded is None:
            self._loaded = load()
            self._drawn, self._random = {seed: _fresh(self._loaded)}, {seed: torch.get_rng_state()}
            self._hash = hash_of(self._loaded)
            untouched = torch.equal(self._random[seed], torch.Generator().manual_seed(seed).get_state())
            self._draws = bool(self._loaded.initialised) or not untouched
        if seed not in self._drawn:
            if self._draws:
                self._drawn[seed], self._random[seed] = _fresh(load()), torch.get_rng_state()
            else:  # a second copy of the model is not needed to know what no draw gives
                self._drawn[seed], self._random[seed] = {}, torch.Generator().manual_seed(seed).get_state()
        state = self._loaded.model.state_dict()
        with torch.no_grad():
            for key, value in self._drawn[seed].items():
                state[key].copy_(value)
        torch.manual_seed(seed)  # of every device; then on the CPU what follows the drawing of a head
        torch.set_rng_state(self._random[seed])
        return self._loaded

    def clear(self) -> None:
        """Take off whatever a run left on. Raises TrainingError where the base is not what it was; it is then dropped."""
        if self._loaded is None:
            return
        model = self._loaded.model
        try:
            if adapters(model):
                use(model, None)  # a run that broke off may have left several
                for name in list(adapters(model)):
                    detach(model, name)
            model.zero_grad(set_to_none=True)
            same = hash_of(self._loaded) == self._hash
        except Exception as error:  # whatever state a broken run left: a fresh base has none of it
            self.drop()
            raise TrainingError(f"the base could not be restored ({error}); it is loaded anew.") from error
        if not same:
            self.drop()
            raise TrainingError("the run left the base's weights changed; the base is loaded anew.")

    def drop(self) -> None:
        """Forget the model: the next `at` loads it."""
        self._loaded, self._drawn, self._random = None, {}, {}


def hash_of(loaded: Loaded) -> str:
    """A hash of every weight and buffer that the model's files give."""
    whole = hashlib.sha256()
    fresh = set(loaded.initialised)
    for key, tensor in loaded.model.state_dict().items():
        if key not in fresh and isinstance(tensor, Tensor):
            whole.update(key.encode())
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _fresh(loaded: Loaded) -> dict[str, Tensor]:
    state = loaded.model.state_dict()
    return {key: state[key].detach().clone() for key in loaded.initialised}


def own_parameters(model: nn.Module) -> int:
    """Numbers that the base holds, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(the rows to train on, the rows set aside). Rows of one prompt stay together: an answer that was seen judges nothing.

    Raises DataError where either would be empty.
    """
    units: dict[Any, list[int]] = {}
    for at, example in enumerate(dataset.examples):
        units.setdefault(example.prompt if isinstance(example, PromptExample) else at, []).append(at)
    groups: list[Any] = list(units.values())
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise DataError(
            f"compare.search.holdout = {share} of {len(groups)} prompts leaves nothing to train on. Lower it, or give more "
            "rows",
            source=dataset.source,
        )
    aside = {at for group in sample(groups, count, seed) for at in group}
    parts = [[e for at, e in enumerate(dataset.examples) if (at in aside) is held] for held in (False, True)]
    kept, held = (replace(dataset, examples=tuple(part)) for part in parts)
    return kept, held
