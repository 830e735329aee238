"""Keys that open the server: from the environment or a file, kept as digests, compared in constant time."""

import hashlib
import hmac
import ipaddress
import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import UsageError

API, ADMIN = "LORAKIT_API_KEYS", "LORAKIT_ADMIN_KEYS"
SHORTEST = 16  # characters of a key
_ALLOWED = set(string.ascii_letters + string.digits + string.punctuation) - {","}


@dataclass(frozen=True)
class Keys:
    """SHA-256 digests of the keys of one kind of route; none = no key opens it."""

    digests: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.digests)

    def match(self, given: str) -> bool:
        """Whether `given` is one of the keys; takes the same time whichever it is, or whether it is one at all."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = False
        for own in self.digests:
            found |= hmac.compare_digest(own, digest)
        return found


def read_keys(variable: str, file: Path | None, environment: Mapping[str, str] | None = None) -> Keys:
    """The keys in `file` (one a line; `#` begins a comment) and in the environment's `variable` (apart by commas).

    Raises UsageError for a file that cannot be read or is empty, and for a key that is too short to be secret.
    """
    found = (os.environ if environment is None else environment).get(variable, "").split(",")
    if file is not None:
        found += _lines(file)
    keys = [key.strip() for key in found if key.strip()]
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or not _ALLOWED.issuperset(key):  # never the key itself: messages land in logs
            raise UsageError(
                f"key {number} of {variable if file is None else f'{variable} and {file}'} cannot be used: expected at least "
                f"{SHORTEST} letters, digits or signs without space or comma. Draw one: openssl rand -hex 32."
            )
    return make_keys(keys)


def make_keys(keys: Iterable[str]) -> Keys:
    return Keys(tuple(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in keys)))


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of keys {file} cannot be read ({error}).") from error
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        raise UsageError(f"the file of keys {file} holds none: expected one a line.")
    return kept


def check_start(host: str, api: Keys, admin: Keys) -> None:
    """Raise UsageError for a server that anyone could use, or whose two kinds of key are not two."""
    if not is_loopback(host) and not api:
        raise UsageError(
            f"listening on {host} without a key would let anyone on the network use this server. Set {API} (or --keys-file), "
            "or listen on 127.0.0.1."
        )
    if set(api.digests) & set(admin.digests):
        raise UsageError(f"a key stands both among {API} and {ADMIN}: whoever asks questions could replace adapters.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost may point anywhere: it counts as not."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
