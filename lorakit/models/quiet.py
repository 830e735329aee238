"""transformers and the hub talk on the console by default; lorakit says what matters itself."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Only errors of transformers, and its progress bars only where `progress`; what was set before returns."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped

    verbosity, bars, hub_off = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()  # the hub's with it
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each warns where an environment variable already decides
            if bars:
                logging.enable_progress_bar()
            if hub_off:
                disable_progress_bars()
