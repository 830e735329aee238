"""Text-to-image pipelines of `diffusers`: loaded whole, checked for the parts that training needs."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import ModelError, UsageError
from lorakit.models.hub import is_hub_id
from lorakit.models.load import parse_dtype
from lorakit.models.quiet import quiet

INDEX = "model_index.json"
DENOISERS = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "transformer"}
"""Classes of denoisers that can be trained, and the part of a pipeline that each is."""


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusion pipeline. model: its denoiser; part: what the pipeline calls that ("unet" or "transformer")."""

    pipeline: Any
    model: Any
    part: str
    tokenizer: Any
    name: str
    source: str


def require_diffusers() -> Any:
    """The module `diffusers`. Raises UsageError that says how to install what is missing."""
    try:
        importlib.import_module("PIL")
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise UsageError(
            f'text-to-image needs the package {error.name}, which is not installed: pip install "lorakit[diffusion]".'
        ) from error


def load_pipeline(
    name: str, *, dtype: str | torch.dtype = "float32", revision: str | None = None, progress: bool = False
) -> LoadedPipeline:
    """Load a text-to-image pipeline from a folder (or hub id) in diffusers' layout; on the CPU, in eval mode, frozen.

    dtype: of all its weights. Weights are read from safetensors only and nothing of the repository is executed.
    Raises UsageError for a bad argument or a missing package, ModelError for what cannot be found, read or trained here.
    """
    diffusers, kind = require_diffusers(), parse_dtype(dtype)
    folder = Path(name).expanduser()
    place = str(folder) if folder.exists() else name
    if folder.exists():
        _check_folder(folder)
    elif not is_hub_id(name):
        raise ModelError(f"no pipeline {name!r}: there is no such folder, and it is no hub id (owner/name).")
    with quiet_diffusers(progress=progress and not folder.exists()):
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                place, dtype=kind, revision=revision, use_safetensors=True, **_without_safety(folder)
            )
        except Exception as error:  # the hub, damaged files, parts that do not fit: each library raises its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"the pipeline {name!r} cannot be loaded: {reason}") from error
    part = _check_parts(pipeline, name)
    model = getattr(pipeline, part)
    model.register_to_config(_name_or_path=place)  # a saved adapter names its base by this
    for one in pipeline.components.values():
        if isinstance(one, torch.nn.Module):
            one.requires_grad_(False).eval()
    return LoadedPipeline(pipeline, model, part, pipeline.tokenizer, name, place)


def _without_safety(folder: Path) -> dict[str, Any]:
    """Leave a Stable Diffusion's safety checker out: it is as large as the text encoder and training has no use for it."""
    index = _read_index(folder) if folder.exists() else {}
    return {"safety_checker": None} if not folder.exists() or "safety_checker" in index else {}


def _check_folder(folder: Path) -> None:
    if not (folder / INDEX).is_file():
        what = "a transformers model" if (folder / "config.json").is_file() else "no pipeline"
        raise ModelError(
            f"{folder} is {what}: expected a folder with {INDEX}, as diffusers' save_pretrained writes it "
            "(a single .safetensors checkpoint is turned into one by from_single_file and save_pretrained)."
        )
    _read_index(folder)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError("no _class_name in it")
        return index
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / INDEX} is damaged: {error}. Fetch the pipeline again.") from error


def _check_parts(pipeline: Any, name: str) -> str:
    """The part that denoises. Raises ModelError for a pipeline of another make than those that are known here."""
    parts = pipeline.components
    found = [key for key in ("unet", "transformer") if parts.get(key) is not None]
    kinds = [type(parts[key]).__name__ for key in found]
    if len(found) != 1 or DENOISERS.get(kinds[0]) != found[0]:
        raise ModelError(
            f"{name} is a {type(pipeline).__name__} whose denoiser is {', '.join(kinds) or 'missing'}; expected "
            f"{' or '.join(DENOISERS)} (Stable Diffusion 1 and 2, PixArt)."
        )
    if type(parts.get("vae")).__name__ != "AutoencoderKL":
        raise ModelError(f"{name}: its VAE is a {type(parts.get('vae')).__name__}; expected AutoencoderKL.")
    missing = [key for key in ("text_encoder", "tokenizer", "scheduler") if parts.get(key) is None]
    if missing:
        raise ModelError(f"{name} lacks its {', '.join(missing)}: training needs the whole pipeline.")
    denoiser = parts[found[0]]
    if parts.get("text_encoder_2") is not None or getattr(denoiser.config, "addition_embed_type", None):
        raise ModelError(
            f"{name} has the shape of Stable Diffusion XL, which is not supported. Use one of version 1 or 2."
        )
    latent, taken = parts["vae"].config.latent_channels, denoiser.config.in_channels
    if latent != taken:
        raise ModelError(
            f"{name}: the denoiser takes {taken} channels and the VAE gives {latent}: this is no text-to-image pipeline "
            "(an inpainting one, say)."
        )
    return found[0]


@contextmanager
def quiet_diffusers(*, progress: bool) -> Iterator[None]:
    """Only errors of diffusers and transformers, and progress bars only where `progress`; what was set before returns."""
    logging: Any = importlib.import_module("diffusers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        with quiet(progress=progress):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
