"""Everything that a run needs to go on where it stopped, in one object: counters, optimizer moments, random state."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import FileError
from lorakit.store.files import write_atomically
from lorakit.train.config import TrainConfig
from lorakit.train.flat import FlatParameters
from lorakit.train.optimizer import restore_state, state_faults, state_of
from lorakit.train.world import World

FILE = "state.safetensors"  # one file, so that tensors and counters can never be of two different steps
OPTIMIZER = "optimizer."


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


def save_state(
    folder: Path,
    state: TrainState,
    flat: FlatParameters,
    optimizer: torch.optim.Optimizer,
    best: Sequence[Tensor] | None,
    world: World,
) -> None:
    """Write the state to FILE in `folder`, whole or not at all; of several processes the first writes. Raises OutputError."""
    from safetensors.torch import save_file

    drawn = {"random.cpu": world.gathered(torch.get_rng_state())}
    if torch.cuda.is_available():
        drawn["random.cuda"] = world.gathered(torch.cuda.get_rng_state())
    if not world.first:
        return
    tensors = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(flat.parameters)}
    tensors |= {f"best.{i}": value for i, value in enumerate(best or ())}
    tensors |= {f"{OPTIMIZER}{key}": value for key, value in state_of(optimizer, flat).items()}
    tensors |= {f"{key}{_mark(rank)}": one for key, all_of in drawn.items() for rank, one in enumerate(all_of)}
    tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
    notes = {"state": json.dumps(asdict(state)), "processes": str(world.size)}
    write_atomically(folder / FILE, lambda path: save_file(tensors, str(path), metadata=notes))


def _mark(rank: int) -> str:
    """What a process's random state is called by, after the first one's."""
    return f".{rank}" if rank else ""


def _read(folder: Path) -> tuple[TrainState, dict[str, Tensor], int]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, framework="pt") as file:
            state = TrainState(**json.loads(file.metadata()["state"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            return state, tensors, int(file.metadata().get("processes", 1))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise FileError(f"the checkpoint in {folder} cannot be read:", [str(error)]) from error


def _faults(tensors: Mapping[str, Tensor], flat: FlatParameters) -> list[str]:
    """What does not fit: a parameter that is missing, of another shape, or one too many; no best values for all."""
    faults, parameters = [], flat.parameters
    for i, parameter in enumerate(parameters):
        if f"parameter.{i}" not in tensors:
            faults.append(f"parameter {i} is missing")
        elif tensors[f"parameter.{i}"].shape != parameter.shape:
            came = tuple(tensors[f"parameter.{i}"].shape)
            faults.append(f"parameter {i}: {came} in the checkpoint, {tuple(parameter.shape)} in the model")
    held = sum(key.startswith("parameter.") for key in tensors)
    if held > len(parameters):
        faults.append(f"{held} parameters in the checkpoint, {len(parameters)} in the model")
    best = [tuple(tensors[f"best.{i}"].shape) for i in range(len(flat.held)) if f"best.{i}" in tensors]
    if best and best != [tuple(one.shape) for one in flat.held]:
        faults.append("the best values are laid out in another way than this version of lorakit does")
    return faults + [f"{key} is missing" for key in ("random.cpu",) if key not in tensors]


def load_state(
    folder: Path, config: TrainConfig, flat: FlatParameters, optimizer: torch.optim.Optimizer, world: World
) -> tuple[TrainState, list[Tensor] | None]:
    """Restore parameters, optimizer and random state in place; returns (counters, the best adapter's values or None).

    Raises FileError, before anything is changed, for a checkpoint that is damaged, of another model, method or optimizer, or
    of another number of processes.
    """
    state, tensors, processes = _read(folder)
    if processes != world.size:
        raise FileError(
            f"the checkpoint in {folder} cannot be gone on with:",
            [f"it was written by {processes} processes, and these are {world.size}: start as many"],
        )
    moments = {key.removeprefix(OPTIMIZER): value for key, value in tensors.items() if key.startswith(OPTIMIZER)}
    faults = _faults(tensors, flat)
    if faults := faults or state_faults(config, moments, flat):
        raise FileError(f"the checkpoint in {folder} is not of this model and method:", faults)
    for i, parameter in enumerate(flat.parameters):
        parameter.data.copy_(tensors[f"parameter.{i}"])
    restore_state(optimizer, moments, flat)
    torch.set_rng_state(tensors[f"random.cpu{_mark(world.rank)}"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.cuda{_mark(world.rank)}"])
    best = [tensors[f"best.{i}"] for i in range(len(flat.held))] if "best.0" in tensors else None
    return state, best
