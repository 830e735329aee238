"""The Hugging Face hub: one short question before any download, so that a wrong name or no network is said at once."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.models.quiet import quiet

_SECONDS = 10.0  # how long the hub may take to answer the first question
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]  # what transformers reads: no pickle, no code
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def is_hub_id(name: str) -> bool:
    """`name` or `owner/name`, as the hub spells them."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def obtain(name: str, revision: str | None, *, progress: bool) -> Path:
    """The folder of hub model `name` in the hub's own cache, downloaded as far as it is not there.

    Where the hub does not answer, the cached model serves. A folder and not the id goes to transformers, because that
    asks the hub again for file after file (half a minute each while it is silent).
    Raises ModelError (a clause to be put after "and") for an unknown, gated, adapter-only or pickle-only repository, a
    download that fails, and a hub that does not answer about a model that is not in the cache.
    """
    from huggingface_hub import snapshot_download

    answers = _look_up(name, revision)
    try:
        with quiet(progress=progress):
            folder = snapshot_download(
                name,
                revision=revision,
                allow_patterns=_FILES,
                ignore_patterns=["*/*"],
                local_files_only=not answers,
            )
    except Exception as error:  # a connection that breaks, a full disk, a cache without rights
        raise ModelError(f"{name} could not be downloaded ({type(error).__name__}: {error}).") from error
    return Path(folder)


def _look_up(name: str, revision: str | None) -> bool:
    """Ask the hub for `name`: True where it answers, False where it is silent but its cache has the model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_SECONDS)
    except GatedRepoError as error:
        raise ModelError(f"the hub asks for leave: accept {name}'s terms there, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ModelError("the hub knows no such model (for a private one, `hf auth login` first).") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the hub's {name} has no revision {revision!r}.") from error
    except Exception as error:  # DNS, proxy, TLS, time-out, offline mode, a 5xx: the HTTP client under it may change
        if _in_cache(name, revision):
            return False
        raise ModelError(
            f"the hub does not answer ({type(error).__name__}: {error}) and its cache on this machine has no "
            f"{name!r}. Connect to the network, or give a local folder."
        ) from error
    _check_files([file.rfilename for file in info.siblings or []], name)
    return True


def _check_files(names: Sequence[str], name: str) -> None:
    if "config.json" not in names:
        what = (
            "an adapter, no base model" if "adapter_config.json" in names else "no transformers model (no config.json)"
        )
        raise ModelError(f"the hub's {name} is {what}.")
    check_weight_names(names, f"the hub's {name}")


def _in_cache(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def check_weight_names(names: Sequence[str], where: str) -> None:
    """Raise ModelError unless there are safetensors weights among the file `names` of `where`."""
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        return
    pickles = [name for name in names if name.endswith(_PICKLES) and "/" not in name and name != "training_args.bin"]
    if not pickles:
        raise ModelError(f"{where} holds no weights: expected model.safetensors or model.safetensors.index.json.")
    raise ModelError(
        f"{where} holds its weights only as {', '.join(pickles[:3])}. A pickle can run code when opened, so it is "
        "refused. Where you trust it, load it with transformers and save_pretrained() it: that writes safetensors."
    )
