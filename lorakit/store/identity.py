"""Who an adapter is (the hash of its tensors and canonical configuration) and which base it belongs to."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.host import find_host
from lorakit.attach.method import Draft

# What may differ between two copies of one adapter: who wrote it, where its base was found, how it is to be opened.
NOT_IDENTITY = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"}
SAMPLES = 32  # values read of each parameter


def content_hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """ "sha256:..." of an adapter's canonical configuration and its tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    canonical = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    digest.update(json.dumps(canonical, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def fingerprint(model: nn.Module, without: Draft) -> str | None:
    """A short hash of the base's parameter names, shapes and sampled values; None on the meta device.

    Values are rounded to bfloat16 first, so that a base and its bfloat16 copy agree. Adapters' own tensors do not count;
    neither does what the adapter `without` replaces (a classification head is drawn at random when the base is loaded).
    """
    digest = hashlib.sha256()
    host = find_host(model)
    replaced = {f"{path}.{name}" for path, group in without.replaced.items() for name in group}
    known = None if host is None else host.flags
    for name, parameter in model.named_parameters():
        if name in replaced or (known is not None and name not in known):
            continue
        if parameter.device.type == "meta":
            return None
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLES)
        values = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.bfloat16)
        digest.update(f"{name}|{tuple(parameter.shape)}|".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return f"base:{digest.hexdigest()[:32]}"
