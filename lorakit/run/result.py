"""What a run gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A finished (or interrupted) run. model, tokenizer: with the adapter on, ready to use."""

    folder: Path
    summary: dict[str, Any]
    interrupted: bool
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
