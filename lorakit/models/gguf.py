"""GGUF files: one file with quantised weights, tokenizer and chat template, converted once into a transformers folder.

Dequantising takes seconds and a folder loads in a fraction of one, so the result is kept in the cache. It is kept in
fp32: a Q4_1 weight is `scale * q + minimum` with fp16 scale and minimum, which neither bf16 nor fp16 holds exactly.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import ModelError
from lorakit.models import cache
from lorakit.models.quiet import quiet

_MAGIC = b"GGUF"


def converted(path: Path, *, progress: bool = False) -> Path:
    """The cached transformers folder of a user's `.gguf` file, made at the first call; known by the file's sha256.

    Raises ModelError for a file that is missing, damaged, or of an architecture that transformers cannot read.
    """
    _check_magic(path)
    digest = cache.sha256(path)
    folder = cache.cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not cache.is_cached(folder):
        with cache.staged(folder) as work:
            if work is not None:
                convert(path, work, progress=progress)
                cache.write_manifest(work, {"file": path.name, "sha256": digest})
    cache.verify_folder(folder)
    return folder


def convert(path: Path, folder: Path, *, progress: bool = False) -> None:
    """Write `path`'s model (fp32 safetensors), config and tokenizer with its chat template into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_magic(path)
    with quiet(progress=progress):
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # a damaged file fails anywhere in two parsers: struct, numpy, KeyError, ValueError
            raise ModelError(
                f"{path} cannot be read as a GGUF model ({type(error).__name__}: {error}). It may be cut off or of an "
                "architecture that transformers does not read from GGUF. Download it again, or give the model's hub id."
            ) from error
        plain_copy(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def plain_copy(model: Any) -> Any:
    """The same tensors in a model that is not marked as quantised (a marked one refuses to be saved)."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(f"{path} cannot be opened ({error.strerror}). Check the path.") from error
    if start != _MAGIC:
        raise ModelError(f"{path} is no GGUF file: expected it to start with {_MAGIC!r}, came {start!r}.")
