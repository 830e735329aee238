"""Load a base model with its tokenizer, ready to be adapted: nothing missing, nothing chatty, greedy by default."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.errors import ModelError, UsageError
from lorakit.models.quantize import QuantizeReport, check_quantization, quantize_base
from lorakit.models.quiet import quiet
from lorakit.models.source import Source, resolve

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
CLASSIFIERS = {
    "sequence-classification": "ForSequenceClassification",
    "image-classification": "ForImageClassification",
}
"""The tasks whose model has a head for labels, and how transformers ends the names of such models."""
NEW_HEADS = {*CLASSIFIERS, "feature-extraction", "question-answering"}
"""The tasks whose head a checkpoint may lack: it is then new, and to be trained."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A base model and what belongs to it."""

    model: Any  # a transformers PreTrainedModel, in eval mode, requires_grad as transformers sets it
    tokenizer: Any  # its tokenizer, with a pad token; for image-classification its image processor
    name: str  # as the user gave it
    source: str  # the folder or .gguf file it was read from, or the hub id
    task: str  # a key of TASKS
    initialised: tuple[
        str, ...
    ] = ()  # parameters that the files did not hold (a new head), drawn from torch's generator
    quantized: QuantizeReport | None = None  # what of it was quantised, and the memory that this saved


def load(
    name: str | os.PathLike[str],
    *,
    task: str = "causal-lm",
    dtype: str | torch.dtype = "float32",
    num_labels: int | None = None,
    label_names: list[str] | None = None,
    regression: bool = False,
    device: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    progress: bool = False,
) -> Loaded:
    """Load a base model by packaged name, local folder, `.gguf` file or hub id (looked for in this order).

    task: a key of TASKS. dtype: of the weights; a file of another dtype is rounded once. num_labels, label_names: of a
    classifier, needed unless the files are a classifier already; regression: one number instead of labels.
    device: where to put it ("cuda", "cuda:1", ...); None leaves it on the CPU. revision: of a hub id.
    quantize: a key of lorakit.models.quantize.QUANTIZATIONS; every linear layer but the output head is then quantised, from
    weights of `dtype`, in which they go on to compute. progress: bars on standard error.
    A new head is drawn from torch's global generator: seed it before the call.
    Nothing in the model's repository is executed and no pickle is opened.
    Raises UsageError for a bad argument, ModelError for a model that cannot be found, fetched, read or trusted.
    """
    name = os.fspath(name)
    if task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; expected one of: {', '.join(TASKS)}.")
    kind, place = parse_dtype(dtype), _parse_device(device)
    labels = _label_config(task, num_labels, label_names, regression)
    if quantize is not None:
        check_quantization(quantize)  # before anything is fetched
    source = resolve(name, revision=revision, progress=progress)
    with quiet(progress=False):  # resolve() has fetched everything: transformers' own bars would tell nothing
        config = _read_config(name, source)
        images = task == "image-classification"
        tokenizer = _read_image_processor(name, source) if images else _read_tokenizer(name, source)
        if task in CLASSIFIERS:
            _set_labels(name, config, labels, task)
        if task == "question-answering":
            config.num_labels = 2  # an answer's first and last token; the config may be a classifier's
        model, initialised = _read_model(name, source, task, config, kind)
    if not images:
        _agree(name, model, tokenizer, needs_padding=task != "feature-extraction")
        tokenizer.name_or_path = source.origin
    model.name_or_path = model.config.name_or_path = source.origin
    model.eval()
    quantized = None if quantize is None else quantize_base(model, quantize, device=place)
    if place is not None:
        model.to(place)
    return Loaded(model, tokenizer, name, source.origin, task, initialised, quantized)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name in DTYPES, or of itself. Raises UsageError for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UsageError(f"dtype {dtype!r} is unknown; expected one of: {', '.join(DTYPES)}.")
    return found


def _parse_device(device: str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0] if str(error) else "unknown"
        raise UsageError(f"device {device!r} cannot be used here ({reason}). Use 'cpu', or None.") from error
    return place


def _label_config(
    task: str, num_labels: int | None, names: list[str] | None, regression: bool
) -> dict[str, Any] | None:
    """The config keys of a classifier, or None where the caller leaves them to the files."""
    if num_labels is None and names is None and not regression:
        return None
    if task not in CLASSIFIERS:
        raise UsageError(
            f"num_labels, label_names and regression belong to {' and '.join(CLASSIFIERS)}, not to {task}."
        )
    if regression and task != "sequence-classification":
        raise UsageError(
            f"regression belongs to sequence-classification, not to {task}: say num_labels or label_names."
        )
    if regression:
        if num_labels not in (None, 1) or (names is not None and len(names) > 1):
            raise UsageError("regression predicts one number: leave num_labels and label_names out.")
        return {"num_labels": 1, "problem_type": "regression"}
    count = num_labels if num_labels is not None else len(names or [])
    if names is not None and (len(names) != count or len(set(names)) != count):
        raise UsageError(f"expected {count} different label_names, came {names}.")
    if count < 2:
        raise UsageError(f"a classifier needs at least 2 labels, came {count}. For one number use regression=True.")
    names = names or [f"LABEL_{index}" for index in range(count)]
    return {
        "num_labels": count,
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(names)),
        "label2id": {label: index for index, label in enumerate(names)},
    }


def _set_labels(name: str, config: Any, labels: dict[str, Any] | None, task: str) -> None:
    if labels is not None:
        config.update(labels)
    elif not any(str(kind).endswith(CLASSIFIERS[task]) for kind in config.architectures or []):
        raise UsageError(f"{name} is no classifier yet: say num_labels or label_names (or regression=True).")


def _read_config(name: str, source: Source) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, "config.json", error) from error


def _read_tokenizer(name: str, source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, "the tokenizer", error) from error


def _read_image_processor(name: str, source: Source) -> Any:
    from transformers import AutoImageProcessor

    try:  # PIL's, which every machine has: torchvision resizes a little differently
        return AutoImageProcessor.from_pretrained(source.folder, backend="pil", trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, "its image processor", error) from error


def _read_model(name: str, source: Source, task: str, config: Any, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
    import transformers

    head = task in CLASSIFIERS
    try:
        model, info = getattr(transformers, TASKS[task]).from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=head,  # another number of labels than the files' head: a new head, reported below
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError, SafetensorError, ...
        raise _unreadable(name, f"the weights for {task}", error) from error
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost := [key for key in new if task not in NEW_HEADS or not _is_head(model, key)]:
        raise ModelError(
            f"{name} does not hold the weights that {task} needs: {len(lost)} are missing or of another shape "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}). Load it for the task that it was made for."
        )
    return model, tuple(new)


def _is_head(model: Any, key: str) -> bool:
    """True for a parameter above the base model, or of a pooler: what a checkpoint of another task may lack."""
    prefix = model.base_model_prefix
    inside = key.startswith(f"{prefix}.") or model.base_model is model
    return not inside or "pooler" in key.split(".")


def _unreadable(name: str, what: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} needs code of its own, which lorakit does not run. Use a model that transformers has."
        )
    return ModelError(f"{name}: {what} cannot be read ({type(error).__name__}: {text[:400]}).")


def _agree(name: str, model: Any, tokenizer: Any, *, needs_padding: bool) -> None:
    """Bring the tokenizer, the config and the generation defaults in step."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        # Batches need some id to pad with. eos is safe: padding is masked in attention and in the loss, by position.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None and needs_padding:
        raise ModelError(f"{name}: its tokenizer has neither a pad nor an eos token, so batches cannot be padded.")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size and max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ModelError(
            f"{name}: its tokenizer knows ids up to {max(tokenizer.get_vocab().values())}, but the model embeds only "
            f"{rows}. The two files do not belong together."
        )
    if model.config.pad_token_id is None or not _counts_positions_from_padding(model):
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        _greedy(model.generation_config, tokenizer.pad_token_id)


def _counts_positions_from_padding(model: Any) -> bool:
    """Whether the config's pad id also says where positions begin (RoBERTa's kind): another id would shift them all."""
    return any(
        name.endswith("position_embeddings")
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def _greedy(generation: Any, pad: int | None) -> None:
    """Decode greedily unless asked otherwise: the published sampling defaults would make evaluation a lottery."""
    generation.update(pad_token_id=pad, do_sample=False)
    blank = type(generation)()
    for key in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        setattr(generation, key, getattr(blank, key, None))  # left over, each would warn at every greedy call
