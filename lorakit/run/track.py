"""Trackers of experiments beside metrics.jsonl: TensorBoard, trackio and Weights & Biases, through accelerate's classes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import RecipeError

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Each tracker and the package that it needs."""
PROJECT = "lorakit"
FOLDER = "tensorboard"
"""Where in a run's folder TensorBoard's files go: `tensorboard --logdir runs` shows all runs below."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a name that is none of PACKAGES, one that is named twice, or a package that is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise RecipeError(f"train.trackers: expected some of {', '.join(PACKAGES)}, came {name!r}.")
        if not _available(name):
            raise RecipeError(
                f"train.trackers names {name}, whose package is not installed: pip install {PACKAGES[name]}. Or leave it out."
            )
    if len(set(names)) < len(names):
        raise RecipeError(f"train.trackers names one of {', '.join(names)} twice.")


def _available(name: str) -> bool:
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    known = {
        "tensorboard": is_tensorboard_available,
        "trackio": is_trackio_available,
        "wandb": is_wandb_available,
    }
    return bool(known[name]())


class Trackers:
    """Sends a run's rows to the trackers that its recipe names; they begin with the first row.

    A tracker that fails (a connection that breaks) is told of once and left alone: the training goes on, and metrics.jsonl
    has every row.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        """settings: of the run, shown beside its curves; sections may be mappings. note: takes a sentence for the user."""
        self.names, self.folder, self.settings, self.note = names, folder, settings, note
        self.running: dict[str, Any] | None = None

    def row(self, row: Mapping[str, float]) -> None:
        """A row of metrics.jsonl; its `step` is the step of the others."""
        if not self.names:
            return
        values = {key: value for key, value in row.items() if key != "step" and value is not None}
        for name in list(self._started()):
            self._try(name, "log", values, step=int(row["step"]))

    def finish(self) -> None:
        """Let each tracker end its run."""
        for name in list(self.running or {}):
            self._try(name, "finish")
        self.running = None

    def _started(self) -> dict[str, Any]:
        if self.running is None:
            self.running = {name: _tracker(name, self.folder) for name in self.names}
            for name in self.names:
                self._try(name, "start")
                self._try(name, "store_init_configuration", flat(self.settings))
        return self.running

    def _try(self, name: str, what: str, *values: Any, **options: Any) -> None:
        tracker = (self.running or {}).get(name)
        if tracker is None:
            return
        try:
            getattr(tracker, what)(*values, **options)
        except Exception as error:  # a foreign service: network, accounts, disks
            del (self.running or {})[name]
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.note(f"the tracker {name} failed ({reason}); the run goes on without it.")


def _tracker(name: str, folder: Path) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker(FOLDER, folder)
    kind = {"trackio": tracking.TrackioTracker, "wandb": tracking.WandBTracker}[name]
    return kind(PROJECT, name=folder.name)


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, bool | int | float | str]:
    """{"train.lr": 1e-4, ..}: the settings one by one, lists as text, without those that are None."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        elif value is not None:
            found[f"{above}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
