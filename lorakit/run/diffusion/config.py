"""The settings of text-to-image training."""

from dataclasses import dataclass

from lorakit.errors import UsageError

TEXT_TO_IMAGE = "text-to-image"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What an adapter is put on where a recipe does not name it: the projections of every attention."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How images are prepared and noised (task text-to-image alone). Raises UsageError for a value that makes no sense."""

    resolution: int | None = None
    """Pixels of a side; images are scaled to it by their shorter side and cut to their middle. None = the denoiser's own."""
    flip: bool = False
    """Show each image mirrored half of the time, at random."""
    noise_offset: float = 0.0
    """Strength of a noise that is one number a channel: it lets a model learn very dark and bright images; 0.1 is usual."""
    snr_gamma: float | None = None
    """Weigh the loss by min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556, section 3.4); 5 is usual; None = unweighted."""
    caption_dropout: float = 0.0
    """Share of captions replaced by an empty one, which keeps classifier-free guidance (Ho & Salimans 2022) in shape."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise UsageError(f"diffusion.resolution must be at least 1, not {self.resolution}.")
        if not self.noise_offset >= 0:
            raise UsageError(f"diffusion.noise_offset must not be negative, not {self.noise_offset}.")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise UsageError(f"diffusion.snr_gamma must be above 0 (leave it empty for none), not {self.snr_gamma}.")
        if not 0 <= self.caption_dropout < 1:
            raise UsageError(f"diffusion.caption_dropout must be in [0, 1), not {self.caption_dropout}.")
