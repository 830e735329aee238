"""transformers and the hub talk on the console by default; lorakit says what matters itself."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Only errors in the log, and progress bars only where `progress`; what was set before returns.

    All of the log: transformers imports torchao where that is installed, which tells of each kernel that it cannot load.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    theirs: Any = importlib.import_module("transformers.utils.logging")  # untyped

    verbosity, bars, hub_off = theirs.get_verbosity(), theirs.is_progress_bar_enabled(), are_progress_bars_disabled()
    silenced = logging.root.manager.disable
    theirs.set_verbosity_error()
    logging.disable(max(silenced, logging.WARNING))
    if not progress:
        theirs.disable_progress_bar()  # the hub's with it
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        logging.disable(silenced)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each warns where an environment variable already decides
            if bars:
                theirs.enable_progress_bar()
            if hub_off:
                disable_progress_bars()
