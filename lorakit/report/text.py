"""Words and numbers as a reader should see them."""

import math
import re
from numbers import Integral

from lorakit.report.parts import Cell

# What HTML and XML may not hold: controls (tab and newline aside), lone surrogates, noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` as any page can hold it: line ends as \\n, a control character as its picture (␀ for NUL), what no file
    can encode as U+FFFD. Markup is not escaped here."""
    return _FORBIDDEN.sub(_picture, text.replace("\r\n", "\n"))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def one_line(text: str, limit: int = 48) -> str:
    """`text` cleaned, on one line of at most `limit` characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: Cell) -> str:
    """A cell: thousands apart, four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):  # numpy's too
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return _significant(value).replace("-", "−", 1 if value < 0 else 0)


def _significant(value: float) -> str:
    if value != 0 and not 1e-4 <= abs(value) < 1e12:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def size(count: float) -> str:
    """Bytes in powers of 1000, three significant digits: 2.21 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def percent(part: float, whole: float) -> str:
    """`part` of `whole`, three significant digits: 0.403 %."""
    share = 100 * part / whole
    return f"{share:.3g} %"


def duration(seconds: float) -> str:
    """Seconds as one or two units: 3 min 24 s."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"
