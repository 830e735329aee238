"""Whole training beside PEFT's: `lorakit train`'s loop against transformers' Trainer over PEFT's model, as their users run them.

    python bench/trainer.py --task sst2 [--examples 800] [--rounds 5]
    python bench/trainer.py --task e2e --examples 160 --rounds 5

The same examples, batch, base, adapter and first values; each in its own order. The Trainer has its defaults (and dynamic
padding, as transformers' documentation shows); neither side evaluates. Each round trains both once, on freshly loaded
models; only the training loops are timed, the model's own dropout is on.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import finish, table
from quality import CLIP, TASKS, Task, recipe_of

import lorakit as lk
from lorakit.run.listen import Listener
from lorakit.run.recipe import load_recipe, to_yaml
from lorakit.run.subject import NAME
from lorakit.run.train import Run
from lorakit.store.api import save


def ready(task: Task, arguments: argparse.Namespace, seed: int, folder: Path) -> Run:
    """A run whose data and model are there and whose adapter is attached."""
    run = Run(load_recipe(recipe_of(task, arguments, seed, folder / "run")), None, Listener())
    run.read_data()
    run.load_model()
    run.encode()
    return run


def lorakit_seconds(task: Task, arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[float, int]:
    """(seconds, steps) of lorakit's training."""
    run = ready(task, arguments, seed, folder)
    trainer = run.trainer()
    run.folder.begin(to_yaml(run.recipe), run.start())
    begin = time.perf_counter()
    trainer.run()
    return time.perf_counter() - begin, trainer.state.step


def peft_seconds(task: Task, arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[float, int]:
    """The same of Trainer's, by its own clock."""
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    first = ready(task, arguments, seed, folder)
    save(first.model, folder / "first", NAME)
    lk.detach(first.model, NAME)
    model: Any = PeftModel.from_pretrained(first.model, str(folder / "first"), is_trainable=True)
    tokenizer = first.loaded.tokenizer
    rows = [features(row) for row in first.train_rows]
    collator = DataCollatorForSeq2Seq if task.kind == "causal-lm" else DataCollatorWithPadding
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        learning_rate=task.lr,
        per_device_train_batch_size=task.batch,
        num_train_epochs=arguments.epochs,
        max_grad_norm=CLIP,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator(tokenizer))  # type: ignore[arg-type]
    begin = time.perf_counter()
    done = trainer.train()
    assert done.metrics["train_runtime"] <= time.perf_counter() - begin
    return done.metrics["train_runtime"], done.global_step


def features(row: Any) -> dict[str, Any]:
    """An encoded row as transformers' collators take it."""
    given = {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
    return given if row.token_type_ids is None else {**given, "token_type_ids": row.token_type_ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="sst2")
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8, help="examples in a step; 8 is the Trainer's default")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    task = replace(TASKS[arguments.task], batch=arguments.batch)
    seconds: dict[str, list[float]] = {"lorakit": [], "peft": []}
    steps = {}
    for seed in range(arguments.rounds):
        for name, side in (("lorakit", lorakit_seconds), ("peft", peft_seconds)):
            with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                taken, steps[name] = side(task, arguments, seed, Path(place))
            seconds[name].append(taken)
            print(f"{name:8} {seed}: {taken:.2f} s, {steps[name]} steps", flush=True)
    over = [theirs / own for own, theirs in zip(seconds["lorakit"], seconds["peft"], strict=True)]
    rows = [[name, 1e3 * statistics.median(one) / steps[name]] for name, one in seconds.items()]
    text = table(["whole training", "ms a step"], rows)
    text += f"\n\nPEFT / lorakit: {statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})"
    finish(f"trainer-{arguments.task}", {"seconds": seconds, "steps": steps, "over": over}, text)


if __name__ == "__main__":
    main()
