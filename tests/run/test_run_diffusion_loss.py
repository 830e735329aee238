"""The denoising loss against the papers' and diffusers' formulas, and the draws that it is made from."""

import pytest
import tiny_pipelines as tiny
import torch
from tiny_pipelines import PARTS

from lorakit.models.diffusion import load_pipeline
from lorakit.run.diffusion.batches import DiffusionBatches
from lorakit.run.diffusion.config import DiffusionConfig
from lorakit.run.diffusion.encode import Row
from lorakit.run.diffusion.noise import Noise, denoising_objective


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the pipelines sd and pixart, and six images with captions."""
    return tiny.build(tmp_path_factory.mktemp("pipelines"))


def scheduler(prediction="epsilon", **more):
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, **more)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_are_the_papers(prediction):
    noise = Noise(scheduler(prediction), "test")
    clean, drawn = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    steps = torch.tensor([0, 500, 999])
    kept = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2, 0)[steps]
    signal_, rest = (part.sqrt().reshape(3, 1, 1, 1) for part in (kept, 1 - kept))
    targets = {"epsilon": drawn, "sample": clean, "v_prediction": signal_ * drawn - rest * clean}
    noisy, target = noise.noised(clean, drawn, steps)
    torch.testing.assert_close(noisy.double(), signal_ * clean + rest * drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target.double(), targets[prediction].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_min_snr(prediction):
    from diffusers.training_utils import compute_snr

    noise, steps = Noise(scheduler(prediction), "test"), torch.tensor([1, 300, 700, 999])
    snr = compute_snr(noise.ddpm, steps)
    bounded = torch.minimum(snr, torch.tensor(5.0))
    expected = {"epsilon": bounded / snr, "v_prediction": bounded / (snr + 1), "sample": bounded}[prediction]
    torch.testing.assert_close(noise.weights(steps, 5.0), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(noise.weights(steps, None), torch.ones(4))


def test_a_schedule_that_ends_in_pure_noise_has_finite_weights():
    noise = Noise(scheduler("v_prediction", rescale_betas_zero_snr=True), "test")
    assert noise.weights(torch.arange(1000), 5.0).isfinite().all()
    noise = Noise(scheduler("epsilon", rescale_betas_zero_snr=True), "test")
    assert noise.weights(torch.tensor([999]), 5.0) == 1


def batches(config=None, *, name="sd", count=5, size=2, seed=3):
    draw = torch.Generator().manual_seed(5)
    rows = [
        Row(
            tuple((torch.randn(4, 8, 8, generator=draw), torch.full((4, 8, 8), 0.1)) for _ in range(2)),
            torch.randn(3 + (number if name == "pixart" else 0), 32, generator=draw),
            str(number),
        )
        for number in range(count)
    ]
    config = config or DiffusionConfig()
    if not config.flip:
        rows = [Row(row.views[:1], row.states, row.key) for row in rows]
    noise = Noise(scheduler(), "test")
    options = {"batch_size": size, "seed": seed, "group_by_length": False, "masks": name == "pixart"}
    return DiffusionBatches(rows, noise, config, empty=torch.zeros(3, 32), **options)


@pytest.mark.parametrize("name", PARTS)
def test_the_objective_is_the_mean_squared_error_of_the_denoiser(place, name):
    model = getattr(tiny.opened(place, name), PARTS[name])
    batch = next(batches(DiffusionConfig(snr_gamma=5.0), name=name).make(0, 0))
    states, told = batch["encoder_hidden_states"], {"resolution": None, "aspect_ratio": None}
    more = {"encoder_attention_mask": batch["caption_mask"], "added_cond_kwargs": told} if name == "pixart" else {}
    with torch.no_grad():
        found = denoising_objective(PARTS[name], 16).loss(model, batch)
        out = model(batch["noisy_latents"], timestep=batch["timesteps"], encoder_hidden_states=states, **more).sample
    if name == "pixart":
        out = out.chunk(2, dim=1)[0]  # as diffusers' own PixArt training does
    rows = ((out - batch["target"]) ** 2).reshape(2, -1).mean(1) * batch["weights"]
    assert found.targets == 2
    torch.testing.assert_close(found.total, rows.sum())


def test_padding_of_a_caption_changes_nothing(place):
    model = tiny.opened(place, "pixart").transformer
    batch = next(batches(name="pixart").make(0, 0))
    counts = batch["caption_mask"].sum(1)
    assert counts[0] != counts[1]
    objective = denoising_objective("transformer", 16)
    with torch.no_grad():
        whole = objective.loss(model, batch).total
        rows = [
            {
                key: value[row : row + 1, : counts[row]]
                if "caption" in key or "states" in key
                else value[row : row + 1]
                for key, value in batch.items()
            }
            for row in range(2)
        ]
        alone = sum(objective.loss(model, row).total for row in rows)
    torch.testing.assert_close(whole, alone)


def test_a_transformer_that_is_told_the_resolution(tmp_path):
    model = load_pipeline(tiny.pixart(tmp_path / "told", additional=True)).model
    batch = next(batches(name="pixart").make(0, 0))
    losses = [float(denoising_objective("transformer", pixels).loss(model, batch).total) for pixels in (16, 512)]
    assert losses[0] != losses[1]


# -- the draws ---------------------------------------------------------------------------------------------------------


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_batches_follow_from_seed_epoch_and_number_alone():
    whole = list(batches(DiffusionConfig(flip=True, caption_dropout=0.5, noise_offset=0.1)).make(1, 0))
    rest = list(batches(DiffusionConfig(flip=True, caption_dropout=0.5, noise_offset=0.1)).make(1, 2))
    assert len(whole) == 3
    assert same(whole[2], rest[0])
    assert not same(whole[0], next(batches().make(2, 0)))
    assert not same(whole[0], next(batches(seed=4).make(1, 0)))


def test_evaluation_is_the_same_every_time_and_sees_every_row_at_every_level():
    made = batches(DiffusionConfig(flip=True, caption_dropout=0.9, snr_gamma=1.0))
    first, again = list(made.evaluation()), list(made.evaluation())
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert sorted(torch.cat([one["timesteps"] for one in first]).tolist()) == sorted([125, 375, 625, 875] * 5)
    assert all((one["weights"] == 1).all() and one["encoder_hidden_states"].any() for one in first)


def test_captions_are_dropped_as_often_as_asked():
    def dropped(share):
        states = next(batches(DiffusionConfig(caption_dropout=share), count=400, size=400).make(0, 0))
        return float((states["encoder_hidden_states"] == 0).all((1, 2)).float().mean())

    assert dropped(0.0) == 0
    assert 0.2 < dropped(0.3) < 0.4


def test_the_mirror_image_is_shown_half_of_the_time():
    made = batches(DiffusionConfig(flip=True), count=400, size=400)
    batch = next(made.make(0, 0))
    kept = made.noise.ddpm.alphas_cumprod[batch["timesteps"]].reshape(-1, 1, 1, 1)
    clean = (batch["noisy_latents"] - (1 - kept).sqrt() * batch["target"]) / kept.sqrt()
    order = made.order.epoch(0)[0]
    low = [position for position in range(400) if batch["timesteps"][position] < 300]
    nearest = []
    for position in low:
        distances = [(clean[position] - mean).abs().mean() for mean, _ in made.rows[order[position]].views]
        assert min(distances) < 0.2 < max(distances)
        nearest.append(distances[1] < distances[0])
    assert 0.3 < sum(nearest) / len(nearest) < 0.7


def test_noise_offset_moves_whole_channels():
    plain, offset = (
        next(batches(DiffusionConfig(noise_offset=strength), count=200, size=200).make(0, 0))["target"]
        for strength in (0.0, 0.5)
    )
    assert plain.mean((2, 3)).std() < 0.2 < 0.4 < offset.mean((2, 3)).std()
