"""Encoded images as the training loop takes them: noised with draws that follow from the seed, the epoch and the batch alone."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorakit.data import BatchOrder
from lorakit.run.diffusion.config import DiffusionConfig
from lorakit.run.diffusion.encode import Row
from lorakit.run.diffusion.noise import Noise

LEVELS = 4
"""Noise levels at which each image is measured: evenly spread, so that two measurements can be compared."""


class DiffusionBatches:
    """The batches of a set of images; the same for the same seed, epoch and number, so that a resumed run sees the same.

    A batch: noisy_latents, target (batch, channels, height, width); timesteps, weights (batch,); encoder_hidden_states
    (batch, tokens, width); where padding is masked, caption_mask (batch, tokens).
    empty: the states of an empty caption, where captions are dropped. masks: whether padding is masked.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        noise: Noise,
        config: DiffusionConfig,
        *,
        batch_size: int,
        seed: int,
        group_by_length: bool,
        masks: bool,
        empty: Tensor | None = None,
    ) -> None:
        self.rows, self.noise, self.config, self.masks, self.empty = rows, noise, config, masks, empty
        self.seed = seed
        self.order = BatchOrder([len(row.states) for row in rows], batch_size, seed, group_by_length)

    def __len__(self) -> int:
        return len(self.order)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from number `start` on."""
        order = self.order.epoch(epoch)
        return (self._training(order[number], f"{epoch}:{number}") for number in range(start, len(order)))

    def evaluation(self) -> Iterator[dict[str, Tensor]]:
        """All rows at each of LEVELS noise levels, with noise that is the same every time; unweighted, nothing dropped."""
        for number, chosen in enumerate(self.order.evaluation()):
            draw = self._generator(f"evaluation:{number}")
            rows = [self.rows[one] for one in chosen]
            latents = torch.stack([row.views[0][0] for row in rows])
            noise = torch.randn(latents.shape, generator=draw)
            for level in range(LEVELS):
                step = (2 * level + 1) * self.noise.steps // (2 * LEVELS)
                timesteps = torch.full((len(rows),), step)
                yield self._batch(latents, noise, timesteps, None, [row.states for row in rows])

    def _training(self, chosen: Sequence[int], place: str) -> dict[str, Tensor]:
        config, draw = self.config, self._generator(place)
        rows = [self.rows[number] for number in chosen]
        views = [row.views[int(torch.randint(len(row.views), (), generator=draw))] for row in rows]
        mean, deviation = (torch.stack(parts) for parts in zip(*views, strict=True))
        latents = mean + deviation * torch.randn(mean.shape, generator=draw)
        noise = torch.randn(mean.shape, generator=draw)
        if config.noise_offset:
            noise = noise + config.noise_offset * torch.randn((*mean.shape[:2], 1, 1), generator=draw)
        timesteps = torch.randint(self.noise.steps, (len(rows),), generator=draw)
        dropped = torch.rand(len(rows), generator=draw) < config.caption_dropout
        states = [
            self.empty if drop and self.empty is not None else row.states
            for row, drop in zip(rows, dropped.tolist(), strict=True)
        ]
        return self._batch(latents, noise, timesteps, config.snr_gamma, states)

    def _batch(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, gamma: float | None, states: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        noisy, target = self.noise.noised(latents, noise, timesteps)
        batch = {
            "noisy_latents": noisy,
            "target": target,
            "timesteps": timesteps,
            "weights": self.noise.weights(timesteps, gamma),
            "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True),
        }
        if self.masks:
            counts = torch.tensor([len(one) for one in states])
            batch["caption_mask"] = (torch.arange(int(counts.max())) < counts[:, None]).long()
        return batch

    def _generator(self, place: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{place}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
