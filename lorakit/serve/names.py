"""What an adapter may be called. A name is never a path: it holds no separator and cannot begin with a dot."""

import re

from lorakit.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?:sha256:)?([0-9a-f]{6,64}))?", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)


def is_name(text: object) -> bool:
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_hex(text: object) -> bool:
    """Whether `text` is a version as the registry writes it: the 64 digits of a content hash."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def check_name(text: object, what: str = "an adapter's name") -> str:
    """`text`, if it is a name. Raises UsageError."""
    if isinstance(text, str) and is_name(text):
        return text
    raise UsageError(
        f"{shown(text)} cannot be {what}: expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit."
    )


def split_reference(text: str) -> tuple[str, str | None] | None:
    """(name, digits of a version or None) of "name" or "name@hash"; None where it is neither."""
    found = _REFERENCE.fullmatch(text)
    return None if found is None else (found[1], found[2])


def shown(text: object, length: int = 80) -> str:
    """Text from outside as a message, a log or a header may repeat it: cut, quoted, nothing but printable ASCII."""
    raw = text if isinstance(text, str) else repr(text)
    return ascii(raw if len(raw) <= length else raw[:length] + "...")
