"""An adapter merged into its base, written as a plain transformers folder."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.attach.merge import merge
from lorakit.errors import OutputError, UsageError
from lorakit.models.quiet import quiet
from lorakit.run.recipe import IMAGE_CLASSIFICATION
from lorakit.run.subject import NAME, Subject


@dataclass(frozen=True)
class Export:
    """What was written. max_logit_difference: the largest change of a logit on the probe, merged against unmerged."""

    folder: Path
    max_logit_difference: float
    bytes: int


def export_merged(subject: Subject, folder: str | Path, *, overwrite: bool = False) -> Export:
    """Merge the subject's adapter into its base and write both as one transformers folder, tokenizer included.

    The folder appears whole or not at all. Raises UsageError without an adapter, OutputError where something stands there.
    """
    if subject.adapter is None:
        raise UsageError("nothing to merge: name a run's folder or an adapter.")
    target = Path(folder).expanduser()
    _check_target(target, subject, overwrite)
    from safetensors import SafetensorError

    report = merge(subject.model, NAME, keep=False, probe=_probe(subject))
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        try:
            with quiet(progress=False):
                subject.model.save_pretrained(scratch)
                subject.tokenizer.save_pretrained(scratch)
            scratch.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says, a full disk too
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"cannot write {target}: {why}. Nothing was left behind.") from error
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Export(target, report.max_logit_difference or 0.0, size)


def _check_target(target: Path, subject: Subject, overwrite: bool) -> None:
    """Never replace what is no model, nor what the merged model is made from."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file. Choose another place: a model needs a folder.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} is not empty. Choose another folder, or replace it (--overwrite).")
    if not (target / "config.json").is_file():
        raise OutputError(f"{target} holds no model (no config.json), so it is not replaced. Choose another folder.")
    for source in (subject.adapter, Path(subject.name).expanduser()):
        if source is not None and source.exists() and source.resolve().is_relative_to(target.resolve()):
            raise OutputError(f"{target} holds {source}, which is merged here. Choose another folder.")


def _probe(subject: Subject) -> dict[str, Any]:
    """A short batch on which merged and unmerged logits are compared."""
    if subject.task == IMAGE_CLASSIFICATION:
        from PIL import Image

        picture = Image.linear_gradient("L").convert("RGB")
        pixels = subject.tokenizer(images=[picture], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(subject.model.device, subject.model.dtype)}
    encoded = subject.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    probe = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if subject.task == "seq2seq":
        probe["decoder_input_ids"] = torch.full((1, 1), subject.model.config.decoder_start_token_id)
    return {key: value.to(subject.model.device) for key, value in probe.items()}
