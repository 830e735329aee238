"""Quality beside PEFT: final eval loss and metric of both on the same data, model, first values, rate and steps.

    python bench/quality.py --task sst2 [--examples 4000] [--seeds 0,1,2]
    python bench/quality.py --task e2e [--examples 2000] [--seeds 0,1,2]

lorakit trains as `lorakit train` does; PEFT in the loop of its documentation, on the random padded batches that
transformers' Trainer makes. Both begin with the same adapter, are judged by the same code, and keep the last adapter.
Each result is written as it comes to runs/bench/quality-TASK.jsonl; a run that is started again does only what is missing.
"""

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DATA, ROOT, finish, table

import lorakit as lk
from lorakit.data import Dataset, collate, encode_all, load_examples, sample
from lorakit.data.batch import BatchOrder
from lorakit.evaluate import evaluate_classification, evaluate_generation
from lorakit.generate import GenerateConfig
from lorakit.models import longest_row
from lorakit.run.listen import Listener
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import NAME
from lorakit.run.train import Run
from lorakit.store.api import save
from lorakit.train.config import TrainConfig
from lorakit.train.loss import mean_loss, objective_for
from lorakit.train.schedule import factor

SIDES = ("lorakit", "peft")
CLIP = 1.0


@dataclass(frozen=True)
class Task:
    """What is trained on what, and the metric that it is judged by beside its loss."""

    model: str
    kind: str
    train: Path
    judged: Path
    metric: str
    lr: float
    batch: int
    format: str = "auto"


TASKS = {
    "sst2": Task(
        "minilm-l6",
        "sequence-classification",
        DATA / "glue" / "SST-2" / "train.tsv",
        DATA / "glue" / "SST-2" / "dev.tsv",
        "accuracy",
        5e-4,
        16,
    ),
    "e2e": Task(
        "smollm2-135m-instruct",
        "causal-lm",
        DATA / "e2e" / "train.txt",
        DATA / "e2e" / "valid.txt",
        "bleu",
        1e-3,
        8,
        "e2e",
    ),
}


def recipe_of(task: Task, arguments: argparse.Namespace, seed: int, output: Path) -> dict[str, Any]:
    """lorakit's run."""
    return {
        "model": task.model,
        "task": task.kind,
        "data": {"train": str(task.train), "format": task.format, "limit": arguments.examples},
        "method": {"name": "lora", "r": 8, "alpha": 16},
        "train": {"epochs": arguments.epochs, "batch_size": task.batch, "lr": task.lr, "seed": seed, "keep": "last"},
        "evaluate": {"samples": 0},
        "output": str(output),
    }


def lorakit_side(task: Task, arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[Any, Any, int]:
    """(model, tokenizer, steps) after lorakit's training."""
    run = lk.train(recipe_of(task, arguments, seed, folder / "run"))
    return run.model, run.tokenizer, run.summary["steps"]


def peft_side(task: Task, arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[Any, Any, int]:
    """The same after PEFT's, from the adapter (and head) that lorakit's run begins with."""
    from peft import PeftModel

    first = Run(load_recipe(recipe_of(task, arguments, seed, folder / "run")), None, Listener())
    first.read_data()
    first.load_model()
    first.encode()
    save(first.model, folder / "first", NAME)
    lk.detach(first.model, NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(first.model, str(folder / "first"), is_trainable=True)
    settings = TrainConfig(epochs=arguments.epochs, batch_size=task.batch, lr=task.lr, seed=seed)
    steps = _plain_loop(model.train(), first.train_rows, first.loaded.tokenizer.pad_token_id, task, settings)
    return model.merge_and_unload(), first.loaded.tokenizer, steps


def _plain_loop(model: Any, rows: Sequence[Any], pad: int, task: Task, settings: TrainConfig) -> int:
    """The loop of PEFT's documentation: random padded batches, the model's own loss, AdamW, clipping."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    total = math.ceil(-(-len(rows) // task.batch) * settings.epochs - 1e-6)
    draw, step = torch.Generator().manual_seed(settings.seed), 0
    while step < total:
        order = torch.randperm(len(rows), generator=draw).tolist()
        for begin in range(0, len(rows), task.batch):
            if step == total:
                break
            chosen = [rows[number] for number in order[begin : begin + task.batch]]
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor(settings, step, total)
            loss = model(**collate(chosen, pad_id=pad, task=task.kind)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return step


def judge(task: Task, model: Any, tokenizer: Any, arguments: argparse.Namespace, names: Any) -> dict[str, float]:
    """The eval loss on all judged examples, and the metric."""
    judged = load_examples(
        str(task.judged), format=task.format, split="eval", label_names=names, limit=arguments.eval, seed=0
    )
    model.eval()
    limit = longest_row(model, tokenizer)
    rows = encode_all(judged, tokenizer, task=task.kind, max_length=limit)
    order = BatchOrder([len(row.input_ids) for row in rows], 32, 0).evaluation()
    batches = (collate([rows[n] for n in chosen], pad_id=tokenizer.pad_token_id, task=task.kind) for chosen in order)
    loss = mean_loss(model, batches, objective_for(task.kind))
    return {"eval_loss": loss, task.metric: _metric(task, model, tokenizer, judged, arguments)}


def _metric(task: Task, model: Any, tokenizer: Any, judged: Dataset, arguments: argparse.Namespace) -> float:
    if task.kind == "sequence-classification":
        return evaluate_classification(model, tokenizer, judged, [task.metric]).metrics[task.metric]
    asked: Any = sample(judged.examples, arguments.answers, 0)
    config = GenerateConfig(max_new_tokens=80, batch_size=20)
    return evaluate_generation(model, tokenizer, asked, config, [task.metric]).metrics[task.metric]


def one_result(side: str, seed: int, task: Task, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one side with one seed and judge it."""
    names = load_examples(str(task.train), format=task.format, limit=50, seed=0).label_names
    with tempfile.TemporaryDirectory() as place:
        train = lorakit_side if side == "lorakit" else peft_side
        model, tokenizer, steps = train(task, arguments, seed, Path(place))
        return {"steps": steps, **judge(task, model, tokenizer, arguments, names)}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a stored result must agree in to count as this run's."""
    return {key: getattr(arguments, key) for key in ("task", "examples", "epochs", "eval", "answers")}


def stored(path: Path, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, float]]:
    """(side, seed) -> result, of those in the file that were measured with these settings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be torn
    return {(row["side"], row["seed"]): row["result"] for row in rows if row["settings"] == settings}


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="sst2")
    parser.add_argument("--examples", type=int, default=2000, help="training examples")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument(
        "--eval", type=int, default=800, help="examples that the loss (SST-2: accuracy too) is judged on"
    )
    parser.add_argument("--answers", type=int, default=60, help="of them, those that E2E's BLEU is measured on")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="the file of results; runs/bench/quality-TASK.jsonl unless named")
    arguments = parser.parse_args()
    task, settings = TASKS[arguments.task], settings_of(arguments)
    path = arguments.out or ROOT / "runs" / "bench" / f"quality-{arguments.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = [int(one) for one in arguments.seeds.split(",")]
    for seed in seeds:
        for side in SIDES:
            if (side, seed) in stored(path, settings):
                continue
            result = one_result(side, seed, task, arguments)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"side": side, "seed": seed, "settings": settings, "result": result}) + "\n")
            print(
                f"{side:8} seed {seed}: {', '.join(f'{name} {value:.4g}' for name, value in result.items())}",
                flush=True,
            )
    found = stored(path, settings)
    columns = ("eval_loss", task.metric)
    rows = []
    for side in SIDES:
        for name in columns:
            values = [found[side, seed][name] for seed in seeds]
            rows.append((side, name, ", ".join(f"{value:.4f}" for value in values), spread(values)))
    results = [{"side": side, "seed": seed, **found[side, seed]} for side in SIDES for seed in seeds]
    text = table(("side", "figure", f"seeds {arguments.seeds}", "mean ± spread"), rows)
    finish(f"quality-{arguments.task}", {"settings": settings, "results": results}, text)


if __name__ == "__main__":
    main()
