"""Many adapters trained at once, against the same trained one after another: python bench/sweep.py

Both in one warm process, in turns, on SmolLM2-135M's shape with random weights (no hub needed). Each adapter has rows, a rank and
a learning rate of its own; the losses of all steps are compared.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import finish, interleaved, table
from torch import Tensor, nn

from lorakit.attach.api import attach, parameters, use
from lorakit.bench.shapes import SHAPES, build
from lorakit.methods.lora import LoRA
from lorakit.run.device import best_device
from lorakit.sweep.joint import JointTrainer, MemberTrainer
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Hooks, Trainer
from lorakit.train.loss import objective_for

TASK = "causal-lm"
RANKS = (1, 2, 4, 8, 8, 16, 32, 64)
WARMUP = 1


class Drawn:
    """Batches of random tokens, another each step."""

    def __init__(self, rows: int, length: int, vocabulary: int, seed: int, count: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, vocabulary, (count, rows, length), generator=draw)

    def __len__(self) -> int:
        return len(self.ids)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        return (
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            for ids in self.ids[start:]
        )


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model with the same weights in memory."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()})


def trainers(
    cls: Any, model: nn.Module, ask: argparse.Namespace, shape: tuple[int, int], total: int, losses: Any
) -> Any:
    """name -> trainer; `losses[name]` takes each step's loss."""
    made = {}
    for k in range(ask.adapters):
        name, rank = f"adapter{k}", RANKS[k % len(RANKS)]
        attach(model, LoRA(r=rank, alpha=16, target_modules=ask.targets), name=name, seed=k)
        config = TrainConfig(max_steps=total, batch_size=shape[0], lr=1e-4 * (1 + k % 3), seed=k)
        batches = Drawn(*shape, model.config.vocab_size, k, total)
        losses[name] = []
        hooks = Hooks(row=lambda row, into=losses[name]: into.append(row["loss"]))
        made[name] = cls(model, parameters(model, name), batches, objective_for(TASK), config, hooks)
    return made


def alone(model: nn.Module, made: dict[str, Trainer], steps: int) -> Callable[[], None]:
    """One turn of eight runs one after another: `steps` of each."""
    sources = {name: one.batches.make(0, 0) for name, one in made.items()}

    def turn() -> None:
        model.train()
        for name, one in made.items():
            use(model, name)
            for _ in range(steps):
                one.step([next(sources[name])])  # type: ignore[call-overload]

    return turn


def together(model: nn.Module, made: dict[str, MemberTrainer], steps: int, pad_id: int) -> Callable[[], None]:
    """One turn of all at once: as many steps. A step is made when the next pass begins, so one is always under way."""
    passes = JointTrainer(model, made, task=TASK, pad_id=pad_id).steps()

    def turn() -> None:
        for _ in range(steps):
            next(passes)

    return turn


def measure(ask: argparse.Namespace, shape: tuple[int, int]) -> dict[str, Any]:
    loaded = build(ask.model, dtype="float32", device=best_device(), seed=0)
    model, total = loaded.model, (WARMUP + ask.rounds) * ask.steps + 1
    losses: dict[str, dict[str, list[float]]] = {"alone": {}, "together": {}}
    other = sharing(model)
    one = trainers(Trainer, model, ask, shape, total, losses["alone"])
    many = trainers(MemberTrainer, other, ask, shape, total, losses["together"])
    seconds = interleaved(
        {"alone": alone(model, one, ask.steps), "together": together(other, many, ask.steps, 0)}, ask.rounds, WARMUP
    )
    pairs = [
        pair for name in losses["alone"] for pair in zip(losses["alone"][name], losses["together"][name], strict=False)
    ]
    return {
        "batch": shape[0],
        "length": shape[1],
        "steps": len(next(iter(losses["together"].values()))),
        "seconds": {name: value / ask.steps for name, value in seconds.items()},
        "ratio": seconds["alone"] / seconds["together"],
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def shape_of(text: str) -> tuple[int, int]:
    rows, length = (int(part) for part in text.split("x"))
    return rows, length


def main(arguments: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument(
        "--model", default="smollm2-135m", choices=[name for name, (task, _) in SHAPES.items() if task == TASK]
    )
    ask.add_argument("--adapters", type=int, default=8)
    ask.add_argument("--targets", default="all-linear", help="all-linear, or names with commas: q_proj,v_proj")
    ask.add_argument("--shapes", default="1x32,2x64,8x64", help="batch x length")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--steps", type=int, default=4, help="of each adapter in a turn")
    chosen = ask.parse_args(arguments)
    if chosen.targets != "all-linear":
        chosen.targets = chosen.targets.split(",")
    found = []
    for text in chosen.shapes.split(","):
        found.append(measure(chosen, shape_of(text)))
        print(f"{text}: {found[-1]['ratio']:.3f} times as fast together", flush=True)  # the next may take long
    columns = ["batch x length", "alone, s a step of all", "together, s", "ratio", "steps", "largest loss difference"]
    rows = [
        [
            f"{one['batch']}x{one['length']}",
            one["seconds"]["alone"],
            one["seconds"]["together"],
            one["ratio"],
            one["steps"],
            one["largest_loss_difference"],
        ]
        for one in found
    ]
    settings = {"model": chosen.model, "adapters": chosen.adapters, "targets": chosen.targets, "rounds": chosen.rounds}
    finish("sweep", {**settings, "shapes": found}, table(columns, rows))


if __name__ == "__main__":
    main()
