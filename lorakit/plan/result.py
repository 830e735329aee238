"""What a plan says."""

from dataclasses import dataclass

from lorakit.plan.gpus import Fit
from lorakit.plan.memory import Memory


@dataclass(frozen=True)
class Row:
    """One method on the model. Bytes and numbers of parameters."""

    method: str
    trainable: int
    """Numbers trained, less a classification head: as the paper counts."""
    head: int
    """Numbers of the head that is trained in full beside them."""
    total: int
    """Numbers that the adapted model computes with."""
    ratio: float
    """The base's parameters for one that is trained."""
    checkpoint_bytes: int
    """One adapted model's own file."""
    hundred_bytes: int
    """A hundred adapted models: the base once and an adapter each, or a hundred whole models."""
    memory: Memory | None
    """Of a training step; None where the model's forward pass could not be followed (`Plan.notes` says why)."""
    flops: int | None
    """Of a training step, forward and backward."""
    flops_ratio: float | None
    """Over full fine-tuning's."""
    fits: Fit | None
    """The smallest GPU for it, or how many of the largest; None where memory is."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure that the LoRA paper prints for this model, beside the plan's."""

    what: str
    printed: float
    planned: float


@dataclass(frozen=True)
class Plan:
    """What adapting a model takes, method by method (full fine-tuning first)."""

    model: str
    task: str
    parameters: int
    """Of the base."""
    batch: int
    length: int
    dtype: str
    checkpointing: bool
    optimizer: str
    device: str
    rows: tuple[Row, ...]
    paper: tuple[PaperFigure, ...] = ()
    notes: tuple[str, ...] = ()
