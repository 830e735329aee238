"""diffusers' and kohya's files, written by and loaded into diffusers itself."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.errors import FileError
from lorakit.store.convert import convert, read_any

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers themselves

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
U_NET = [*ATTENTION, "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "linear_1", "conv_in"]
CLIP = ["q_proj", "out_proj", "fc1"]


def unet() -> nn.Module:
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


def pipeline() -> "diffusers.StableDiffusionPipeline":
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=text_encoder(), tokenizer=None,
        unet=unet(), scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
    )  # fmt: skip


def outputs(pipe: "diffusers.StableDiffusionPipeline") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        noise = pipe.unet(x, 3, encoder_hidden_states=context).sample
        return [noise, pipe.text_encoder(torch.tensor([[1, 7, 9, 2]])).last_hidden_state]


def trained(
    pipe: "diffusers.StableDiffusionPipeline", alpha: float, **more: object
) -> "diffusers.StableDiffusionPipeline":
    """The pipeline with PEFT's adapters of random values on both of its models."""
    torch.manual_seed(5)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=U_NET, **more))
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=CLIP))
    with torch.no_grad():
        for part in (pipe.unet, pipe.text_encoder):
            for name, parameter in part.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return pipe


def states(pipe: "diffusers.StableDiffusionPipeline") -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: value.contiguous() for key, value in peft.get_peft_model_state_dict(getattr(pipe, name)).items()}
        for name in ("unet", "text_encoder")
    }


def save_ours(pipe: "diffusers.StableDiffusionPipeline", folder: "object") -> None:
    """As diffusers' training scripts save, with the settings in the header."""
    found = states(pipe)
    from diffusers.training_utils import _collate_lora_metadata

    extra = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, found["unet"],
        diffusers.utils.convert_state_dict_to_diffusers(found["text_encoder"]), **extra,
    )  # fmt: skip


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape)
        assert torch.equal(tensor, other[key]), key


NAME = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_pipeline_there_and_back(tmp_path, to):
    pipe = trained(pipeline(), alpha=8)
    expected = outputs(pipe)
    save_ours(pipe, tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "peft")
    assert (report.kind, set(report.components)) == ("diffusers", {"unet", "text_encoder"})
    convert(tmp_path / "peft", tmp_path / NAME, to=to)
    other = pipeline()
    assert not torch.allclose(outputs(other)[0], expected[0])
    other.load_lora_weights(tmp_path, weight_name=NAME)
    for one, two in zip(outputs(other), expected, strict=True):
        torch.testing.assert_close(one, two)
    convert(tmp_path / NAME, tmp_path / "peft2")
    convert(tmp_path / "peft2", tmp_path / "again.safetensors", to=to)
    equal(load_file(tmp_path / NAME), load_file(tmp_path / "again.safetensors"))


def test_diffusers_own_file_comes_back_as_it_was(tmp_path):
    save_ours(trained(pipeline(), alpha=8), tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "again.safetensors", to="diffusers")
    equal(load_file(tmp_path / "theirs" / NAME), load_file(tmp_path / "again.safetensors"))


def test_the_components_load_here_and_in_peft(tmp_path):
    pipe = trained(pipeline(), alpha=8)
    expected = outputs(pipe)
    save_ours(pipe, tmp_path / "theirs")
    plain = pipeline()
    convert(tmp_path / "theirs", tmp_path / "peft", base={"unet": plain.unet, "text_encoder": plain.text_encoder})
    lk.load(plain.unet, tmp_path / "peft" / "unet")
    lk.load(plain.text_encoder, tmp_path / "peft" / "text_encoder")
    for one, two in zip(outputs(plain), expected, strict=True):
        torch.testing.assert_close(one, two)
    theirs = peft.PeftModel.from_pretrained(text_encoder(), tmp_path / "peft" / "text_encoder")
    found = theirs(torch.tensor([[1, 7, 9, 2]])).last_hidden_state
    torch.testing.assert_close(found, expected[1])


def test_the_names_between_old_and_new(tmp_path):
    """`to_q.lora.down.weight`: what convert_state_dict_to_diffusers makes of attention layers."""
    pipe = pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipe.unet)
    middle = diffusers.utils.convert_state_dict_to_diffusers(state)
    assert all(".lora.down." in key or ".lora.up." in key for key in middle)
    middle = {f"unet.{key}": value.contiguous() for key, value in middle.items()}
    save_file(middle, tmp_path / "a.safetensors")
    _, tensors, _ = read_any(tmp_path / "a.safetensors")
    equal({f"base_model.model.{key}": value for key, value in state.items()}, tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="diffusers")
    equal(middle, load_file(tmp_path / "b.safetensors"))


def test_unlike_ranks_and_dora(tmp_path):
    pipe = trained(pipeline(), alpha=8, use_dora=True, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 5})
    expected = outputs(pipe)
    save_ours(pipe, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / NAME, to="diffusers")
    other = pipeline()
    other.load_lora_weights(tmp_path, weight_name=NAME)
    torch.testing.assert_close(outputs(other)[0], expected[0])
    with pytest.raises(FileError, match="DoRA") as caught:
        convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya")
    magnitudes = sum("magnitude" in key for key in states(pipe)["unet"])
    assert sum("magnitude" in fault for fault in caught.value.faults) == magnitudes
    assert not (tmp_path / "k.safetensors").exists()


def test_old_attention_processors(tmp_path):
    """The first generation of keys, without a component: what unet.save_attn_procs wrote."""
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    old = {}
    for name in ("to_q", "to_k", "to_v", "to_out"):
        old[f"{stem}.{name}_lora.down.weight"] = torch.randn(4, 8)
        old[f"{stem}.{name}_lora.up.weight"] = torch.randn(8, 4)
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    convert(tmp_path, tmp_path / "peft")
    model = unet()
    lk.load(model, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "again.bin", to="diffusers")
    equal(old, torch.load(tmp_path / "again.bin", weights_only=True))
    theirs = pipeline()
    theirs.unet.load_lora_adapter({f"unet.{key}": value for key, value in old.items()}, prefix="unet")
    mine = pipeline()
    mine.unet = model
    torch.testing.assert_close(outputs(mine)[0], outputs(theirs)[0])


def test_alpha_keys(tmp_path):
    state = {}
    for i, alpha in enumerate((2.0, 3.0)):
        stem = f"transformer.transformer_blocks.{i}.attn.to_q"
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = torch.randn(4, 8), torch.randn(8, 4)
        state[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    save_file(state, tmp_path / "a.safetensors")
    config, _, _ = read_any(tmp_path / "a.safetensors")
    assert config["lora_alpha"] == 2
    assert config["alpha_pattern"] == {"transformer_blocks.1.attn.to_q": 3}
    convert(tmp_path / "a.safetensors", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="diffusers")
    equal(state, load_file(tmp_path / "b.safetensors"))


def kohya(dtype: torch.dtype = torch.float16, alpha: bool = True) -> dict[str, torch.Tensor]:
    state = {}
    for layer, wide in (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 8),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2", 8),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc2", 8),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 8),
    ):
        state[f"{layer}.lora_down.weight"] = torch.randn(4, wide, dtype=dtype)
        state[f"{layer}.lora_up.weight"] = torch.randn(wide, 4, dtype=dtype)
        if alpha:
            state[f"{layer}.alpha"] = torch.tensor(3.0, dtype=torch.float32)
    return state


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kohyas_file_comes_back_as_it_was(tmp_path, dtype, alpha):
    save_file(kohya(dtype, alpha), tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "peft")
    assert set(report.components) == {"unet", "text_encoder", "text_encoder_2"}
    assert json.loads((tmp_path / "peft/unet/adapter_config.json").read_text())["lora_alpha"] == (3 if alpha else 4)
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="kohya")
    equal(kohya_sorted(tmp_path / "a.safetensors"), kohya_sorted(tmp_path / "b.safetensors"))


def kohya_sorted(path: "object") -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_names_of_another_model_need_the_model(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint_attn = nn.ModuleDict({"to_kv": nn.Linear(8, 8)})

    state = {
        "lora_unet_joint_attn_to_kv.lora_down.weight": torch.randn(2, 8),
        "lora_unet_joint_attn_to_kv.lora_up.weight": torch.randn(8, 2),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="--base"):
        convert(tmp_path / "a.safetensors", tmp_path / "peft")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", base=Block(), component="transformer")
    assert "base_model.model.joint_attn.to_kv.lora_A.weight" in load_file(tmp_path / "peft/adapter_model.safetensors")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="kohya")
    found = load_file(tmp_path / "b.safetensors")
    equal(state, {key: found[key] for key in state})


@pytest.mark.parametrize("ending", ["dora_scale", "hada_w1_a", "lora_mid.weight", "diff"])
def test_what_kohya_has_beyond_lora_is_refused(tmp_path, ending):
    state = kohya()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(state | {f"{name}.{ending}": torch.randn(8)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=f"{name}.{ending}"):
        convert(tmp_path / "a.safetensors", tmp_path / "peft")


def test_sdxls_original_names(tmp_path):
    """kohya trains SDXL under the names of its first code: blocks are counted otherwise there."""
    layers = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q":
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "lora_unet_output_blocks_2_1_transformer_blocks_0_ff_net_0_proj":
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
    }  # fmt: skip
    state = {}
    for layer in layers:
        state[f"{layer}.lora_down.weight"], state[f"{layer}.lora_up.weight"] = torch.randn(2, 4), torch.randn(4, 2)
        state[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "a.safetensors")
    config, tensors, _ = read_any(tmp_path / "a.safetensors")
    assert set(config["target_modules"]) == set(layers.values())
    for layer, path in layers.items():
        assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], state[f"{layer}.lora_down.weight"])
    convert(tmp_path / "a.safetensors", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="kohya")
    equal(state, load_file(tmp_path / "b.safetensors"))


def transformer() -> nn.Module:
    torch.manual_seed(6)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=16,
    ).eval()  # fmt: skip


def denoised(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return model(x, text, torch.ones(1, 8), torch.tensor([3])).sample


def test_a_diffusion_transformer(tmp_path):
    model = transformer()
    model.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=[*ATTENTION, "ff.net.2"], init_lora_weights=False)
    )
    expected = denoised(model)
    model.save_lora_adapter(tmp_path / "theirs")
    named = load_file(tmp_path / "theirs" / NAME)
    plain = {key.removeprefix("transformer."): value for key, value in named.items()}
    save_file(plain, tmp_path / "plain.safetensors")  # keys that name no component
    convert(tmp_path / "plain.safetensors", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "plain2.safetensors", to="diffusers")
    equal(plain, load_file(tmp_path / "plain2.safetensors"))
    state = {f"transformer.{key}": value for key, value in plain.items()}
    settings = {"r": 2, "lora_alpha": 6, "target_modules": [*ATTENTION, "ff.net.2"]}
    metadata = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    convert(tmp_path / "a.safetensors", tmp_path / "peft")
    mine = transformer()
    lk.load(mine, tmp_path / "peft")
    torch.testing.assert_close(denoised(mine), expected)
    convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya")
    convert(tmp_path / "k.safetensors", tmp_path / "peft2", base=transformer(), component="transformer")
    convert(tmp_path / "peft2", tmp_path / "b.safetensors", to="diffusers")
    theirs = transformer()
    theirs.load_lora_adapter(tmp_path, weight_name="b.safetensors", prefix="transformer")
    torch.testing.assert_close(denoised(theirs), expected)
    equal(state, load_file(tmp_path / "b.safetensors"))


def test_a_base_that_is_a_pipelines_folder(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layers = {"lora_unet_" + path.replace(".", "_"): 8, "lora_te_text_model_encoder_layers_1_mlp_fc1": 8}
    state = {}
    for layer, wide in layers.items():
        state[f"{layer}.lora_down.weight"], state[f"{layer}.lora_up.weight"] = (
            torch.randn(2, wide),
            torch.randn(wide, 2),
        )
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", base=tmp_path / "model")
    found = load_file(tmp_path / "peft/text_encoder/adapter_model.safetensors")
    names = {name for name, _ in pipe.text_encoder.named_modules()}
    assert all(key.removeprefix("base_model.model.").rpartition(".lora_")[0] in names for key in found)
    assert f"base_model.model.{path}.lora_A.weight" in load_file(tmp_path / "peft/unet/adapter_model.safetensors")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", to="kohya")
    equal(state, load_file(tmp_path / "b.safetensors"))
