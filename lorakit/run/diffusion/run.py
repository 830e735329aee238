"""`task: text-to-image`: a run whose model is a pipeline's denoiser and whose rows are images with captions."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.attach.api import use
from lorakit.data import Dataset
from lorakit.data.images import load_captioned_images
from lorakit.models.diffusion import load_pipeline, require_diffusers
from lorakit.run.device import best_device
from lorakit.run.diffusion.batches import DiffusionBatches
from lorakit.run.diffusion.check import check_text_to_image
from lorakit.run.diffusion.encode import Encoder, Row
from lorakit.run.diffusion.noise import Noise, denoising_objective
from lorakit.run.folder import DIFFUSERS
from lorakit.run.result import RunResult
from lorakit.run.train import Run
from lorakit.store.convert import convert
from lorakit.train.config import TrainConfig
from lorakit.train.loss import Objective, mean_loss


class TextToImageRun(Run):
    """Only the adapter on the denoiser is trained; VAE and text encoder run once over the data, before training."""

    def go(self, *, resume: bool, overwrite: bool) -> RunResult:
        check_text_to_image(self.recipe)
        require_diffusers()
        return super().go(resume=resume, overwrite=overwrite)

    def read_data(self) -> None:
        self.listener.stage("reading images")
        data = self.recipe.data
        self.train_set = self._images(data.train, data.limit)
        self.eval_set = self._images(data.eval, data.eval_limit)
        self.test_set = self._images(data.test, data.eval_limit)

    def _images(self, source: str | None, limit: int | None) -> Dataset | None:
        seed = self.recipe.train.seed
        return None if source is None else load_captioned_images(source, limit=limit, seed=seed)

    def load_model(self) -> None:
        self.listener.stage(f"loading {self.recipe.model}")
        torch.manual_seed(self.recipe.train.seed)  # dropout draws from the global generator
        base = self.recipe.base
        self.loaded: Any = load_pipeline(self.recipe.model, dtype=base.dtype, revision=base.revision, progress=True)
        self.noise = Noise(self.loaded.pipeline.scheduler, self.recipe.model)
        device = best_device()
        self.encoder = Encoder(self.loaded, self.recipe.data, self.recipe.diffusion, device)
        self.model = self.loaded.model
        if device is not None:
            self.model.to(device)
        if self.recipe.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.adapt()

    def encode(self) -> None:
        self.listener.stage("encoding images and captions")
        self.train_rows = self._encode(self.train_set)
        self.eval_rows = self._encode(self.eval_set) if self.eval_set is not None else None
        self.test_rows = self._encode(self.test_set) if self.test_set is not None else None
        dropped = self.recipe.diffusion.caption_dropout > 0
        self.empty = self.encoder.states("") if dropped else None
        side = self.encoder.pixels
        self.listener.note(f"{len(self.train_rows):,} images of {side} x {side} pixels")

    def _encode(self, dataset: Dataset) -> list[Row]:
        examples: Any = dataset.examples
        return self.encoder.rows(examples, dataset.source, self.listener.progress)

    def batches(self, rows: Sequence[Any]) -> Any:
        settings = self.recipe.train
        return DiffusionBatches(
            rows,
            self.noise,
            self.recipe.diffusion,
            batch_size=settings.batch_size,
            seed=settings.seed,
            group_by_length=settings.group_by_length is not False,
            masks=self.encoder.masks,
            empty=self.empty,
        )

    @property
    def settings(self) -> TrainConfig:
        # diffusers' models have another name for it than transformers', which the loop knows: it is on already.
        return replace(super().settings, gradient_checkpointing=False)

    def task_objective(self, label_smoothing: float = 0.0) -> Objective:
        return denoising_objective(self.loaded.part, self.encoder.pixels)

    def data_key(self) -> str:
        return hashlib.sha256("".join(row.key for row in self.train_rows).encode()).hexdigest()

    def measure_base(self) -> None:
        if self.recipe.evaluate.before and self.measured_set is not None:
            self.listener.stage("measuring the base")
            with use(self.model, None):
                self.before = self.measure_adapter()

    @torch.no_grad()
    def measure_adapter(self) -> dict[str, float]:
        """The plain loss on the test set, the eval set where there is none."""
        rows = self.eval_rows if self.test_rows is None else self.test_rows
        if rows is None:
            return {}
        device = next(self.model.parameters()).device
        batches = self.batches(rows).evaluation()
        moved = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
        return {"loss": mean_loss(self.model, moved, self.measured)}

    def save_adapter(self) -> None:
        super().save_adapter()
        run = self.folder.path
        convert(run / "adapter", run / DIFFUSERS, to="diffusers", component=self.loaded.part, overwrite=True)

    def next_steps(self) -> list[tuple[str, str]]:
        run, part = self.folder.path, self.loaded.part
        load = (
            f"pipeline.load_lora_weights({str(run)!r})"
            if part == "unet"
            else f"PeftModel.from_pretrained(pipeline.transformer, {str(run / 'adapter')!r})"
        )
        return [
            ("Use it in a diffusers pipeline", load),
            (
                "Or with lorakit, at half its strength",
                f"lk.load(pipeline.{part}, {str(run / 'adapter')!r}); lk.use(pipeline.{part}, {{'default': 0.5}})",
            ),
            ("Look at the adapter", f"lorakit inspect {shlex.quote(str(run))}"),
        ]
