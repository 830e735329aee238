"""The demo: one model from questions to SQL, from nothing to a merged model, with the proof at each step."""

import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakit.attach.api import detach, use
from lorakit.attach.merge import MergeReport, merge
from lorakit.demo.answers import Accuracy, execution_accuracy, extract_sql
from lorakit.demo.grammar import SHAPES, Question, questions
from lorakit.demo.prompts import example, few_shot_examples, few_shot_prompt, prompt
from lorakit.generate import GenerateConfig, generate
from lorakit.report import Report, Sample, Table, run_report, write_report
from lorakit.run.folder import RunFolder
from lorakit.run.listen import Listener
from lorakit.run.subject import NAME
from lorakit.run.train import RunResult, train
from lorakit.store.files import write_text

MODEL = "smollm2-135m-instruct"
LATENCY_ROUNDS = 15


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does. The defaults take a few minutes on two CPU cores."""

    output: str = "runs/demo"
    """The run's folder."""
    train_questions: int = 1200
    """Questions to learn from."""
    heldout_questions: int = 128
    """Questions to judge by, in wordings that training never sees."""
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora", "r": 8, "alpha": 16})
    """The method, as in a recipe."""
    train: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 8, "lr": 2e-3, "warmup": 0.05})
    """How it is trained, as in a recipe."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `summary` is what summary.json holds."""

    folder: Path
    summary: dict[str, Any]
    interrupted: bool = False


def demo(config: DemoConfig | None = None, *, overwrite: bool = False, listener: Listener | None = None) -> DemoResult:
    """Run the whole demo. Raises OutputError where the folder holds a run and `overwrite` is off."""
    return _Demo(config or DemoConfig(), listener or Listener()).go(overwrite)


class _Demo:
    def __init__(self, config: DemoConfig, listener: Listener) -> None:
        self.config, self.listener = config, listener
        self.folder = RunFolder(config.output)
        self.began = time.perf_counter()
        self.heldout = questions("heldout", config.heldout_questions)

    def go(self, overwrite: bool) -> DemoResult:
        run = self.train(overwrite)
        if run.interrupted:
            return DemoResult(self.folder.path, run.summary, interrupted=True)
        model, tokenizer = run.model, run.tokenizer
        shots = few_shot_examples()
        with use(model, None):
            base = self.answer("the base answers, with three examples in its prompt", model, tokenizer,
                               [few_shot_prompt(one.text, shots) for one in self.heldout])  # fmt: skip
        plain = copy.deepcopy(model)
        detach(plain, NAME)  # the base as it was, to time the merged model against
        prompts = [prompt(one.text) for one in self.heldout]
        adapted = self.answer("the adapted model answers", model, tokenizer, prompts)
        probe = tokenizer(prompts[:8], return_tensors="pt", padding=True).to(model.device)
        merged_report = merge(model, NAME, probe={key: probe[key] for key in ("input_ids", "attention_mask")})
        merged = self.answer("the merged model answers", model, tokenizer, prompts)
        self.listener.stage("timing merged against base")
        ratio = latency_ratio(model, plain, tokenizer(prompts[0], return_tensors="pt")["input_ids"])
        judged = {name: execution_accuracy(answers, self.heldout) for name, answers in
                  (("base", base), ("adapted", adapted), ("merged", merged))}  # fmt: skip
        same = sum(one == other for one, other in zip(adapted, merged, strict=True))
        summary = self.summary(run, judged, merged_report, ratio, same)
        self.folder.write_summary(summary)
        write_report(self.folder.report, self.report(run, summary, judged, base, adapted))
        return DemoResult(self.folder.path, summary)

    def train(self, overwrite: bool) -> RunResult:
        """Write the questions as a data set and train on it by a recipe, as any user would."""
        data = self.folder.path / "data"
        train_file, heldout_file = data / "train.jsonl", data / "heldout.jsonl"
        recipe = {
            "model": MODEL,
            "data": {"train": str(train_file), "format": "prompt-completion"},
            "method": dict(self.config.method),
            "train": dict(self.config.train),
            "evaluate": {"samples": 0},
            "output": self.config.output,
        }
        _write_rows(train_file, questions("train", self.config.train_questions))
        _write_rows(heldout_file, self.heldout)
        return train(recipe, overwrite=overwrite, listener=self.listener)

    def answer(self, stage: str, model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """Greedy answers; every model's are cut and judged the same way."""
        self.listener.stage(stage)
        config = GenerateConfig(max_new_tokens=64, batch_size=32, stop=("\n",))
        return generate(model, tokenizer, prompts, config, progress=self.listener.progress)

    def summary(
        self, run: RunResult, judged: Mapping[str, Accuracy], merged: MergeReport, ratio: float, same: int
    ) -> dict[str, Any]:
        trained = run.summary
        return {
            "base": {"execution_accuracy": judged["base"].value},
            "adapted": {"execution_accuracy": judged["adapted"].value},
            "merged": {
                "execution_accuracy": judged["merged"].value,
                "max_logit_difference": merged.max_logit_difference,
                "latency_ratio": ratio,
                "identical_answers": same,
            },
            "questions": {"train": self.config.train_questions, "heldout": len(self.heldout), "shapes": len(SHAPES)},
            "trainable_parameters": trained["trainable_parameters"],
            "total_parameters": trained["total_parameters"],
            "adapter_bytes": trained["adapter_bytes"],
            "model_bytes": trained["model_bytes"],
            "peak_memory_bytes": trained["peak_memory_bytes"],
            "steps": trained["steps"],
            "training_seconds": trained["training_seconds"],
            "tokens_per_second": trained["tokens_per_second"],
            "seconds": time.perf_counter() - self.began,
        }

    def report(
        self,
        run: RunResult,
        summary: Mapping[str, Any],
        judged: Mapping[str, Accuracy],
        base: list[str],
        adapted: list[str],
    ) -> Report:
        before, after = judged["base"], judged["adapted"]
        shapes = [
            (shape, score.total, f"{before.by_shape[shape].correct}", f"{score.correct}")
            for shape, score in after.by_shape.items()
        ]
        share = summary["trainable_parameters"] / summary["total_parameters"]
        return run_report(
            run.folder,
            summary,
            title="From questions to SQL",
            claim=f"Training {share:.1%} of the parameters took execution accuracy from {before.value:.0%} (with three examples "
            f"in the prompt) to {after.value:.0%} on {len(self.heldout)} questions whose wordings were never trained on.",
            tables=[
                Table("What was shown", ("", "base, 3 examples", "adapted", "merged"), proof_rows(summary)),
                Table("Right answers by kind of query", ("kind", "questions", "base", "adapted"), shapes),
            ],
            samples=self.samples(base, adapted, before, after),
            next_steps=[
                (
                    "Ask it yourself",
                    f"lorakit generate {self.folder.path} --prompts {self.folder.path}/data/heldout.jsonl",
                ),
                ("Look at the adapter", f"lorakit inspect {self.folder.path}"),
                (
                    "Write the merged model as a plain transformers folder",
                    f"lorakit merge {self.folder.path} --out sql-merged",
                ),
                ("Train on your own data", "lorakit train recipes/prompt-completion.yaml"),
            ],
        )

    def samples(self, base: list[str], adapted: list[str], before: Accuracy, after: Accuracy) -> list[Sample]:
        """One question a kind, as the base and the adapted model answered it."""
        wrong_before = {failure.question.text for failure in before.failures}
        wrong_after = {failure.question.text for failure in after.failures}
        shown: dict[str, Sample] = {}
        for question, first, second in zip(self.heldout, base, adapted, strict=True):
            shown.setdefault(
                question.shape,
                Sample(
                    prompt=question.text,
                    reference=question.sql,
                    before=extract_sql(first) or first,
                    after=extract_sql(second) or second,
                    before_correct=question.text not in wrong_before,
                    after_correct=question.text not in wrong_after,
                ),
            )
        return list(shown.values())[:12]


def _write_rows(path: Path, asked: Sequence[Question]) -> None:
    write_text(path, "".join(json.dumps(example(one)) + "\n" for one in asked))


def proof_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The demo's one table: what was measured of the base, the adapted and the merged model."""
    merged = summary["merged"]
    heldout = summary["questions"]["heldout"]
    accuracy = [f"{summary[name]['execution_accuracy']:.1%}" for name in ("base", "adapted", "merged")]
    share = summary["trainable_parameters"] / summary["total_parameters"]
    return [
        ("execution accuracy", *accuracy),
        ("parameters trained", "0", f"{summary['trainable_parameters']:,} ({share:.2%})", "-"),
        ("same answers as adapted", "-", "-", f"{merged['identical_answers']} of {heldout}"),
        ("largest logit change by merging", "-", "-", f"{merged['max_logit_difference']:.1e}"),
        ("latency over the base's", "1", "-", f"{merged['latency_ratio']:.3f}"),
        ("file size", *(f"{summary[key] / 1e6:,.1f} MB" for key in ("model_bytes", "adapter_bytes", "model_bytes"))),
    ]


@torch.no_grad()
def latency_ratio(model: Any, other: Any, ids: torch.Tensor, rounds: int = LATENCY_ROUNDS) -> float:
    """Median time of a forward pass of `model` over that of `other`, measured in turns. ids: (1, seq)."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for one in (model, other):
        one(input_ids=ids.to(one.device))  # warm up
    for _ in range(rounds):
        for which, one in ((0, model), (1, other)):
            begin = time.perf_counter()
            one(input_ids=ids.to(one.device))
            times[which].append(time.perf_counter() - begin)
    return statistics.median(times[0]) / statistics.median(times[1])
