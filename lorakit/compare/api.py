"""`compare`: every method on one model and data set, into one table and one picture."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.analyze.draw import drawn
from lorakit.compare.findings import findings
from lorakit.compare.page import report_of
from lorakit.compare.picture import drawable, figure_2
from lorakit.compare.plan import Plan, load_plan
from lorakit.compare.result import Comparison
from lorakit.compare.study import Study
from lorakit.compare.table import to_csv
from lorakit.report import write_report
from lorakit.run.device import best_device
from lorakit.run.folder import finite
from lorakit.run.hold import held
from lorakit.run.listen import Listener
from lorakit.store.files import write_bytes, write_json, write_text

PICTURE = "quality-parameters"


def compare(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    listener: Listener | None = None,
) -> Comparison:
    """Train and measure every method of the recipe's section `compare` (see CompareConfig), and write the recipe's `output`.

    The folder gets results.json, results.csv, report.html, the picture as PNG and SVG, and a run's folder for each run.
    Stopped at any point and started again, it goes on: a run that is finished there, by the same settings and data, is not
    repeated. A run that fails is a row's failure, with its reason; retry_failed: make those again.
    overrides: "train.epochs=1" or "compare.seeds=[0]" each. Raises RecipeError, DataError, OutputError.
    """
    plan = load_plan(recipe, overrides)
    folder = Path(plan.recipe.output).expanduser()
    with held(folder, "comparison"):
        return _compare(plan, folder, listener or Listener(), retry_failed)


def _compare(plan: Plan, folder: Path, listener: Listener, retry: bool) -> Comparison:
    listener.stage("reading data")
    study = Study(plan, folder, listener, retry=retry)
    listener.note(_told(plan))
    about = study.about_base()
    rows = study.rows()
    glue = study.sets.train.format.startswith("glue:")
    found = Comparison(
        folder=folder,
        model=plan.recipe.model,
        data=Path(str(plan.recipe.data.train)).name,
        task=plan.recipe.task,
        quality=study.quality,
        higher=study.sign > 0,
        middle=plan.config.middle or ("median" if glue else "mean"),
        base_parameters=about["parameters"],
        rows=rows,
        perplexity_before=about["perplexity"],
        machine={
            "device": best_device() or "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )
    found = replace(found, notes=findings(found, plan.arms))
    _write(found, plan)
    return found


def _told(plan: Plan) -> str:
    searched = sum(len(arm.rates) > 1 for arm in plan.arms) if plan.config.search.budget > 1 else 0
    tries, runs = searched * plan.config.search.budget, len(plan.arms) * len(plan.config.seeds)
    return f"{len(plan.arms)} methods and sizes: {runs} runs, and at most {tries} before them to find learning rates"


def _write(found: Comparison, plan: Plan) -> None:
    import yaml

    text = yaml.safe_dump({**plan.document, "compare": _plain(plan)}, sort_keys=False, allow_unicode=True)
    write_text(found.folder / "recipe.yaml", text)
    write_json(found.folder / "results.json", finite(found.as_dict()))
    write_text(found.folder / "results.csv", to_csv(found))
    if drawable(found):
        for form in ("png", "svg"):
            write_bytes(found.folder / f"{PICTURE}.{form}", drawn(lambda: figure_2(found), form))
    write_report(found.folder / "report.html", report_of(found, text))


def _plain(plan: Plan) -> Any:
    """The section as YAML takes it."""
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(plan.config)))
