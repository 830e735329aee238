"""Tiny language-model batches of unequal length, and a trainer around a tiny Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Hooks, Trainer
from lorakit.train.loss import IGNORE, objective_for


class Rows:
    """Rows of tokens of unequal length, the first part of each without loss; batches in a fixed order."""

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(5, 20, (count,), generator=draw).tolist()
        self.rows = [torch.randint(3, tiny.VOCAB, (length,), generator=draw) for length in lengths]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        for number in range(start, len(self)):
            yield self.batch(order[number * self.batch_size : (number + 1) * self.batch_size])

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        chosen = [self.rows[number] for number in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
        labels = ids.masked_fill(mask == 0, IGNORE)
        for row, one in enumerate(chosen):
            labels[row, : len(one) // 2] = IGNORE
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def rows() -> Callable[..., Rows]:
    return Rows


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """make_trainer(config, ...): a trainer of a fresh LoRA on a tiny Llama; the same one for the same arguments."""

    def make(
        config: TrainConfig | None = None,
        *,
        batches: Any = None,
        objective: Any = None,
        hooks: Hooks | None = None,
        dropout: float = 0.0,
        model: Any = None,
    ) -> Trainer:
        config = config or TrainConfig(max_steps=6, batch_size=4)
        model = model if model is not None else tiny.llama()
        torch.manual_seed(0)
        lk.attach(model, lk.LoRA(r=4, dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]), seed=1)
        chosen = objective or objective_for("causal-lm", label_smoothing=config.label_smoothing)
        return Trainer(
            model,
            lk.parameters(model, "default"),
            batches or Rows(20, config.batch_size),
            chosen,
            config,
            hooks or Hooks(),
        )

    return make
