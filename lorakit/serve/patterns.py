"""An adapter's regular expressions, tried out before they are used: one can be written so that it never ends.

Python matches without letting go of its lock, so such a one would stop the whole server, not the load alone. What has no
repeats, groups or classes is harmless; all else is matched first in a process of its own, whose time is bounded.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import FileError
from lorakit.store.layout import TENSORS
from lorakit.store.peft_config import CONFIG

SECONDS = 2  # of computing, for all patterns of an adapter on all modules of a model
PATIENCE = 60.0  # seconds, on a machine that is busy
MORE = 1024  # names that a configuration may list beyond one for each module of the model and layer of the file
HARMLESS = re.compile(r"[^()\[\]{}*+?]*")
FORMS = ("{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(\d+)\.")  # as lorakit.attach.targets uses them

PROGRAM = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
patterns, paths, forms = json.load(sys.stdin)
for pattern in patterns:
    for form in forms:
        try:
            found = re.compile(form.replace("{{}}", pattern))
        except Exception:
            continue  # whoever uses it says so
        for path in paths:
            found.match(path)
            found.fullmatch(path)
"""


class Tried:
    """The expressions that were tried on a model's modules. paths: their names. Safe in several threads."""

    def __init__(self, paths: Collection[str] = ()) -> None:
        self._paths = frozenset(paths)
        self._fine: set[str] = set()

    def check(self, folder: Path) -> None:
        """Raise FileError where an adapter's configuration has more names than the model, or expressions that take too long.

        To be called before the folder is read as an adapter. What else is wrong with its files, the reading tells.
        """
        config = _config(folder)
        listed = {key: len(value) for key, value in config.items() if isinstance(value, list | dict)}
        asked = {text for text in _texts(config) if not HARMLESS.fullmatch(text)}
        if not asked and max(listed.values(), default=0) <= MORE:
            return
        foreign = _layers(folder / TENSORS) - self._paths  # whoever wrote the file chose these as well
        most = MORE + len(self._paths | foreign)
        long = [f"{key} has more than the {most:,} names it may" for key, count in listed.items() if count > most]
        if long:
            raise FileError(f"the adapter in {folder} is refused:", long)
        if not foreign:
            asked -= self._fine
        if asked and not _ends(sorted(asked), sorted(self._paths | foreign)):
            said = ", ".join(sorted(asked))[:200]
            raise FileError(
                f"the adapter in {folder} is refused:",
                [
                    f"to match its regular expressions ({said}) takes more than {SECONDS} seconds: list modules by their names"
                ],
            )
        if not foreign:
            self._fine |= asked


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _layers(path: Path) -> set[str]:
    """The layers that a file's tensors are of, by the names that are matched."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError):
        return set()
    plain = [key.removeprefix("base_model.model.") for key in keys]
    return {key.rpartition(".lora_")[0] or key.rpartition(".")[0] for key in plain}


def _texts(config: Mapping[str, Any]) -> Iterator[str]:
    """Whatever may be used as an expression: texts, the keys of mappings, the names in lists."""
    for value in config.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Sequence | Mapping):
            yield from (one for one in value if isinstance(one, str))


def _ends(patterns: list[str], paths: list[str]) -> bool:
    """Whether all matches come to an end in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([patterns, paths, FORMS]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
