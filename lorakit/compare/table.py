"""A comparison as tables: for the terminal and the page, and whole for a spreadsheet."""

import csv
import io
from collections.abc import Sequence

from lorakit.compare.result import Comparison, Row
from lorakit.report import Table
from lorakit.report.parts import Cell
from lorakit.report.text import size

QUALITY, COST = "Quality", "Cost"
Column = tuple[str, list[Cell]]


def tables_of(found: Comparison) -> list[Table]:
    """What each row reached, and what each method took. A column that holds nothing in any row is left out."""
    return [
        _table(QUALITY, _quality_columns(found), _quality_caption(found)),
        _table(COST, _cost_columns(found.methods), COST_CAPTION),
    ]


def _table(title: str, columns: Sequence[Column], caption: str) -> Table:
    shown = [(head, cells) for head, cells in columns if any(cell is not None for cell in cells)]
    rows = [list(row) for row in zip(*(cells for _, cells in shown), strict=True)]
    return Table(title, [head for head, _ in shown], rows, caption)


def _quality_columns(found: Comparison) -> list[Column]:
    rows = found.rows
    figures = [row.quality for row in rows]
    columns: list[Column] = [
        ("method", [row.label for row in rows]),
        (found.quality.replace("_", " "), [found.of(row) for row in rows]),
        ("±", [None if one is None or one.spread is None else f"{one.spread:.2g}" for one in figures]),
        ("seeds", [len(row.done) for row in rows]),
        ("trained", [row.trained for row in rows]),
        ("learning rate", [None if row.lr is None else f"{row.lr:g}" for row in rows]),
        ("positions", [row.positions for row in rows]),
        ("perplexity", [None if row.perplexity is None else row.perplexity.mean for row in rows]),
    ]
    if any(row.failed for row in rows):
        columns.append(("status", [row.status for row in rows]))
    return columns


def _quality_caption(found: Comparison) -> str:
    text = (
        f"{found.quality}: the {found.middle} of the seeds, {'more' if found.higher else 'less'} is better; ±: their standard "
        "deviation. Trained: parameters; a classifier's head is trained too, but not counted, as in the paper."
    )
    if any(row.positions for row in found.rows):
        text += " Positions: that prompts and prefixes take from the sequence."
    if found.perplexity_before is not None:
        text += f" Perplexity: on a general text, afterwards; {found.perplexity_before:.4g} is the base's."
    return text


COST_CAPTION = (
    "Step: the mean of a run, the median of the seeds. Memory: what three training steps on the largest batch held at their peak "
    "above the loaded base, in a process of its own. On disk: the adapter's tensors, a trained head included. Latency: a forward "
    "pass's time over the base's, taken in turns, the median."
)


def _cost_columns(rows: Sequence[Row]) -> list[Column]:
    columns: list[Column] = [
        ("method", [row.label for row in rows]),
        ("ms a step", [None if row.step_seconds is None else row.step_seconds * 1e3 for row in rows]),
        ("memory", [None if row.peak_memory is None else size(row.peak_memory) for row in rows]),
        ("on disk", [None if row.adapter_bytes is None else size(row.adapter_bytes) for row in rows]),
    ]
    for batch in dict.fromkeys(one["batch"] for row in rows for one in row.latency):
        columns.append((f"latency, {batch} row{'s' * (batch > 1)}", [_latency(row, batch, "over") for row in rows]))
        columns.append(("merged", [_latency(row, batch, "merged_over") for row in rows]))
    return columns


def quality_text(found: Comparison, row: Row) -> str:
    """0.912 ± 0.004, the spread being the standard deviation over the seeds; a dash where every run failed."""
    value, figure = found.of(row), row.quality
    if value is None or figure is None:
        return "-"
    return f"{value:.4g}" if figure.spread is None else f"{value:.4g} ± {figure.spread:.2g}"


def _latency(row: Row, batch: int, key: str) -> str | None:
    """+3.1 %, over the base's forward pass."""
    over = next((one[key] for one in row.latency if one["batch"] == batch), None)
    return None if over is None else f"{100 * (over - 1):+.1f} %".replace("-", "−")


CSV = (
    "method", "kind", "status", "quality_metric", "quality_mean", "quality_median", "quality_std", "quality_min",
    "quality_max", "seeds", "trained_parameters", "learning_rate", "step_seconds", "peak_memory_bytes", "adapter_bytes",
    "perplexity_before", "perplexity_after", "positions",
)  # fmt: skip


def to_csv(found: Comparison) -> str:
    """Every row with plain numbers; empty where there is none."""
    batches = list(dict.fromkeys(one["batch"] for row in found.rows for one in row.latency))
    heads = [*CSV, *(f"latency_ratio_{kind}batch_{batch}" for batch in batches for kind in ("", "merged_"))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for row in found.rows:
        figure, after = row.quality, row.perplexity
        values = (
            [None] * 5 if figure is None else [figure.mean, figure.median, figure.spread, figure.least, figure.most]
        )
        by_batch = {one["batch"]: one for one in row.latency}
        ratios = [by_batch.get(batch, {}).get(key) for batch in batches for key in ("over", "merged_over")]
        before = None if after is None else found.perplexity_before
        writer.writerow(
            [row.label, row.kind, row.status, found.quality, *values, len(row.done), row.trained, row.lr, row.step_seconds,
             row.peak_memory, row.adapter_bytes, before, None if after is None else after.mean, row.positions, *ratios]
        )  # fmt: skip
    return out.getvalue()
