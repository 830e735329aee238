"""The page: page.html filled with a report's parts, escaped, in one piece."""

import re
from importlib import resources
from typing import Any

from lorakit.report.parts import Fact, Report, Table
from lorakit.report.svg import curve_svg, inline_svg
from lorakit.report.text import clean, number, one_line

_NUMBER = re.compile(r"[-+−±]?\d[\d.,]*(e[-+−]?\d+)?( ?[%×]| [A-Za-z/]{1,8})?")  # with its sign and unit

SHOWN = 6  # samples in sight; the others fold away


def render(report: Report) -> str:
    """`report` as one HTML page that refers to nothing outside itself, the same text each time for the same report."""
    import jinja2
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else clean(str(value))

    room = resources.files("lorakit.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, one_line=one_line)
    return (
        environment.from_string((room / "page.html").read_text(encoding="utf-8")).render(
            report=report,
            css=Markup((room / "page.css").read_text(encoding="utf-8")),
            facts=[Fact(*fact) for fact in report.facts],
            pictures=[(curve.title, Markup(curve_svg(curve))) for curve in report.curves if curve.drawable()],
            explained=[(one, Markup(inline_svg(one.svg, one.title))) for one in report.pictures],
            tables=[(table, _numeric(table)) for table in report.tables if table.columns and table.rows],
            shown=SHOWN,
        )
        + "\n"
    )


def _numeric(table: Table) -> set[int]:
    """The columns whose every cell reads as a number (or is empty): these align to the right."""
    return {
        at
        for at in range(len(table.columns))
        if all(_NUMBER.fullmatch(cell) for cell in (row[at] for row in table.rows) if isinstance(cell, str))
    }
