"""A comparison as a page of lorakit.report."""

from dataclasses import replace

from lorakit.analyze.draw import drawn
from lorakit.compare.picture import drawable, figure_2
from lorakit.compare.result import Comparison
from lorakit.compare.table import quality_text, tables_of
from lorakit.report import Fact, Picture, Report, Table
from lorakit.report.text import percent, size

TITLE = "Quality against trained parameters"


def report_of(found: Comparison, recipe_yaml: str) -> Report:
    """The page: the claim, the figures, the tables with what their columns mean, the picture."""
    pictures = []
    if drawable(found):
        pictures = [Picture(TITLE, drawn(lambda: figure_2(found), "svg"), _explained(found))]
    return Report(
        title=f"Ways to adapt {found.model}",
        claim=_claim(found),
        facts=_facts(found),
        tables=[_unbroken(table) for table in tables_of(found)],
        pictures=pictures,
        warnings=found.notes,
        next_steps=_next(found),
        recipe_yaml=recipe_yaml,
    )


def _unbroken(table: Table) -> Table:
    """The table with names that are not broken over lines."""
    rows = [[str(name).replace(" ", "\N{NO-BREAK SPACE}"), *rest] for name, *rest in table.rows]
    return replace(table, rows=rows)


def _claim(found: Comparison) -> str:
    best = found.best
    if best is None:
        return "No run gave a figure."
    share = (
        "" if best.trained is None else f", training {percent(best.trained, found.base_parameters)} of the parameters"
    )
    return f"{best.label} is best: {found.quality} {quality_text(found, best)}{share}."


def _facts(found: Comparison) -> list[Fact]:
    best = found.best
    facts = [Fact("Model", f"{found.base_parameters:,}", "parameters"), Fact("Data", f"{found.data}", found.task)]
    if best is None:
        return facts
    facts.append(Fact("Best", best.label, f"{found.quality} {quality_text(found, best)}"))
    if best.trained is not None:
        facts.append(Fact("It trains", f"{best.trained:,}", percent(best.trained, found.base_parameters)))
    if best.adapter_bytes is not None:
        facts.append(Fact("On disk", size(best.adapter_bytes)))
    if found.perplexity_before is not None and best.perplexity is not None:
        facts.append(
            Fact("General text", f"{best.perplexity.mean:.4g}", f"perplexity; {found.perplexity_before:.4g} before")
        )
    return facts


def _explained(found: Comparison) -> str:
    return (
        f"As the paper's Figure 2: {found.quality} of each method at each size; its bar reaches from the worst to the best seed. "
        "A line joins the sizes of one method: where it falls to the right, more parameters made it worse. A dotted line is the "
        "base without training."
    )


def _next(found: Comparison) -> list[tuple[str, str]]:
    best = found.best
    if best is None or not best.done:
        return [("Try the failed runs again", "lorakit compare RECIPE --retry-failed")]
    return [("See every figure of every run", f"{found.folder / 'results.json'}")]
