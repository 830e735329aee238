"""Adapters of text-to-image runs in diffusers' and PEFT's own loaders: the same output, at every strength."""

import json

import pytest
import tiny_pipelines as tiny
import torch
from tiny_pipelines import PARTS

import lorakit as lk
from lorakit.errors import UsageError
from lorakit.run.subject import open_subject

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the pipelines sd and pixart, and six images with captions."""
    return tiny.build(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def recipe(place, tmp_path):
    def make(name="sd", **changes):
        return tiny.recipe(place, name, **{"output": tmp_path / "run"} | changes)

    return make


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """{"sd", "pixart"}: folders of short runs whose ranks and scalings differ from layer to layer."""
    method = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_v": 9}}
    folders = {name: tmp_path_factory.mktemp("trained") / name for name in PARTS}
    for name, folder in folders.items():
        lk.train(tiny.recipe(place, name, folder, method=method, train={"lr": 5e-2, "epochs": 2}))
    return folders


def inputs(name):
    """A batch of two for the denoiser, the second caption of PixArt padded."""
    draw = torch.Generator().manual_seed(7)
    made = {
        "noisy": torch.randn(2, 4, 8, 8, generator=draw),
        "timesteps": torch.tensor([40, 800]),
        "states": torch.randn(2, 5, 32, generator=draw),
    }
    return made | ({"mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])} if name == "pixart" else {})


@torch.no_grad()
def denoise(model, name, **more):
    given = inputs(name)
    if name == "pixart":
        more |= {"encoder_attention_mask": given["mask"]}
        more |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model(
        given["noisy"], timestep=given["timesteps"], encoder_hidden_states=given["states"], return_dict=False, **more
    )[0]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_the_adapter_loads_again_bit_for_bit(trained, place, name):
    model, again = (getattr(tiny.opened(place, name), PARTS[name]) for _ in range(2))
    base = denoise(model, name)
    for one in (model, again):
        lk.load(one, trained[name] / "adapter")
    assert torch.equal(denoise(model, name), denoise(again, name))
    assert not torch.allclose(denoise(model, name), base, atol=1e-2)
    lk.detach(model, "default")
    assert torch.equal(denoise(model, name), base)


def test_diffusers_loads_it_with_the_same_output(trained, place):
    ours, theirs, alone = (tiny.opened(place, "sd") for _ in range(3))
    lk.load(ours.unet, trained["sd"] / "adapter")
    theirs.load_lora_weights(str(trained["sd"]))
    alone.unet.load_lora_adapter(str(trained["sd"]), prefix="unet", weight_name=FILE)
    close(denoise(ours.unet, "sd"), denoise(theirs.unet, "sd"))
    close(denoise(ours.unet, "sd"), denoise(alone.unet, "sd"))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_the_strength_is_that_of_diffusers(trained, place, strength):
    ours, theirs = tiny.opened(place, "sd"), tiny.opened(place, "sd")
    base = denoise(ours.unet, "sd")
    lk.load(ours.unet, trained["sd"] / "adapter")
    theirs.load_lora_weights(str(trained["sd"]), adapter_name="x")
    lk.use(ours.unet, {"default": strength})
    scaled = denoise(theirs.unet, "sd", cross_attention_kwargs={"scale": strength})
    theirs.set_adapters("x", strength)
    close(denoise(ours.unet, "sd"), denoise(theirs.unet, "sd"))
    close(denoise(ours.unet, "sd"), scaled)
    if strength == 0:
        close(denoise(ours.unet, "sd"), base)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    images = [
        one("a red square", generator=torch.Generator().manual_seed(1), **options).images for one in (ours, theirs)
    ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_peft_loads_the_transformers_adapter_with_the_same_output(trained, place, strength):
    from peft import PeftModel

    ours, theirs = (tiny.opened(place, "pixart").transformer for _ in range(2))
    lk.load(ours, trained["pixart"] / "adapter")
    theirs = PeftModel.from_pretrained(theirs, trained["pixart"] / "adapter").eval()
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.scaling["default"] *= strength
    lk.use(ours, {"default": strength})
    close(denoise(ours, "pixart"), denoise(theirs, "pixart"))


def test_the_transformers_file_holds_the_whole_update(trained, place):
    """diffusers has no loader for PixArt: the file is added by hand, W + (alpha / r) lora_B lora_A."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open
    from safetensors.torch import load_file

    ours, theirs = (tiny.opened(place, "pixart").transformer for _ in range(2))
    lk.load(ours, trained["pixart"] / "adapter")
    tensors = load_file(trained["pixart"] / FILE)
    with safe_open(trained["pixart"] / FILE, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    said = {key.removeprefix("transformer."): value for key, value in said.items()}
    config = LoraConfig(**said)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        inner = path.removeprefix("transformer.")
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, inner), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, inner), config.lora_alpha)
        delta = alpha / (r**0.5 if config.use_rslora else r) * tensors[f"{path}.lora_B.weight"] @ tensors[key]
        theirs.get_submodule(path.removeprefix("transformer.")).weight.data += delta
    assert len(tensors) == 2 * len(lk.adapters(ours)["default"].modules)
    close(denoise(ours, "pixart"), denoise(theirs, "pixart"))


@pytest.mark.parametrize(
    "method",
    [
        {"init": "pissa", "target_modules": ["to_q", "to_v"]},
        {"use_rslora": True},
        {"target_modules": ["to_q", "conv1", "conv_shortcut", "time_emb_proj"]},
    ],
)
def test_variants_reach_diffusers_with_the_same_output(recipe, place, method):
    result = lk.train(recipe(method=method))
    theirs = tiny.opened(place, "sd")
    theirs.load_lora_weights(str(result.folder))
    close(denoise(result.model, "sd"), denoise(theirs.unet, "sd"))


def test_a_run_is_no_language_model(trained):
    with pytest.raises(UsageError, match="use it in a diffusers pipeline"):
        open_subject(trained["sd"])


def test_the_run_can_be_inspected_and_is_not_overwritten_unasked(trained, recipe):
    assert not lk.inspect(trained["sd"] / "adapter").faults
    with pytest.raises(Exception, match="holds a run already"):
        lk.train(recipe(output=str(trained["sd"])))


@pytest.mark.parametrize("name", PARTS)
def test_load_takes_diffusers_file_and_its_folder(trained, place, name):
    part = "unet" if name == "sd" else "transformer"
    models = [getattr(tiny.opened(place, name), part) for _ in range(3)]
    lk.load(models[0], trained[name] / "adapter")
    lk.load(models[1], trained[name] / FILE, component=part)
    lk.load(models[2], trained[name] / FILE)  # a file with one component needs no name
    for model in models[1:]:
        close(denoise(model, name), denoise(models[0], name))
