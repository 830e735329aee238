"""What tells the sources of a run from changed ones, so that a result is not taken for one of theirs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lorakit.run.recipe import Recipe


def stamp(sources: Sequence[str | None]) -> list[str]:
    """A file's bytes, a folder's names, sizes and times; of what is no path (a packaged name, a hub id) the name alone."""
    return [_stamp(source) for source in sources if source is not None]


def sources_of(recipe: Recipe) -> list[str | None]:
    """What a run reads: its data sets, its base, the adapter that it starts from."""
    data = recipe.data
    return [data.train, data.eval, data.test, recipe.model, recipe.start_from]


def _stamp(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
    facts = [(str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if files else source
