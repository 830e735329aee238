"""The denoising loss: a clean latent is noised, and the denoiser is asked for what the scheduler's prediction type says.

x_t = sqrt(a_t) x + sqrt(1 - a_t) e  (Ho et al. 2020, arXiv 2006.11239, equation 4), with e, x or
v = sqrt(a_t) e - sqrt(1 - a_t) x  (Salimans & Ho 2022, arXiv 2202.00512, section 4) to be found from x_t, t and the caption.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.train.loss import Batch, LossSum, Objective

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Noise:
    """The forward process of a pipeline: its scheduler's noise levels and prediction type, whatever sampler that is.

    Raises ModelError for a scheduler that does not noise by variance-preserving diffusion (flow matching, say).
    """

    def __init__(self, scheduler: Any, name: str) -> None:
        from diffusers import DDPMScheduler

        config = scheduler.config
        self.prediction = config.get("prediction_type", "epsilon")
        if "beta_schedule" not in config or self.prediction not in PREDICTIONS:
            raise ModelError(
                f"{name}: its scheduler is a {type(scheduler).__name__} that predicts {self.prediction!r}; expected one "
                f"with a beta_schedule that predicts {', '.join(PREDICTIONS)} (flow matching is not supported)."
            )
        kind: Any = DDPMScheduler
        self.ddpm: Any = kind.from_config(config)
        self.steps = int(self.ddpm.config.num_train_timesteps)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy latents, target), both of the latents' shape (batch, channels, height, width). timesteps: (batch,)."""
        noisy: Tensor = self.ddpm.add_noise(latents, noise, timesteps)
        if self.prediction == "epsilon":
            return noisy, noise
        target: Tensor = latents
        if self.prediction == "v_prediction":
            target = self.ddpm.get_velocity(latents, noise, timesteps)
        return noisy, target

    def weights(self, timesteps: Tensor, gamma: float | None) -> Tensor:
        """The loss's weight at each timestep, (batch,): 1, or min(SNR, gamma) seen from what is predicted.

        Hang et al. 2023, arXiv 2303.09556, section 3.4: over SNR for the noise, over SNR + 1 for the velocity.
        """
        if gamma is None:
            return torch.ones(len(timesteps))
        kept: Tensor = self.ddpm.alphas_cumprod[timesteps].float()
        snr = kept / (1 - kept)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, which is 1 where nothing of the image is left
        bounded = snr.clamp(max=gamma)
        return bounded if self.prediction == "sample" else bounded / (snr + 1)


def denoising_objective(part: str, pixels: int) -> Objective:
    """The squared error of the denoiser's prediction, averaged over a row's latent, weighed and summed over the rows.

    part: "unet" or "transformer". pixels: the images' side, which PixArt's largest models are told.
    """
    predict: Callable[[nn.Module, Batch, int], Tensor] = _unet if part == "unet" else _transformer

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        error = (predict(model, batch, pixels).float() - batch["target"]) ** 2
        rows = error.mean(dim=(1, 2, 3))  # (batch,)
        return LossSum((rows * batch["weights"]).sum(), len(rows))

    return Objective(loss, lambda batch: batch["target"].shape[0])


def _unet(model: nn.Module, batch: Batch, pixels: int) -> Tensor:
    states = batch["encoder_hidden_states"]
    noisy = batch["noisy_latents"].to(states.dtype)
    result: Tensor = model(noisy, batch["timesteps"], encoder_hidden_states=states, return_dict=False)[0]
    return result


def _transformer(model: Any, batch: Batch, pixels: int) -> Tensor:
    states = batch["encoder_hidden_states"]
    noisy = batch["noisy_latents"].to(states.dtype)
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        rows = len(noisy)
        told = {"resolution": noisy.new_full((rows, 2), pixels), "aspect_ratio": noisy.new_ones(rows, 1)}
    result: Tensor = model(
        noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=batch["caption_mask"],
        timestep=batch["timesteps"],
        added_cond_kwargs=told,
        return_dict=False,
    )[0]
    return result[:, : noisy.shape[1]]  # behind the prediction stands the variance, where the model learnt that too
