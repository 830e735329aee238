"""The errors that lorakit raises on purpose. Each message says what was expected, what came and what to do.

    LorakitError
    ├── UsageError       an argument, a configuration value or a call in the wrong order (also a ValueError)
    │   ├── RecipeError  a key or value of a recipe
    │   └── TargetError  target_modules that match nothing, or match what cannot be adapted
    ├── AdapterError     an unknown or taken adapter name, a change while merged, a switch at the wrong time
    ├── FileError        an adapter's files: missing, damaged, foreign, malicious; `.faults` lists every one
    ├── ModelError       a base model that cannot be found, fetched or trusted
    ├── DataError        a data set, or one row of it; `.source`, `.line` and `.field` say where
    ├── TrainingError    a run that cannot go on (a loss that is not a number, say)
    ├── ServeError       a request that a serving engine does not take, or cannot finish
    │   ├── UnknownAdapterError   no adapter of that name or version is known (HTTP 404)
    │   ├── AdapterLoadingError   it is still loading; `.retry_after` says when to ask again (503)
    │   ├── QueueFullError        as many requests as the limits allow (429 or 503, `.retry_after`)
    │   ├── TooLongError          more tokens than the limits or the model allow (400)
    │   ├── TimedOutError         not done in the time that the limits give (504)
    │   └── WrongKindError        a request that this base or adapter does not answer (400)
    └── OutputError      a place to write that is taken, full or not writable

The command line prints these as one message with exit code 1 and no traceback (2 is for a wrong command line). Anything
else that escapes is a bug in lorakit.
"""

from collections.abc import Sequence


class LorakitError(Exception):
    """Root of every error that lorakit raises on purpose."""


class UsageError(LorakitError, ValueError):
    """An argument, a configuration value or a call in the wrong order."""


class RecipeError(UsageError):
    """A key or value of a recipe."""


class TargetError(UsageError):
    """`target_modules` (or a pattern) that match nothing, or match what cannot be adapted."""


class AdapterError(LorakitError):
    """An unknown or taken adapter name, a change while merged, a switch at the wrong time."""


class Passing(str):
    """A fault of the system that reads a file (no more descriptors, a disk that does not answer), which may soon be over."""


class FileError(LorakitError):
    """An adapter's files are missing, damaged, foreign or malicious. `faults` lists every one found."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        self.faults = list(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(message + lines)

    @property
    def passing(self) -> bool:
        """Whether the same files may be sound when they are read again."""
        return any(isinstance(fault, Passing) for fault in self.faults)


class ModelError(LorakitError):
    """A base model that cannot be found, fetched or trusted."""


class DataError(LorakitError):
    """A data set, or one row of it. `source`, `line` (1-based, as an editor counts) and `field` say where."""

    def __init__(
        self, message: str, *, source: str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        self.source, self.line, self.field = source, line, field
        where = ", ".join(
            part
            for part in (
                source,
                None if line is None else f"line {line}",
                None if field is None else f"field {field!r}",
            )
            if part
        )
        super().__init__(f"{where}: {message}" if where else message)


class TrainingError(LorakitError):
    """A run that cannot go on."""


class OutputError(LorakitError):
    """A place to write that is taken, full or not writable."""


class ServeError(LorakitError):
    """A request that a serving engine does not take, or cannot finish."""


class NotFiniteError(ServeError):
    """The model's output for a request holds NaN or infinity."""


class UnknownAdapterError(ServeError):
    """No adapter of that name or version is known."""


class AdapterLoadingError(ServeError):
    """The adapter is still loading. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class QueueFullError(ServeError):
    """As many requests wait and run as the limits allow. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class TooLongError(ServeError):
    """More tokens than the limits or the model allow."""


class TimedOutError(ServeError):
    """Not done in the time that the limits give."""


class WrongKindError(ServeError):
    """A request that this base, or this adapter, does not answer; the message says what it can do."""
