"""A held-out general text, and how well the model still predicts it: what an adaptation made it forget."""

from pathlib import Path
from typing import Any

from lorakit.compare.config import GeneralConfig
from lorakit.data import Encoded
from lorakit.errors import DataError
from lorakit.generate import perplexity
from lorakit.models import Loaded
from lorakit.models.limits import longest_row


def general_rows(config: GeneralConfig, loaded: Loaded) -> list[Encoded]:
    """The text's first tokens in windows, every token but each window's first a target; [] where there is no text.

    Raises DataError where it cannot be read or is too short.
    """
    if config.text is None:
        return []
    try:
        text = Path(config.text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as a text: {error}", source=config.text) from error
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: config.tokens]
    longest = longest_row(loaded.model, loaded.tokenizer)
    # Half of the positions at the most: a prefix takes some of them.
    window = config.window if longest is None else min(config.window, max(2, longest // 2))
    rows = [ids[start : start + window] for start in range(0, len(ids), window)]
    kept = [Encoded(row, row, line + 1) for line, row in enumerate(rows) if len(row) > 1]
    if not kept:
        raise DataError(f"holds {len(ids)} tokens; at least 2 are needed to measure a perplexity", source=config.text)
    return kept


def general_perplexity(model: Any, rows: list[Encoded]) -> float | None:
    """The perplexity on `general_rows`; None where there are none."""
    return perplexity(model, rows, batch_size=8) if rows else None
