"""The parts of a diffusion pipeline: which one an adapter belongs to."""

import re
from collections.abc import Iterable

from lorakit.errors import FileError
from lorakit.store.foreign.hub import Adapter, Bundle, sort

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
# Where the paths of one component alone begin.
SIGNS = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b"),
    "transformer": re.compile(r"(transformer_blocks|single_transformer_blocks)\b"),
    "text_encoder": re.compile(r"(text_model\.|encoder\.layers\.\d+\.(self_attn|mlp)\.)"),
}
CLIP = "text_model."  # transformers 5 builds CLIP's text encoder without it; files have it


def named(bundle: Bundle, component: str | None) -> Bundle:
    """The same adapters, each under its component's name.

    A single adapter without one takes `component`, or what its notes or its paths tell. Raises FileError where nothing does.
    """
    return {name or component or _guess(adapter): adapter for name, adapter in bundle.items()}


def _guess(adapter: Adapter) -> str:
    noted = adapter.notes.get("component")
    if noted in COMPONENTS:
        return str(noted)
    paths = list(sort(adapter.tensors).pairs)
    found = guess(paths)
    if found is not None:
        return found
    raise FileError(
        f"which part of a pipeline is it for? Its modules ({paths[0] if paths else 'none'}, ...) do not tell: say so with "
        f"component ({', '.join(COMPONENTS)})."
    )


def guess(paths: Iterable[str]) -> str | None:
    """The component that all these module paths are of, None where they do not tell."""
    paths = list(paths)
    return next((name for name, sign in SIGNS.items() if paths and all(sign.match(path) for path in paths)), None)


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")


def filed(path: str, component: str) -> str:
    """A module's path as files have it: under text_model for CLIP's text encoder."""
    return CLIP + path if is_text(component) and path.startswith("encoder.layers.") else path


def built(path: str, component: str, modules: Iterable[str]) -> str:
    """A file's path as the model has it, where the model is known."""
    known = set(modules)
    short = path.removeprefix(CLIP)
    return short if is_text(component) and path not in known and short in known else path
