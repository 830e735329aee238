"""From a run's metrics and summary to its report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.report.facts import Summary, facts, figure, loss_claim
from lorakit.report.metrics import Row, as_number, line_of, read_metrics
from lorakit.report.parts import Cell, Curve, Point, Report, Sample, Table

# What an evaluation costs is no result of it: eval_seconds, eval_tokens_per_second and their like are not drawn.
_COSTS = ("seconds", "runtime", "per_second", "examples", "tokens")


def run_report(
    run: str | Path | Sequence[Row],
    summary: Summary | None = None,
    *,
    title: str = "",
    claim: str = "",
    tables: Sequence[Table] = (),
    samples: Sequence[Sample] = (),
    next_steps: Sequence[tuple[str, str]] = (),
    recipe_yaml: str | None = None,
    warnings: Sequence[str] = (),
) -> Report:
    """The report of one run.

    run: the run's folder (its metrics.jsonl and recipe.yaml are read; either may be missing), or the rows themselves:
        each has "step" and any of "loss", "lr", "tokens_per_second", "grad_norm", or "eval_loss" and other "eval_*".
    summary: any of "trainable_parameters", "total_parameters", "peak_memory_bytes", "adapter_bytes", "model_bytes",
        "seconds", "tokens_per_second", "best_step", and "before" and "after", each a dict of metrics by name.
    title, claim: by default the folder's name, and how far the evaluation loss went.
    tables: come after those made from the rows and the summary.

    Raises DataError for a metrics.jsonl or recipe.yaml that is there and cannot be read.
    """
    rows: Sequence[Row] = []
    if not isinstance(run, (str, Path)):
        rows = run
    else:
        folder = Path(run)
        title = title or folder.resolve().name
        recipe_yaml = _text(folder / "recipe.yaml") if recipe_yaml is None else recipe_yaml
        if (folder / "metrics.jsonl").exists():
            rows = read_metrics(folder / "metrics.jsonl")
    summary = {} if summary is None else summary
    return Report(
        title=title or "A run",
        claim=claim or loss_claim(rows, summary),
        facts=facts(rows, summary),
        curves=_curves(rows, summary),
        tables=[*_before_after(summary), *_evaluations(rows, summary), *tables],
        samples=samples,
        next_steps=next_steps,
        recipe_yaml=recipe_yaml,
        warnings=[*warnings, *_not_finite(rows)],
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"expected a recipe's text in UTF-8, got: {error}. Mend or remove it.", source=str(path)
        ) from error


def _metrics(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Every result of the evaluations: its name without "eval_" -> (step, value)."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_") and not key.endswith(_COSTS))
    lines = {key.removeprefix("eval_"): line_of(rows, key) for key in keys}
    return {name: points for name, points in lines.items() if points}


def _curves(rows: Sequence[Row], summary: Summary) -> list[Curve]:
    """Loss; metrics, those between 0 and 1 together; learning rate; gradient norm; speed. None of a single point."""
    metrics = _metrics(rows)
    loss = {"training": line_of(rows, "loss"), "evaluation": metrics.pop("loss", [])}
    metrics = {_words(name): points for name, points in metrics.items()}
    shares = {name: points for name, points in metrics.items() if all(0 <= y <= 1 for _, y in _finite(points))}
    others = [name for name in metrics if name not in shares]
    best = figure(summary, "best_step")
    marks = () if best is None else ((best, f"kept: step {best:,.0f}"),)
    curves = [
        Curve("Loss", "step", "loss", loss, smooth=["training"], marks=marks),
        Curve("Evaluation", "step", "score", shares, marks=marks),
        *(Curve(f"Evaluation: {name}", "step", name, {name: metrics[name]}, marks=marks) for name in others),
        Curve("Learning rate", "step", "learning rate", {"learning rate": line_of(rows, "lr")}),
        Curve("Gradient norm", "step", "norm", {"gradient norm": line_of(rows, "grad_norm")}, smooth=["gradient norm"]),
        Curve("Speed", "step", "tokens/s", {"speed": line_of(rows, "tokens_per_second")}, smooth=["speed"]),
    ]
    return [curve for curve in curves if any(len(points) > 1 for points in curve.drawable().values())]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _before_after(summary: Summary) -> list[Table]:
    """The metrics of the base and of the adapted model, where the summary has either."""
    sides = [side if isinstance(side, Mapping) else {} for side in (summary.get("before"), summary.get("after"))]
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(name for side in sides for name in side):
        before, after = (_cell(side.get(name)) for side in sides)
        if before is not None or after is not None:
            rows.append([_words(name), before, after, _change(before, after)])
    return [Table("Before and after", ["Metric", "Before", "After", "Change"], rows)] if rows else []


def _evaluations(rows: Sequence[Row], summary: Summary) -> list[Table]:
    """Each metric at its first evaluation, at the step kept and at the last."""
    metrics = _metrics(rows)
    steps = sorted({step for points in metrics.values() for step, _ in points})
    if not steps:
        return []
    best = figure(summary, "best_step")
    shown = sorted({steps[0], steps[-1]} | ({best} & set(steps) if best is not None else set()))
    heads = [f"Step {step:,.0f}" + (" (kept)" if step == best else "") for step in shown]
    body = [[_words(name), *(dict(points).get(step) for step in shown)] for name, points in metrics.items()]
    return [Table("Evaluation during training", ["Metric", *heads], body)]


def _cell(value: Any) -> float | int | None:
    return value if as_number(value) is not None else None


def _change(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    change = float(after) - float(before)
    return f"{change:+#.4g}".replace("-", "−", 1) if math.isfinite(change) else None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _not_finite(rows: Sequence[Row]) -> list[str]:
    """One warning for each metric that was ever no finite number: how often, and at which step first."""
    found = []
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        steps = [step for step, value in line_of(rows, key) if not math.isfinite(value)]
        if steps:
            times = "once" if len(steps) == 1 else f"{len(steps):,} times"
            found.append(
                f"{key} was no finite number {times}, first at step {steps[0]:,.0f}; those points are not drawn."
            )
    return found
