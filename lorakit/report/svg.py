"""A curve as SVG that lives inside a page: the page's fonts, the page's colours, names that meet no others."""

import hashlib
import re
import xml.etree.ElementTree as ET

from lorakit.report.parts import Curve
from lorakit.report.picture import GRID, INK, PALETTE, draw
from lorakit.report.text import clean

# Each colour becomes a variable that page.css sets for light and dark; the drawn colour stays as the fallback.
_VARIABLES = {colour: f"--line-{at}" for at, colour in enumerate(PALETTE, 1)} | {INK: "--ink-soft", GRID: "--rule"}
_COLOUR = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


def curve_svg(curve: Curve) -> str:
    """`curve` as an <svg> element for an HTML page, the same text each time for the same curve.

    It refers to nothing outside itself, text is text, and the title is its accessible name (it is not drawn).
    Raises UsageError where the curve has no finite point.
    """
    return inline_svg(draw(curve, "svg", titled=False), curve.title)


def inline_svg(drawn: bytes, title: str) -> str:
    """A picture that matplotlib drew as SVG, as an <svg> element for an HTML page; title: its accessible name."""
    root = ET.fromstring(drawn)
    prefix = "c" + hashlib.sha256(drawn + title.encode(errors="replace")).hexdigest()[:10]
    used = set(_REFERENCE.findall(drawn.decode())) | {
        value.removeprefix("#") for node in root.iter() for name, value in node.items() if _bare(name) == "href"
    }
    _strip(root)
    for node in root.iter():
        _settle(node, prefix, used)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "stroke-linejoin": "round", "class": "curve"})
    root.set("aria-label", clean(title))
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _bare(name: str) -> str:
    return name.rpartition("}")[2]


def _strip(node: ET.Element) -> None:
    """Drop the metadata, and the style sheet, which in a page would reach every element of it."""
    for child in list(node):
        if _bare(child.tag) in ("metadata", "style"):
            node.remove(child)
        else:
            _strip(child)


def _settle(node: ET.Element, prefix: str, used: set[str]) -> None:
    """Namespaces off (HTML knows svg), unused ids off, the others made this curve's own; colours to variables."""
    node.tag = _bare(node.tag)
    for name, value in list(node.items()):
        del node.attrib[name]
        name = _bare(name)
        if name == "id" and value not in used:
            continue
        if name == "id":
            value = f"{prefix}-{value}"
        elif name == "href" and not value.startswith("data:"):  # an image inside the picture stays
            value = f"#{prefix}-{value.removeprefix('#')}"
        elif name == "style":
            value = _COLOUR.sub(lambda found: f"var({_VARIABLES[found[0]]}, {found[0]})", _FONT.sub("", value))
        node.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))
