"""The optimizers of a run, and their state as plain tensors for a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import UsageError
from lorakit.models.quiet import quiet
from lorakit.train.config import ADAMW_8BIT, TrainConfig
from lorakit.train.flat import ALIGN, FlatParameters

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("codes", "scale", "qmap")
FUSED = ("cpu", "cuda")
"""Devices on which AdamW's update is one pass over a tensor."""


def optimizer_for(config: TrainConfig, flat: FlatParameters) -> torch.optim.Optimizer:
    """AdamW over `flat.held`, its moments in float32 or, for adamw8bit, in blocks of 256 of 8 bits (Dettmers et al., 2021).

    Moments of a tensor under 4096 elements (or of one apart from the buffers whose size is no multiple of 256) stay in
    float32. Raises UsageError where the 8-bit one is asked for and torchao is missing.
    """
    settings: dict[str, Any] = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == ADAMW_8BIT:
        return _eight_bit(flat.groups, config.rate, settings)
    fused = all(one.device.type in FUSED and type(one.data) is Tensor for one in flat.held)
    return torch.optim.AdamW(flat.groups, lr=config.rate, fused=fused or None, **settings)


def _eight_bit(groups: list[dict[str, object]], lr: float, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    try:
        with quiet(progress=False):
            from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            f"train.optimizer {ADAMW_8BIT} needs torchao, which is not installed. Install it (pip install 'lorakit[quantized]'), "
            "or take adamw."
        ) from error

    class Eager(AdamW8bit):  # type: ignore[misc]
        """torchao compiles its update, which takes a compiler and half a minute; adapters are too small to gain by it."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager(groups, lr=lr, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its learning rate: `rate` times the group's ratio."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(rate * group["ratio"])
        else:
            group["lr"] = rate * group["ratio"]


def state_of(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, Tensor]:
    """The moments and counts as plain tensors: "NUMBER.exp_avg", or of 8 bits "NUMBER.exp_avg.codes", ".scale", ".qmap"."""
    found: dict[str, Tensor] = {}
    for number, one in enumerate(flat.held):
        for key, value in optimizer.state[one].items():
            inner = getattr(value, "tensor_attrs", None)
            if inner is None:
                found[f"{number}.{key}"] = value.detach()
            else:
                found |= {f"{number}.{key}.{name}": getattr(value, name) for name in inner}
    return found


def state_faults(config: TrainConfig, tensors: Mapping[str, Tensor], flat: FlatParameters) -> list[str]:
    """What of a stored state does not fit these parameters and this optimizer."""
    faults = []
    known = {f"{number}.{key}" for number in range(len(flat.held)) for key in ("step", *MOMENTS)}
    for key in tensors:
        number, _, rest = key.partition(".")
        name, _, part = rest.partition(".")
        if f"{number}.{name}" not in known or (part and (part not in PARTS or config.optimizer != ADAMW_8BIT)):
            faults.append(f"optimizer state {key} is of another optimizer, or of more tensors than there are")
            continue
        shape, wanted = tuple(tensors[key].shape), tuple(flat.held[int(number)].shape)
        if part == "scale":
            wanted = (flat.held[int(number)].numel() // ALIGN,)
        if name in MOMENTS and part != "qmap" and shape != wanted:
            faults.append(f"optimizer state {key}: {shape} in the checkpoint, {wanted} expected")
    for i in range(len(flat.held) if tensors else 0):
        faults += [
            f"optimizer state {i}.{key} is missing"
            for key in ("step", *MOMENTS)
            if f"{i}.{key}" not in tensors and not {f"{i}.{key}.{part}" for part in PARTS} <= tensors.keys()
        ]
    return faults


def restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], flat: FlatParameters) -> None:
    """Put a state of `state_of` back, looked at by `state_faults` before."""
    for number, one in enumerate(flat.held):
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == str(number)}
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state: dict[str, Any] = {}
        for key, value in own.items():
            name, _, part = key.partition(".")
            if name == "step":
                state[name] = value.to(one.device) if fused else value
            elif not part:
                state[name] = value.to(one.device)
            elif name not in state:
                state[name] = _blocks(name, own, one)
        optimizer.state[one] = state


def _blocks(name: str, own: Mapping[str, Tensor], one: Tensor) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale, qmap = (own[f"{name}.{part}"].to(one.device) for part in PARTS)
    return OptimState8bit(codes, scale, qmap, signed=name == MOMENTS[0], dtype=one.dtype)  # type: ignore[no-any-return]
