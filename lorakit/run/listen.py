"""What a run tells while it works. The base class is deaf; the command line draws bars, a notebook may print."""

from collections.abc import Mapping


class Listener:
    """Override what you want to hear. Every method is called from the run's own thread."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` pieces of the current stage."""

    def row(self, row: Mapping[str, float], total_steps: int) -> None:
        """A row of metrics.jsonl was written: a training step or an evaluation."""

    def note(self, text: str) -> None:
        """Something that the user should know."""
