"""Bad rows, gathered: a user who mends a file wants to see several at once, not one per attempt."""

from collections.abc import Callable

from lorakit.errors import DataError

MOST_SHOWN = 5

OnFault = Callable[[DataError], None]
"""Takes the error of one bad row; raises it, or keeps it so that reading goes on behind the row."""


def raise_at_once(error: DataError) -> None:
    """The strictest `OnFault`: the first bad row ends the reading."""
    raise error


def with_source(error: DataError, source: str) -> DataError:
    """The same error with its source at the front of the message, unless it names one already."""
    if error.source is not None:
        return error
    named = DataError(str(error), source=source)
    named.line, named.field = error.line, error.field
    return named


class Faults:
    """Gathers the errors of bad rows of one source and raises them as one `DataError`.

    Errors are added without a source (it stands once, at the front of the message). The fifth one ends the gathering.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.errors: list[DataError] = []

    def add(self, error: DataError) -> None:
        """Keeps one error. Raises DataError when it is the last that a message shows."""
        self.errors.append(error)
        if len(self.errors) == MOST_SHOWN:
            self.close(stopped=True)

    def close(self, *, stopped: bool = False) -> None:
        """Raises DataError if anything was gathered; its `line` and `field` are those of the first bad row."""
        if not self.errors:
            return
        first = self.errors[0]
        if len(self.errors) == 1:
            message = str(first)
        else:
            listed = "".join(f"\n  - {error}" for error in self.errors)
            message = f"{len(self.errors)} bad rows{' (reading stopped at the last)' if stopped else ''}:{listed}"
        joined = DataError(message)
        joined.line, joined.field = first.line, first.field
        raise with_source(joined, self.source) from first

    def settle(self, good: int) -> int:
        """`close`, where `good` rows were read; returns how many others were left out, here always none."""
        self.close()
        return 0


SPARED = 100
"""Of a source that is known to be published with broken rows, one row in so many may be broken."""


class SparedFaults(Faults):
    """Gathers like `Faults`, but leaves up to one broken row in a hundred out, to be counted and told.

    For published files that every user gets with the same few broken rows and nobody can mend (QQP, SAMSum).
    """

    def add(self, error: DataError) -> None:
        self.errors.append(error)

    def settle(self, good: int) -> int:
        """How many rows were left out beside `good` ones. Raises DataError where they are too many to be those."""
        if len(self.errors) * SPARED > good:
            self.errors = self.errors[:MOST_SHOWN]
            self.close()
        return len(self.errors)
