"""Who an adapter is (the hash of its tensors and canonical configuration) and which base it belongs to."""

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import parameters_of
from lorakit.attach.host import find_host
from lorakit.attach.quantized import dense_shape, is_quantized
from lorakit.store.peft_config import DEFAULTS, SETS

# What may differ between two copies of one adapter: who wrote it, where its base was found, how it is to be opened.
NOT_IDENTITY = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"}
LUMP = 1 << 19  # bytes that are hashed in one go
SAMPLES = 8  # values read of each parameter
ROUNDING = 2.0**-6  # how far a copy in half precision may stray from a value, relative to it (and 1e-6)
WIDENED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # types that torch.cat joins without loss


def canonical(config: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """What a configuration says of the adapter itself: defaults left out (each version of PEFT writes others), sets in order.

    defaults: of the method's fields; PEFT's for LoRA where they are not given.
    """
    said = {key: value for key, value in config.items() if key not in NOT_IDENTITY and value != defaults.get(key)}
    return {
        key: sorted(value, key=str) if key in SETS and isinstance(value, list) else value for key, value in said.items()
    }


def content_hash(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], defaults: Mapping[str, Any] = DEFAULTS
) -> str:
    """ "sha256:..." of an adapter's canonical configuration and its tensors' names, types, shapes and bytes."""
    return digest_of(content_of(config, tensors, defaults))


def content_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], defaults: Mapping[str, Any] = DEFAULTS
) -> list[bytes | memoryview]:
    """What `content_hash` is the hash of, in pieces; the tensors' bytes are views of them."""
    pieces: list[bytes | memoryview] = [json.dumps(canonical(config, defaults), sort_keys=True).encode()]
    for name in sorted(tensors):
        tensor = tensors[name]
        pieces.append(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        pieces.append(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return pieces


def digest_of(pieces: Iterable[bytes | memoryview]) -> str:
    """ "sha256:..." of the pieces, one behind the other.

    Small ones are joined: each update gives the interpreter's lock up and waits for it, and in a thread beside a busy one
    that takes longer than the hashing.
    """
    digest, waiting, size = hashlib.sha256(), list[bytes | memoryview](), 0
    for piece in pieces:
        if size + len(piece) > LUMP:
            digest.update(b"".join(waiting))
            waiting, size = [], 0
        if len(piece) > LUMP:
            digest.update(piece)
        else:
            waiting.append(piece)
            size += len(piece)
    digest.update(b"".join(waiting))
    return f"sha256:{digest.hexdigest()}"


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str | None:
    """ "base:<hash of parameter names and shapes>:<sampled values>" of a base; None on the meta device.

    The values stand there in bfloat16 as base64, so that `same_base` knows a copy in another precision. Adapters' own
    tensors do not count; neither do the parameters named in `without`: those that the adapter replaces (a classification
    head is drawn at random when the base is loaded). A quantised parameter has the shape of its matrix and, for values,
    NaN, which `same_base` takes for any: a base is known again whether one copy, both or none are quantised.
    """
    host = find_host(model)
    known = None if host is None else host.flags
    named = ((f"{path}.{key}" if path else key, parameter) for path, key, parameter in parameters_of(model))
    own = [(name, one) for name, one in named if name not in without and (known is None or name in known)]
    names: list[str] = []
    samples: list[Tensor] = []
    for name, parameter in own:
        if parameter.is_meta:
            return None
        shape = parameter.shape
        if is_quantized(parameter):
            shape = dense_shape(parameter)
            samples.append(torch.full((min(SAMPLES, shape.numel()),), torch.nan))
        else:
            samples.append(_sample(parameter.data))
        names.append(f"{name}|{(*shape,)}|")
    digest = hashlib.sha256("".join(names).encode())
    values = torch.cat([_joinable(sample) for sample in samples]).to(torch.bfloat16) if samples else torch.empty(0)
    encoded = base64.b64encode(values.view(torch.int16).numpy().tobytes()) if samples else b""
    return f"base:{digest.hexdigest()[:32]}:{encoded.decode()}"


def same_base(one: object, other: object) -> bool:
    """Whether two fingerprints are of one base, in whatever precision each copy was."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str) or one.count(":") != 2 or other.count(":") != 2:
        return False
    if one.rpartition(":")[0] != other.rpartition(":")[0]:
        return False
    try:
        ours, theirs = (_values(text.rpartition(":")[2]) for text in (one, other))
    except (binascii.Error, ValueError):
        return False
    if ours.shape != theirs.shape:
        return False
    known = ~(ours.isnan() | theirs.isnan())
    return torch.allclose(ours[known], theirs[known], rtol=ROUNDING, atol=1e-6)


def short(fingerprint_: object) -> str:
    """A fingerprint as a message shows it."""
    return str(fingerprint_).rpartition(":")[0] or str(fingerprint_)


def _values(encoded: str) -> Tensor:
    raw = bytearray(base64.b64decode(encoded, validate=True))
    return torch.frombuffer(raw, dtype=torch.int16).view(torch.bfloat16).double() if raw else torch.empty(0)


def _joinable(sample: Tensor) -> Tensor:
    """The sample as torch.cat can join it with others."""
    sample = sample.cpu() if sample.device.type != "cpu" else sample
    return sample if sample.dtype in WIDENED else sample.to(torch.bfloat16)


def _sample(tensor: Tensor) -> Tensor:
    """SAMPLES values of a tensor at even distances; all of them where it has fewer."""
    count = tensor.numel()
    step = max(1, count // SAMPLES)
    if type(tensor) is Tensor and tensor.is_contiguous():  # one view in place of three: a load spends its time here
        return tensor.as_strided((min(SAMPLES, count),), (step,))
    return tensor.reshape(-1)[::step][:SAMPLES]
