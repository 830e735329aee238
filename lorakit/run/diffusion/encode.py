"""Images and captions as the denoiser takes them. VAE and text encoder are frozen: each image and caption goes through once."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.data import DataConfig
from lorakit.data.examples import CaptionedImage
from lorakit.data.image_classes import open_image
from lorakit.errors import DataError, RecipeError
from lorakit.models.diffusion import LoadedPipeline, quiet_diffusers
from lorakit.run.diffusion.config import DiffusionConfig


@dataclass(frozen=True)
class Row:
    """One image with its caption. views: (mean, deviation) of the VAE's latent of the image, and of its mirror image where
    both are shown, each (channels, height, width), scaled as the denoiser takes them. states: (tokens, width)."""

    views: tuple[tuple[Tensor, Tensor], ...]
    states: Tensor
    key: str
    """A hash of the image's pixels and the caption."""


class Encoder:
    """A pipeline's VAE and text encoder at work. device: where they compute (and leave again); None = the CPU."""

    def __init__(self, loaded: LoadedPipeline, data: DataConfig, config: DiffusionConfig, device: str | None) -> None:
        self.pipeline, self.part, self.data, self.config = loaded.pipeline, loaded.part, data, config
        self.device = torch.device(device or "cpu")
        scale = int(self.pipeline.vae_scale_factor)
        self.pixels = config.resolution or int(_side(loaded.model.config.sample_size)) * scale
        patch = scale * int(getattr(loaded.model.config, "patch_size", None) or 1)
        if self.pixels % patch:
            raise RecipeError(f"diffusion.resolution must be a multiple of {patch} for this model, not {self.pixels}.")
        self.longest = self._longest()

    def _longest(self) -> int:
        """The most tokens of a caption."""
        if self.part == "unet":
            longest = int(self.pipeline.tokenizer.model_max_length)
            if self.data.max_length is not None:
                raise RecipeError(f"data.max_length: this model's captions always have {longest} tokens. Leave it out.")
            return longest
        default = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return self.data.max_length or int(default)

    @property
    def masks(self) -> bool:
        """Whether the denoiser is told which tokens of a caption are padding (PixArt), or takes padding as it is (CLIP)."""
        return self.part == "transformer"

    @torch.no_grad()
    def rows(self, examples: Sequence[CaptionedImage], source: str, progress: Callable[[int, int], None]) -> list[Row]:
        """Each example's Row. Raises DataError that lists every caption that is too long, and for a damaged image."""
        self._check_lengths(examples, source)
        vae, text = self.pipeline.vae, self.pipeline.text_encoder
        vae.to(self.device)
        text.to(self.device)
        try:
            states = {caption: self.states(caption) for caption in dict.fromkeys(one.text for one in examples)}
            rows = []
            for number, example in enumerate(examples, 1):
                pixels = self._pixels(example)
                key = hashlib.sha256(pixels.numpy().tobytes() + example.text.encode()).hexdigest()
                flipped = [pixels, pixels.flip(-1)] if self.config.flip else [pixels]
                rows.append(Row(tuple(self._moments(view) for view in flipped), states[example.text], key))
                progress(number, len(examples))
        finally:
            vae.to("cpu")
            text.to("cpu")
        return rows

    @torch.no_grad()
    def states(self, caption: str) -> Tensor:
        """The text encoder's states of a caption, (tokens, width), on the CPU; padding left out where it is masked."""
        options: dict[str, Any] = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}
        device = self.pipeline.text_encoder.device
        with quiet_diffusers(progress=False):
            if not self.masks:
                states: Tensor = self.pipeline.encode_prompt(caption, device, **options)[0][0]
                return states.cpu()
            states, mask = self.pipeline.encode_prompt(
                caption, device=device, max_sequence_length=self.longest, **options
            )[:2]
        return states[0, mask[0].bool()].cpu()

    def _check_lengths(self, examples: Sequence[CaptionedImage], source: str) -> None:
        if self.data.truncate:
            return
        faults = []
        with quiet_diffusers(progress=False):
            for example in examples:
                text = example.text.lower() if self.masks else example.text  # as PixArt's pipelines write it
                count = len(self.pipeline.tokenizer(text).input_ids)
                if count > self.longest:
                    faults.append(f"{example.path}: {count} tokens")
        if faults:
            listed = "".join(f"\n  - {fault}" for fault in faults)
            raise DataError(
                f"captions may have {self.longest} tokens for this model. Shorten these, or cut them (data.truncate):{listed}",
                source=source,
            )

    def _pixels(self, example: CaptionedImage) -> Tensor:
        """(3, pixels, pixels), from -1 to 1: scaled by the shorter side, cut to the middle."""
        import numpy
        from PIL import Image, ImageOps

        image = ImageOps.fit(open_image(example.path), (self.pixels, self.pixels), method=Image.Resampling.LANCZOS)
        return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        found = vae.encode(pixels[None].to(device=vae.device, dtype=vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return ((found.mean - shift) * scale)[0].float().cpu(), (found.std * scale)[0].float().cpu()


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else min(size))
