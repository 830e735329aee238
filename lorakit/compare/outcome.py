"""What one run of a comparison gave, kept in its folder so that no finished run is made twice."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.run.folder import finite
from lorakit.store.files import write_json

FILE = "outcome.json"
DONE, FAILED = "done", "failed"
SHOWN = 400  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """seed, lr: of the run. status: done or failed, `reason` says why. diverged: training itself broke off, and a lower rate may
    help. quality: the metric that is compared (of a search: what it
    is judged by). trained: numbers of the method, a classifier's head aside. step_seconds: mean. adapter_bytes: of its files.
    positions: that its prompts and prefixes take. perplexity: on the general text, afterwards.
    """

    seed: int
    lr: float | None = None
    status: str = DONE
    reason: str | None = None
    diverged: bool = False
    quality: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trained: int | None = None
    steps: int | None = None
    best_step: int | None = None
    step_seconds: float | None = None
    adapter_bytes: int | None = None
    positions: int | None = None
    perplexity: float | None = None
    seconds: float | None = None


def key_of(*facts: Any) -> str:
    """A hash of everything that a result follows from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Kept:
    """The results in the folder of a comparison. retry: count failed ones as not there."""

    def __init__(self, root: Path, *, retry: bool) -> None:
        self.root, self.retry = root, retry

    def read(self, place: str, key: str) -> Any:
        """The result at `place` where it follows from the same facts; None where it has to be made."""
        try:
            found = json.loads((self.root / place / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: it is made again
            return None
        if not isinstance(found, dict) or found.get("key") != key or "result" not in found:
            return None
        result = found["result"]
        return None if self.retry and isinstance(result, dict) and result.get("status") == FAILED else result

    def write(self, place: str, key: str, result: Any) -> None:
        """Written whole or not at all, and last of its run: what is there is finished."""
        write_json(self.root / place / FILE, {"key": key, "result": finite(result)})

    def outcome(self, place: str, key: str, make: Callable[[], Outcome]) -> Outcome:
        """The outcome at `place`, made where it is not there yet."""
        found = self.read(place, key)
        if isinstance(found, dict) and set(found) <= {one.name for one in fields(Outcome)}:
            return Outcome(**found)
        made = make()
        self.write(place, key, asdict(made))
        return made


def told(error: BaseException) -> str:
    """A failure as a reader should see it."""
    words = " ".join(str(error).split())
    kind = "" if isinstance(error, LorakitError) else f"{type(error).__name__}: "
    return (kind + words)[:SHOWN] or type(error).__name__
