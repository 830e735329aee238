"""What a training run needs before anything is rented: parameters, memory, bytes on disk, FLOPs. No weight is ever allocated."""

from lorakit.plan.api import FULL, plan
from lorakit.plan.gpus import GPU, GPUS, Fit
from lorakit.plan.memory import OPTIMIZERS, Memory
from lorakit.plan.result import PaperFigure, Plan, Row
from lorakit.plan.shapes import SHAPES, Shape

__all__ = [
    "FULL",
    "GPU",
    "GPUS",
    "OPTIMIZERS",
    "SHAPES",
    "Fit",
    "Memory",
    "PaperFigure",
    "Plan",
    "Row",
    "Shape",
    "plan",
]
