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

SECONDS = 2  # of computing, for all patterns of an adapter on all modules of a model
PATIENCE = 60.0  # seconds, on a machine that is busy
MORE = 1024  # names that a configuration may list beyond one for each module
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

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = list(paths)
        self._fine: set[str] = set()

    def check(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raise FileError where an adapter's configuration has more names than the model, or expressions that take too long."""
        most = MORE + len(self._paths)
        long = [key for key, value in config.items() if isinstance(value, Sequence | Mapping) and _count(value) > most]
        if long:
            raise FileError(
                f"the adapter in {folder} is refused:",
                [f"{key} has more than the {most:,} names it may" for key in long],
            )
        asked = {text for text in _texts(config) if not HARMLESS.fullmatch(text)} - self._fine
        if asked and not _ends(sorted(asked), self._paths):
            raise FileError(
                f"the adapter in {folder} is refused:",
                [
                    f"to match its regular expressions takes more than {SECONDS} seconds ({', '.join(sorted(asked))[:200]}): "
                    "list the modules by their names"
                ],
            )
        self._fine |= asked


def _count(value: Sequence[Any] | Mapping[str, Any]) -> int:
    return 0 if isinstance(value, str) else len(value)


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
