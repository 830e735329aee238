"""From the name that a user gives to the place that transformers loads from, with everything checked that can be."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.models import gguf, hub
from lorakit.models.packaged import PACKAGED, fetch


@dataclass(frozen=True)
class Source:
    """Where `from_pretrained` reads a model."""

    folder: Path
    """A transformers folder, checked."""
    origin: str
    """What to tell others: the packaged name, the folder, or the hub id."""


def resolve(name: str, *, revision: str | None = None, progress: bool = False) -> Source:
    """Find `name`: a packaged name first, then a `.gguf` file, a local folder, a hub id.

    (A folder that happens to be called like a packaged model is meant by `./name`.)
    Raises ModelError that says what was tried, lists the packaged names and names the nearest.
    """
    if name in PACKAGED:
        folder = fetch(name, progress=progress)
        return Source(folder, name)  # the cache is this machine's own affair
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        folder = gguf.converted(path, progress=progress)
        return Source(folder, str(path))
    if path.is_dir():
        check_folder(path)
        return Source(path, str(path))
    if path.exists():
        raise ModelError(f"{name} is a file. Expected a folder with config.json, or a file that ends in .gguf.")
    if not hub.is_hub_id(name):
        raise ModelError(
            f"no model {name!r}: there is no such folder, and it is no hub id (owner/name). {suggest(name)}"
        )
    try:
        folder = hub.obtain(name, revision, progress=progress)
    except ModelError as error:
        raise ModelError(f"no model {name!r}: there is no such folder, and {error} {suggest(name)}") from error
    check_folder(folder)
    return Source(folder, name)


def suggest(name: str) -> str:
    """The packaged names, the nearest first."""
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Packaged models: {', '.join(PACKAGED)}.{hint}"


def check_folder(folder: Path) -> None:
    """Raise ModelError, naming every fault, unless `folder` holds a config and whole safetensors files."""
    files = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in files:
        raise ModelError(
            f"{folder} holds an adapter, not a base model. Load its base model (base_model_name_or_path in "
            "adapter_config.json), then the adapter onto it with lorakit.load."
        )
    if "config.json" not in files:
        ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
        hint = f" For the GGUF in it give {folder / ggufs[0]}." if ggufs else ""
        raise ModelError(f"{folder} is no model folder: expected config.json in it, came {_few(files)}.{hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("no model_type in it")
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is damaged: {error}. Fetch the model again.") from error
    hub.check_weight_names(sorted(files), str(folder))
    faults = [fault for path in _weight_files(folder) if (fault := _weight_fault(path))]
    if faults:
        raise ModelError(f"{folder} is damaged: {'; '.join(faults)}. Fetch the model again.")


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error!r}). Fetch the model again.") from error


def _weight_fault(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # reads the header and holds it against the file's length
            return None
    except (OSError, SafetensorError) as error:
        return f"{path.name}: {error}"


def _few(names: set[str]) -> str:
    shown = sorted(names)[:6]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "an empty folder"
