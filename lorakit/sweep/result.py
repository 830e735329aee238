"""What a sweep found: a row a member, as a table, CSV and JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import FileError
from lorakit.run.folder import RunFolder, finite
from lorakit.store.files import write_json, write_text
from lorakit.sweep.members import Plan

CSV, JSON = "sweep.csv", "sweep.json"


@dataclass(frozen=True)
class MemberResult:
    """One finished member. changes: what it varies (key -> value).

    loss: of the last logged training step; eval_loss: of the adapter that was kept, None without data.eval; after: metrics on
    data.test (data.eval where there is none); parameters: trained; low_rank: those of the updates alone. failed: what ended its
    training early, all figures being None then.
    """

    name: str
    folder: str
    changes: Mapping[str, Any]
    steps: int
    parameters: int | None
    low_rank: int | None
    loss: float | None
    eval_loss: float | None
    after: Mapping[str, float]
    failed: str | None


@dataclass(frozen=True)
class SweepResult:
    """folder: of the sweep, with CSV and JSON. members: in the order of the values. trained: how many were not there yet."""

    folder: Path
    members: tuple[MemberResult, ...]
    trained: int

    def columns(self) -> list[str]:
        """The table's columns: what is varied, then what was found."""
        metrics = dict.fromkeys(name for one in self.members for name in one.after)
        found = [
            "parameters",
            "loss",
            *(["eval_loss"] if any(one.eval_loss is not None for one in self.members) else []),
        ]
        failed = ["failed"] if any(one.failed for one in self.members) else []
        return [*self._varied(), *found, *metrics, *failed]

    def rows(self) -> list[list[Any]]:
        """The table's rows, a member each."""
        return [[self._cell(one, column) for column in self.columns()] for one in self.members]

    def best(self, metric: str | None = None, *, higher_is_better: bool = True) -> MemberResult | None:
        """The member with the best `metric`; without one the lowest eval loss. None where none has it."""
        sign = -1 if metric is not None and higher_is_better else 1
        values = [(one.eval_loss if metric is None else one.after.get(metric), one) for one in self.members]
        known = [(sign * value, i) for i, (value, _) in enumerate(values) if value is not None]
        return values[min(known)[1]][1] if known else None

    def as_dict(self) -> dict[str, Any]:
        members = [{**vars(one), "changes": dict(one.changes), "after": dict(one.after)} for one in self.members]
        whole: dict[str, Any] = finite({"folder": str(self.folder), "trained": self.trained, "members": members})
        return whole

    def save(self) -> None:
        """Write CSV and JSON into the sweep's folder. Raises OutputError."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *self.columns()])
        writer.writerows([one.name, *row] for one, row in zip(self.members, self.rows(), strict=True))
        write_text(self.folder / CSV, text.getvalue())
        write_json(self.folder / JSON, self.as_dict())

    def _varied(self) -> list[str]:
        return list(dict.fromkeys(key for one in self.members for key in one.changes))

    def _cell(self, one: MemberResult, column: str) -> Any:
        if column in self._varied():
            value = one.changes.get(column)
            return value if isinstance(value, int | float | str | None) else json.dumps(value)
        return one.after[column] if column in one.after else getattr(one, column, None)


def member_result(plan: Plan) -> MemberResult:
    """Read a finished member from its folder. Raises FileError."""
    summary, rows = plan.folder.read_summary(), rows_of(plan.folder)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = summary.get("best_step")
    kept = evals.get(best, list(evals.values())[-1] if evals else None)
    if plan.recipe.train.keep == "last" and evals:
        kept = list(evals.values())[-1]
    failed = summary.get("failed")
    return MemberResult(
        name=plan.name,
        folder=str(plan.folder.path),
        changes=plan.changes,
        steps=summary["steps"],
        parameters=summary.get("trainable_parameters"),
        low_rank=summary.get("low_rank_parameters"),
        loss=losses[-1] if losses and failed is None else None,
        eval_loss=kept if failed is None else None,
        after=summary.get("after", {}),
        failed=failed,
    )


def rows_of(folder: RunFolder) -> Sequence[Mapping[str, Any]]:
    """The rows of a run's metrics.jsonl. Raises FileError."""
    if not folder.metrics.is_file():
        return []
    try:
        return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise FileError(f"{folder.metrics} cannot be read:", [str(error)]) from error
