"""Everything that a run needs to go on where it stopped, in one object: counters, optimizer moments, random state."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.errors import FileError
from lorakit.store.files import write_atomically

FILE = "state.safetensors"  # one file, so that tensors and counters can never be of two different steps


@dataclass
class TrainState:
    """How far a run is. Counters only; `save_state` adds the optimizer's moments and the random state."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """The epoch that the next batch belongs to."""
    batch: int = 0
    """The next batch in that epoch."""
    tokens: int = 0
    """Real tokens seen (padding left out)."""
    examples: int = 0
    """Examples seen."""
    seconds: float = 0.0
    """Training time, evaluation left out."""
    best_value: float | None = None
    """The best value of the chosen metric so far."""
    best_step: int | None = None
    """The step after which it was measured."""
    scaler: dict[str, float] | None = None
    """fp16's loss scaling; None for the other precisions."""


def snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters' values."""
    return [parameter.detach().clone() for parameter in parameters]


def restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Put copied values back."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def save_state(
    folder: Path,
    state: TrainState,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Sequence[Tensor] | None,
) -> None:
    """Write the state to FILE in `folder`, whole or not at all. Raises OutputError."""
    from safetensors.torch import save_file

    tensors = {f"parameter.{i}": parameter.detach().cpu() for i, parameter in enumerate(parameters)}
    tensors |= {f"best.{i}": value.cpu() for i, value in enumerate(best or ())}
    for i, parameter in enumerate(parameters):
        tensors |= {f"optimizer.{i}.{key}": value.detach().cpu() for key, value in optimizer.state[parameter].items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    notes = {"state": json.dumps(asdict(state))}
    write_atomically(folder / FILE, lambda path: save_file(tensors, str(path), metadata=notes))


def _read(folder: Path) -> tuple[TrainState, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, framework="pt") as file:
            state = TrainState(**json.loads(file.metadata()["state"]))
            return state, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise FileError(f"the checkpoint in {folder} cannot be read:", [str(error)]) from error


def _faults(tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> list[str]:
    """What does not fit: a parameter that is missing, of another shape, or one too many."""
    faults = []
    for i, parameter in enumerate(parameters):
        if f"parameter.{i}" not in tensors:
            faults.append(f"parameter {i} is missing")
        elif tensors[f"parameter.{i}"].shape != parameter.shape:
            came = tuple(tensors[f"parameter.{i}"].shape)
            faults.append(f"parameter {i}: {came} in the checkpoint, {tuple(parameter.shape)} in the model")
    held = sum(key.startswith("parameter.") for key in tensors)
    if held > len(parameters):
        faults.append(f"{held} parameters in the checkpoint, {len(parameters)} in the model")
    return faults + [f"{key} is missing" for key in ("random.cpu",) if key not in tensors]


def load_state(
    folder: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[TrainState, list[Tensor] | None]:
    """Restore parameters, optimizer and random state in place; returns (counters, the best adapter's values or None).

    Raises FileError, before anything is changed, for a checkpoint that is damaged or of another model or method.
    """
    state, tensors = _read(folder)
    faults = _faults(tensors, parameters)
    if faults:
        raise FileError(f"the checkpoint in {folder} is not of this model and method:", faults)
    restore(parameters, [tensors[f"parameter.{i}"] for i in range(len(parameters))])
    for i, parameter in enumerate(parameters):
        prefix = f"optimizer.{i}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key != "step" else value for key, value in moments.items()
        }
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    best = [tensors[f"best.{i}"] for i in range(len(parameters))] if "best.0" in tensors else None
    return state, best
