"""Borrow a model for evaluation and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients; at the exit each has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def generation_settings(model: Any, settings: Any) -> Iterator[None]:
    """`settings` alone decide how `model` decodes: transformers fills what they leave open from the model's own."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside follow `seed`; the generators of the CPU and of `device` go on afterwards as if nothing had been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter: where its inputs go."""
    return next(model.parameters()).device
