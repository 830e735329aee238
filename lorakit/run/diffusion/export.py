"""An adapter as diffusers reads it: pytorch_lora_weights.safetensors."""

from pathlib import Path

from torch import Tensor, nn

from lorakit.attach.host import check_names, host_of
from lorakit.attach.method import Pair
from lorakit.errors import UsageError
from lorakit.run.folder import DIFFUSERS
from lorakit.store.files import write_bytes


def export_diffusers(model: nn.Module, folder: Path, part: str, name: str) -> Path:
    """Write adapter `name` of a denoiser to `folder`/pytorch_lora_weights.safetensors; returns the file.

    part: "unet" or "transformer", which the keys begin with. Readers of this layout take an update as lora_B lora_A, at
    strength 1 (it has no place for an alpha), so each scaling is multiplied into its lora_B: exactly where it is a power of
    two, else rounded once. A start taken out of the base (PiSSA) is subtracted in the file, so that the base stays whole.
    Raises UsageError for what the layout has no keys for, OutputError.
    """
    from safetensors.torch import save

    host = host_of(model)
    with host.lock:
        check_names(host, {name: 1.0})
        host.current()
        draft = host.records[name].draft
        tensors: dict[str, Tensor] = {}
        for path, pair in draft.pairs.items():
            _check(path, pair)
            down, up = pair.factors()
            tensors[f"{part}.{path}.lora_A.weight"] = down
            tensors[f"{part}.{path}.lora_B.weight"] = pair.scale * up.t().reshape(
                up.shape[1], -1, *[1] * (down.dim() - 2)
            )
        others = [*draft.replaced, *draft.raw, *draft.tokens, *draft.tied]
    if others:
        raise UsageError(
            f"diffusers' layout has no keys for {', '.join(others[:5])}: they are no plain low-rank updates."
        )
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    target = folder / DIFFUSERS
    write_bytes(target, save(plain, metadata={"format": "pt"}))
    return target


def _check(path: str, pair: Pair) -> None:
    if pair.magnitude is not None or pair.bias is not None:
        raise UsageError(f"diffusers' layout has no keys for {path}'s magnitude or bias (use_dora, lora_bias).")
