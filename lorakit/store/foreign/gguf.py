"""llama.cpp's LoRA adapters: GGUF with general.type = adapter, `blk.0.attn_q.weight.lora_a` (r, in), `.lora_b` (out, r).

The scaling is adapter.lora.alpha / rank, each tensor's own rank. As llama.cpp's convert_lora_to_gguf.py does: the rows of
q and k of Llama's family are reordered for its rotary embedding, and token_embd's A is stored (vocab, r).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import FileError, OutputError, UsageError
from lorakit.store.foreign.format import Format, Options, Written, refuse, single
from lorakit.store.foreign.hub import Adapter, Bundle, beyond_pairs, key_of, make_config, number, plain_alphas, sort
from lorakit.store.foreign.source import Source

ENDINGS = (".weight.lora_a", ".weight.lora_b")
ARCHITECTURE, HEADS, KV_HEADS = "lorakit.architecture", "lorakit.heads", "lorakit.kv_heads"
LLAMA_LAYERS = tuple(f"self_attn.{one}_proj" for one in "qkvo") + tuple(
    f"mlp.{one}_proj" for one in ("gate", "up", "down")
)
GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Family(NamedTuple):
    """How a transformers class is named in GGUF. reordered: whether llama.cpp stores rows of q and k in its own order."""

    arch: str
    blocks: str = "model.layers."
    layers: tuple[str, ...] = LLAMA_LAYERS
    embedding: str = "model.embed_tokens"
    reordered: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama", reordered=True),
    "MistralForCausalLM": Family("llama", reordered=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma"),
    "Gemma2ForCausalLM": Family("gemma2"),
    "GPT2LMHeadModel": Family("gpt2", "transformer.h.", GPT2_LAYERS, "transformer.wte"),
}


class Model(NamedTuple):
    """What of the base the names and the order of rows depend on."""

    kind: str
    heads: int
    kv_heads: int
    tied: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]


class Gguf(Format):
    """Adapters of the architectures in FAMILIES, for `llama-cli --lora`."""

    name: ClassVar[str] = "gguf"
    what: ClassVar[str] = "llama.cpp's GGUF adapter, for --lora"

    def recognises(self, source: Source) -> bool:
        return source.container == "gguf"

    def read(self, source: Source, options: Options) -> Bundle:
        """Raises FileError on a GGUF file that is no LoRA adapter. llama.cpp's own files need the base's config.json."""
        said = source.metadata
        if said.get("general.type") != "adapter" or said.get("adapter.type") != "lora":
            kind = said.get("adapter.type") or said.get("general.type") or "of unknown type"
            raise FileError(f"{source.path}: a GGUF file that is {kind!r}, where a LoRA adapter was expected.")
        model = _noted(said) if options.base is None else _model(options.base.config)
        if model.family.arch != said.get("general.architecture"):
            raise FileError(
                f"{source.path} is for {said.get('general.architecture')!r}, and the base is a {model.kind}."
            )
        alpha = said.get("adapter.lora.alpha")
        faults = [] if isinstance(alpha, float) and alpha else ["adapter.lora.alpha is missing or 0"]
        names = {gguf: path for path, gguf in _names(model.family, _blocks(source.tensors)).items()}
        tensors: dict[str, Tensor] = {}
        for key, tensor in source.tensors.items():
            stem, half = (
                (key[: -len(ENDINGS[0])], ENDINGS.index(key[-len(ENDINGS[0]) :])) if key.endswith(ENDINGS) else (key, 0)
            )
            path = names.get(stem)
            if path is None or tensor.dim() != 2:
                faults.append(f"{key}: no tensor of a LoRA for a {model.kind}")
                continue
            embedding = path == model.family.embedding
            tensors[key_of(path, half, embedding=embedding)] = _turned(tensor, path, half, model, undo=True)
        found = sort(tensors)
        faults += [
            f"{path}: one half of its pair is missing" for path, halves in found.pairs.items() if len(halves) < 2
        ]
        faults += [] if found.pairs else ["no pair of LoRA tensors in it"]
        if faults:
            raise FileError(f"{source.path} cannot be read:", faults)
        ranks = {path: found.rank(path) for path in found.pairs}
        config = make_config(ranks, dict.fromkeys(ranks, float(alpha or 0)), fan_in_fan_out=model.family.arch == "gpt2")
        notes = {"from": self.name, "model": list(model)}
        return {"": Adapter(config, tensors, notes)}

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """One .gguf file. All pairs must have one alpha, in alpha / rank."""
        if target.suffix != ".gguf":
            raise OutputError(f"{target}: expected a file that ends in .gguf.")
        adapter = single(bundle, "a GGUF adapter")
        model = _of_adapter(adapter, options)
        faults = beyond_pairs(adapter)
        found = sort(adapter.tensors)
        names = _names(model.family, _blocks(adapter.tensors))
        tensors: dict[str, Tensor] = {}
        for path, halves in found.pairs.items():
            fault = _fault(path, halves, path in found.embeddings, names, model)
            if fault:
                faults.append(f"{path}: {fault}")
                continue
            for half, ending in enumerate(ENDINGS):
                tensors[names[path] + ending] = _turned(halves[half], path, half, model, undo=False)
        alphas, more = plain_alphas(adapter)
        faults += more
        if len(set(alphas.values())) > 1:
            shown = ", ".join(f"{path} {alpha:g}" for path, alpha in list(alphas.items())[:8])
            faults.append(f"unlike alphas, and the file has one for all: {shown}")
        alpha = next(iter(alphas.values()), 0.0)
        if alphas and not alpha:
            faults.append("alpha 0, which llama.cpp takes for a scaling of 1")
        if float(torch.tensor(alpha, dtype=torch.float32)) != alpha:
            faults.append(f"alpha {alpha!r} is no float32")
        refuse("a GGUF adapter", faults)
        fill = partial(_fill, tensors=tensors, model=model, alpha=float(alpha))
        return Written({target: fill}, [f"architecture {model.family.arch}, alpha {number(alpha)}"])


def _names(family: Family, blocks: int) -> dict[str, str]:
    """transformers' module path -> GGUF's name, by the gguf package's own table."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, blocks)
    paths = [family.embedding, "lm_head"] + [
        f"{family.blocks}{i}.{one}" for i in range(blocks) for one in family.layers
    ]
    return {path: name for path in paths if (name := table.get_name(path)) is not None}


def _blocks(keys: Mapping[str, Tensor]) -> int:
    """One more than the largest number in any key."""
    numbers = [int(part) for key in keys for part in key.split(".") if part.isdigit() and len(part) < 5]
    return max(numbers, default=-1) + 1


def _model(config: Mapping[str, Any]) -> Model:
    kind = (config.get("architectures") or [None])[0]
    if kind not in FAMILIES:
        raise UsageError(f"a {kind} cannot be written as a GGUF adapter here: expected one of {', '.join(FAMILIES)}.")
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    tied = config.get("tie_word_embeddings", kind == "GPT2LMHeadModel")
    return Model(kind, int(heads), int(config.get("num_key_value_heads") or heads), bool(tied))


def _noted(said: Mapping[str, Any]) -> Model:
    kind, heads, kv_heads = said.get(ARCHITECTURE), said.get(HEADS), said.get(KV_HEADS)
    if kind not in FAMILIES or not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UsageError(
            "llama.cpp's file does not say how many heads its model has: give the model's folder (--base FOLDER)."
        )
    return Model(kind, heads, kv_heads, False)


def _of_adapter(adapter: Adapter, options: Options) -> Model:
    if options.base is not None:
        return _model(options.base.config)
    noted = adapter.notes.get("model") if adapter.notes.get("from") == Gguf.name else None
    if isinstance(noted, list) and len(noted) == 4 and noted[0] in FAMILIES:
        return Model(*noted)
    raise UsageError(
        "a GGUF adapter needs its model's architecture and heads: give the model's folder (--base FOLDER)."
    )


def _fault(
    path: str, halves: Mapping[int, Tensor], embedding: bool, names: Mapping[str, str], model: Model
) -> str | None:
    if path not in names:
        return f"llama.cpp has no adapted tensor for it in a {model.kind}"
    if path == "lm_head" and model.tied:
        return "the model's head is tied to its embedding, where llama.cpp has no adapter for it"
    if embedding != (path == model.family.embedding):
        return "an adapter of an embedding" if embedding else "an embedding without an embedding's tensors"
    wrong = {half.dtype for half in halves.values()} - {torch.float32, torch.float16, torch.bfloat16}
    if wrong:
        return f"{wrong.pop()}: llama.cpp has float32, float16 and bfloat16"
    heads = _heads(path, model)
    return (
        f"its {halves[1].shape[0]} rows do not fit {heads} heads"
        if heads and halves[1].shape[0] % (2 * heads)
        else None
    )


def _heads(path: str, model: Model) -> int:
    """How many heads' rows llama.cpp reorders in a module; 0 where it keeps their order."""
    ends = {"q_proj": model.heads, "k_proj": model.kv_heads}
    return ends.get(path.rpartition(".")[2], 0) if model.family.reordered else 0


def _turned(tensor: Tensor, path: str, half: int, model: Model, *, undo: bool) -> Tensor:
    """A tensor as the other side has it."""
    if path == model.family.embedding and half == 0:
        return tensor.t().contiguous()
    heads = _heads(path, model) if half == 1 else 0
    if not heads or tensor.shape[0] % (2 * heads):
        return tensor
    # halves of a head's rows (transformers) <-> pairs of neighbours (llama.cpp)
    width = tensor.shape[0] // heads // 2
    apart = (heads, width, 2) if undo else (heads, 2, width)
    return tensor.reshape(*apart, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _fill(path: Path, tensors: Mapping[str, Tensor], model: Model, alpha: float) -> None:
    import gguf

    writer = gguf.GGUFWriter(path=None, arch=model.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_string(ARCHITECTURE, model.kind)
    writer.add_uint32(HEADS, model.heads)
    writer.add_uint32(KV_HEADS, model.kv_heads)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:  # numpy has no such type: its bytes, and what they are
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
