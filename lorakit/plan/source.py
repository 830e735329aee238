"""From what a user names to a model on the meta device: the configuration is read, never a weight."""

import copy
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import ModelError, UsageError
from lorakit.models import TASKS
from lorakit.models.hub import is_hub_id
from lorakit.models.quiet import quiet
from lorakit.plan.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, and how to build it on the meta device."""

    name: str
    config: Any  # a transformers PreTrainedConfig
    task: str
    dtype: torch.dtype | None  # None: the source says nothing
    shape: Shape | None = None

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model in training mode, every parameter on the meta device. Raises ModelError where transformers has none."""
        import transformers
        from transformers.initialization import no_init_weights

        auto = getattr(transformers, TASKS[self.task])
        try:
            with quiet(progress=False), torch.device("meta"), no_init_weights():
                model: Any = auto.from_config(copy.deepcopy(self.config), dtype=dtype)
            model.tie_weights()  # done with the initial values elsewhere
        except Exception as error:  # a configuration that transformers cannot build raises nearly anything
            text = " ".join(str(error).split())[:400]
            raise ModelError(
                f"{self.name}: no model for {self.task} can be built ({type(error).__name__}: {text})."
            ) from error
        trained: nn.Module = model.train()
        return trained


def find(model: Any, task: str | None) -> Blueprint:
    """The blueprint of a named shape, a folder with config.json (or that file), a hub id, a config or a transformers model.

    task: None = the shape's, or what the configuration's architecture is trained for.
    Raises UsageError, ModelError.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; expected one of: {', '.join(TASKS)}.")
    if isinstance(model, str | os.PathLike):
        return _named(os.fspath(model), task)
    from transformers import PreTrainedConfig

    config = getattr(model, "config", model) if isinstance(model, nn.Module) else model
    if not isinstance(config, PreTrainedConfig):
        raise UsageError(
            f"plan expects a name, a folder, a transformers config or a transformers model, not {type(model).__name__}: "
            "it has to know the inputs of a training step."
        )
    said = next(model.parameters()).dtype if isinstance(model, nn.Module) else getattr(config, "dtype", None)
    name = config.name_or_path or config.model_type
    architectures = [type(model).__name__] if isinstance(model, nn.Module) else config.architectures
    return Blueprint(name, config, task or _task(name, architectures), said)


def _named(name: str, task: str | None) -> Blueprint:
    from transformers import AutoConfig

    shape = SHAPES.get(name.lower())
    if shape is not None:
        config = AutoConfig.for_model(shape.model_type, **shape.config)
        return Blueprint(name.lower(), config, task or shape.task, getattr(torch, shape.dtype), shape)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        raise UsageError(f"{name} is a GGUF file: name its shape ({_near(name)}) or a folder with its config.json.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name} is no model folder: expected config.json in it.")
    if not path.exists() and not is_hub_id(name):
        raise ModelError(f"no model {name!r}: there is no such folder, and it is no hub id (owner/name). {_near(name)}")
    config = _read(name, path)
    return Blueprint(name, config, task or _task(name, config.architectures), getattr(config, "dtype", None))


def _read(name: str, path: Path) -> Any:
    """The configuration of a folder, a config.json or a hub id; of the hub only that file is fetched."""
    from transformers import AutoConfig

    try:
        with quiet(progress=False):
            return AutoConfig.from_pretrained(path if path.exists() else name, trust_remote_code=False)
    except Exception as error:  # damaged JSON, an unknown architecture, a hub that does not answer
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"no configuration for {name!r} can be read ({type(error).__name__}: {text}). {_near(name)}"
        ) from error


def _near(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Shapes known by name: {', '.join(SHAPES)}.{hint}"


_TASK_OF: Mapping[str, str] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "sequence-classification",
    "ForMaskedLM": "sequence-classification",  # what an encoder is adapted to
}


def _task(name: str, architectures: list[str] | None) -> str:
    for architecture in architectures or []:
        for ending, task in _TASK_OF.items():
            if architecture.endswith(ending):
                return task
    raise UsageError(
        f"{name} does not say what it is trained for ({architectures}): give task, one of {', '.join(TASKS)}."
    )
