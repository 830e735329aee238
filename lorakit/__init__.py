"""lorakit: low-rank adaptation of language models, whole. Public names only, each imported when it is first used."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoRA": "lorakit.methods.lora",
    "FullFineTuning": "lorakit.methods.full",
    "BitFit": "lorakit.methods.bitfit",
    "HoulsbyAdapter": "lorakit.methods.houlsby",
    "LinAdapter": "lorakit.methods.lin",
    "PfeifferAdapter": "lorakit.methods.pfeiffer",
    "AdapterDrop": "lorakit.methods.adapter_drop",
    "ResidualAdapter": "lorakit.methods.residual_adapter",
    "PrefixTuning": "lorakit.methods.prefix_tuning",
    "PromptTuning": "lorakit.methods.prompt_tuning",
    "PromptEmbedding": "lorakit.methods.prompt_embedding",
    "PTuning": "lorakit.methods.p_tuning",
    "Warp": "lorakit.methods.warp",
    "Method": "lorakit.attach.method",
    "attach": "lorakit.attach.api",
    "detach": "lorakit.attach.api",
    "use": "lorakit.attach.api",
    "route": "lorakit.attach.api",
    "adapters": "lorakit.attach.api",
    "parameters": "lorakit.attach.api",
    "count_parameters": "lorakit.attach.api",
    "merge": "lorakit.attach.merge",
    "unmerge": "lorakit.attach.merge",
    "save": "lorakit.store.api",
    "load": "lorakit.store.api",
    "verify": "lorakit.store.verify",
    "inspect": "lorakit.store.inspect",
    "convert": "lorakit.store.convert",
    "combine": "lorakit.methods.combine",
    "plan": "lorakit.plan.api",
    "analyze": "lorakit.analyze.api",
    "compress": "lorakit.analyze.compress",
    "train": "lorakit.run.train",
    "compare": "lorakit.compare.api",
    "sweep": "lorakit.sweep.api",
    "Server": "lorakit.serve.server",
    "LorakitError": "lorakit.errors",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from lorakit.analyze.api import analyze
    from lorakit.analyze.compress import compress
    from lorakit.attach.api import adapters, attach, count_parameters, detach, parameters, route, use
    from lorakit.attach.merge import merge, unmerge
    from lorakit.attach.method import Method
    from lorakit.compare.api import compare
    from lorakit.errors import LorakitError
    from lorakit.methods.adapter_drop import AdapterDrop
    from lorakit.methods.bitfit import BitFit
    from lorakit.methods.combine import combine
    from lorakit.methods.full import FullFineTuning
    from lorakit.methods.houlsby import HoulsbyAdapter
    from lorakit.methods.lin import LinAdapter
    from lorakit.methods.lora import LoRA
    from lorakit.methods.p_tuning import PTuning
    from lorakit.methods.pfeiffer import PfeifferAdapter
    from lorakit.methods.prefix_tuning import PrefixTuning
    from lorakit.methods.prompt_embedding import PromptEmbedding
    from lorakit.methods.prompt_tuning import PromptTuning
    from lorakit.methods.residual_adapter import ResidualAdapter
    from lorakit.methods.warp import Warp
    from lorakit.plan.api import plan
    from lorakit.run.train import train
    from lorakit.serve.server import Server
    from lorakit.store.api import load, save
    from lorakit.store.convert import convert
    from lorakit.store.inspect import inspect
    from lorakit.store.verify import verify
    from lorakit.sweep.api import sweep


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


class _Package(ModuleType):
    """`lorakit.attach` and `lorakit.train` are verbs, and rooms of the same names hold them: importing a room must not put
    the module where the verb stands, as the import system does by itself."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
