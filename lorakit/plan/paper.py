"""The LoRA paper's figures for a shape beside the plan's (Hu et al. 2021, section 4.2)."""

from collections.abc import Sequence

from lorakit.plan.result import PaperFigure, Row
from lorakit.plan.shapes import Shape


def figures(shape: Shape | None, rows: Sequence[Row]) -> tuple[PaperFigure, ...]:
    """None but for a shape that the paper prints figures of; of an adapted row the first one's."""
    if shape is None or shape.printed_total is None:
        return ()
    full, adapted = rows[0], rows[1] if len(rows) > 1 else None
    found = [PaperFigure("parameters", shape.printed_total, full.total)]
    if adapted is not None:
        found.append(PaperFigure("parameters for one trained", shape.printed_total / adapted.trainable, adapted.ratio))
    held = "training memory, full fine-tuning"
    found.append(PaperFigure(f"{held}, weights and moments, bytes", shape.paper["full"], _held(full)))
    found.append(PaperFigure(f"{held}, with gradients, bytes", shape.paper["full"], _held(full, gradients=True)))
    if adapted is not None:
        found.append(PaperFigure("training memory, LoRA, bytes", shape.paper["lora"], _held(adapted)))
    found.append(PaperFigure("100 models, full fine-tuning, bytes", shape.paper["full_100"], full.hundred_bytes))
    if adapted is not None:
        found.append(PaperFigure("100 models, LoRA, bytes", shape.paper["lora_100"], adapted.hundred_bytes))
    return tuple(found)


def _held(row: Row, *, gradients: bool = False) -> float:
    """Weights and optimizer state: what the paper's argument counts, "we do not need to store the optimizer states"."""
    memory = row.memory
    if memory is None:
        return float("nan")
    return memory.weights + memory.optimizer + (memory.gradients if gradients else 0)
