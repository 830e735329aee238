"""Tiny text-to-image pipelines in folders: Stable Diffusion's shape (U-Net, CLIP) and PixArt's (DiT, T5); nothing is fetched."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch

PARTS = {"sd": "unet", "pixart": "transformer"}
"""The pipelines that `build` makes, and what each calls its denoiser."""
SIZE = 16
"""Pixels of an image's side; the VAE halves it once, so latents are 8 wide."""
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def stable_diffusion(folder: Path, *, prediction_type: str = "epsilon") -> str:
    """A StableDiffusionPipeline: U-Net of two blocks with cross-attention, CLIP text encoder, AutoencoderKL, DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=298,
        eos_token_id=299,
        pad_token_id=299,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=_clip_tokenizer(folder),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, folder)


def pixart(folder: Path, *, additional: bool = False) -> str:
    """A PixArtAlphaPipeline: DiT of two blocks that learns its variance too, T5 encoder. additional: told the resolution."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=32,
        use_additional_conditions=additional,
    )
    tokenizer = _t5_tokenizer()
    text = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _saved(pipeline, folder)


def build(root: Path) -> Path:
    """`root`/sd, `root`/pixart and `root`/images, six of them; returns `root`."""
    stable_diffusion(root / "sd")
    pixart(root / "pixart")
    image_folder(root / "images")
    return root


def opened(root: Path, name: str) -> Any:
    """The pipeline `name` of `build`, loaded anew and silent."""
    from lorakit.models.diffusion import load_pipeline

    pipeline = load_pipeline(str(root / name)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def recipe(root: Path, name: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for a run of three steps on what `build` made; sections are merged."""
    document: dict[str, Any] = {
        "model": str(root / name),
        "task": "text-to-image",
        "data": {"train": str(root / "images")},
        "method": {"name": "lora", "r": 4, "alpha": 6},
        "train": {"batch_size": 2, "lr": 1e-2, "epochs": 1},
        "output": str(output),
    }
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
    return document


def image_folder(folder: Path, count: int = 6, *, seed: int = 0) -> str:
    """`count` plain images of one colour with a little noise, and their captions in metadata.jsonl; returns the folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(seed), []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        pixels = bytes(min(255, max(0, part + draw.randint(-9, 9))) for _ in range(20 * 24) for part in COLOURS[name])
        Image.frombytes("RGB", (24, 20), pixels).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a {name} square"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def _clip_tokenizer(folder: Path) -> Any:
    """One token a letter, and one a letter at a word's end."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    vocabulary |= {"<|startoftext|>": 298, "<|endoftext|>": 299}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase + string.digits]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _saved(pipeline: Any, folder: Path) -> str:
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    return str(folder)
