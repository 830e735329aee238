"""What is left on the disk of a training that breaks off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from lorakit.errors import OutputError, TrainingError
from lorakit.run.folder import RunFolder
from lorakit.train.loop import Trainer


@contextmanager
def rescued(trainer: Trainer, folder: RunFolder, save: Callable[[], None]) -> Iterator[None]:
    """However training breaks off, try to leave on the disk what it had reached. save: writes the adapter."""
    try:
        yield
    except TrainingError:  # the trainer has put the last good adapter in place
        save()
        raise
    except OutputError as error:
        kept = "Nothing of it could be saved: free some space and start again."
        with suppress(OutputError):
            save()
            kept = f"The adapter as of step {trainer.state.step} is in {folder.adapter}."
        if folder.has_checkpoint():
            kept += " Free some space and go on with --resume."
        raise OutputError(f"{error} {kept}") from error
