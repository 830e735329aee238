"""The recipe: one YAML file that says what to adapt, to what, and how. Checked whole before anything loads.

Every default stands on the dataclass of the room that it configures; this file only composes them. An unknown key is an
error with the nearest name, and every fault of a recipe is listed at once.
"""

import copy
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from lorakit.attach.method import Method, Several
from lorakit.data import DataConfig
from lorakit.errors import RecipeError
from lorakit.generate import GenerateConfig
from lorakit.methods.lora import LoRA
from lorakit.methods.table import METHODS
from lorakit.models.quantize import QUANTIZATIONS
from lorakit.run.diffusion.config import ATTENTION, TEXT_TO_IMAGE, DiffusionConfig
from lorakit.run.document import read_yaml
from lorakit.train.config import TrainConfig

CLASSIFICATION = "sequence-classification"
IMAGE_CLASSIFICATION = "image-classification"
CLASSIFIERS = (CLASSIFICATION, IMAGE_CLASSIFICATION)
QUESTION_ANSWERING = "question-answering"
TASKS = ("causal-lm", "seq2seq", *CLASSIFIERS, QUESTION_ANSWERING, TEXT_TO_IMAGE)


@dataclass(frozen=True)
class BaseConfig:
    """How the base model is loaded."""

    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantize: str | None = None
    """nf4 (QLoRA), fp4, int8 or int4: quantise every linear layer but the output head; None = leave the base as it is."""

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise RecipeError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {self.quantize!r}.")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured at the end of a run, on data.test (data.eval where there is none)."""

    metrics: tuple[str, ...] | None = None
    """Names of metrics; None = the task's own for classification, the loss alone for text."""
    samples: int = 4
    """Prompts whose answers before and after training go into the report (text only)."""
    before: bool = True
    """Measure the base too, for text; a fresh classification head has nothing to measure."""


@dataclass(frozen=True)
class Recipe:
    """One run. See the dataclass of each section for its keys."""

    model: str
    """Hub id, folder, .gguf file, or a packaged name (lorakit models)."""
    data: DataConfig
    """What to train and measure on."""
    output: str = "runs/latest"
    """The run's folder."""
    task: str = "causal-lm"
    """causal-lm, seq2seq, sequence-classification, image-classification, question-answering or text-to-image."""
    method: Method = field(default_factory=LoRA)
    """`name: lora` (or another of lorakit.methods.table) and its fields; a list of such adapts together, as one adapter."""
    start_from: str | None = None
    """A run's folder, an adapter's or a hub id whose low-rank part (not its head) this run's begins with; None = afresh."""
    base: BaseConfig = field(default_factory=BaseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Of text-to-image alone."""


def load_recipe(source: "str | Path | Mapping[str, Any] | Recipe", overrides: Sequence[str] = ()) -> Recipe:
    """A Recipe from a YAML file, a mapping or a Recipe. overrides: "train.lr=1e-4" each. Raises RecipeError."""
    if isinstance(source, Recipe):
        if overrides:
            source = to_mapping(source)
        else:
            return source
    document = read_document(source) if isinstance(source, str | Path) else copy.deepcopy(dict(source))
    for override in overrides:
        override_key(document, override)
    if document.get("task") == TEXT_TO_IMAGE:
        _aim_at_attention(document)
    faults: list[str] = []
    recipe = build(Recipe, document, "", faults)
    if document.get("task", Recipe.task) not in TASKS:
        faults.append(f"task: expected one of {', '.join(TASKS)}, got {document['task']!r}")
    if faults:
        name = str(source) if isinstance(source, str | Path) else "the recipe"
        raise RecipeError(
            f"{name} has {len(faults)} fault{'s' * (len(faults) > 1)}:\n" + "\n".join(f"  - {f}" for f in faults)
        )
    return typing.cast(Recipe, recipe)


def _aim_at_attention(document: dict[str, Any]) -> None:
    """A denoiser's adapter goes to its attention where the recipe names no targets, as everywhere in that trade."""
    method = document.setdefault("method", {"name": LoRA.name})
    if isinstance(method, Mapping) and method.get("name", LoRA.name) == LoRA.name and "target_modules" not in method:
        document["method"] = {**method, "target_modules": list(ATTENTION)}


def read_document(source: str | Path) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.is_file():
        hint = f" Did you mean {path / 'recipe.yaml'}?" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(f"there is no recipe at {path}. Expected a YAML file with at least `model` and `data`.{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    document = read_yaml(text, str(path))
    if not isinstance(document, dict):
        came = "nothing" if document is None else type(document).__name__
        raise RecipeError(f"{path}: expected keys such as `model:` and `data:`, got {came}.")
    return document


def override_key(document: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"expected KEY=VALUE such as train.lr=1e-4, got {override!r}.")
    *sections, last = key.strip().split(".")
    place = document
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise RecipeError(f"{override}: {section!r} has no keys below it.")
    place[last] = read_yaml(text, override)


def build(cls: type, values: Any, where: str, faults: list[str]) -> Any:
    """An instance of dataclass `cls` from a mapping, or None with faults added."""
    if not isinstance(values, Mapping):
        came = "nothing: leave it out for the defaults" if values is None else repr(values)
        faults.append(f"{where or 'recipe'}: expected keys below it, got {came}")
        return None
    known = {one.name: one for one in fields(cls)}
    types_ = typing.get_type_hints(cls)
    before = len(faults)
    built: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            faults.append(f"{path}: unknown key; {hint}")
        elif types_[key] is Method:
            built[key] = _method(value, path, faults)
        elif is_dataclass(types_[key]):
            built[key] = build(typing.cast(type, types_[key]), value, path, faults)
        else:
            built[key] = _value(types_[key], value, path, faults)
    for name, one in known.items():
        if name not in values and one.default is MISSING and one.default_factory is MISSING:
            faults.append(f"{where + '.' if where else ''}{name}: missing")
    if len(faults) > before:
        return None
    try:
        return cls(**built)
    except ValueError as error:
        faults.append(str(error) if not where or str(error).startswith(where) else f"{where}: {error}")
        return None


def _method(value: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, Method):
        return value
    if isinstance(value, list):
        return _several([_method(one, f"{where}[{i}]", faults) for i, one in enumerate(value)], where, faults)
    name = value.get("name", LoRA.name) if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping) or not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        faults.append(f"{where}: expected keys with `name: {' | '.join(METHODS)}`, got {name!r}{hint}")
        return None
    rest = {key: one for key, one in value.items() if key != "name"}
    return build(METHODS[name], rest, where, faults)


def _several(methods: list[Any], where: str, faults: list[str]) -> Any:
    if None in methods:
        return None  # its fault is noted
    try:
        return methods[0] if len(methods) == 1 else Several(tuple(methods))
    except ValueError as error:
        faults.append(f"{where}: {error}")
        return None


def _value(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    """`value` checked and turned into the field's type by pydantic ("1e-4" is a number, "8" a whole one)."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        faults.append(f"{where}: expected {_words(kind)}, got {value!r} ({first['msg']})")
        return None


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(one) for one in typing.get_args(kind))
    return {type(None): "nothing", int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        kind, str(kind).replace("collections.abc.", "").replace("typing.", "")
    )


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default spelt out, as plain YAML values."""
    document = asdict(recipe)
    method = recipe.method
    parts = [{"name": one.name, **asdict(one)} for one in method.members]  # type: ignore[call-overload]
    document["method"] = parts if isinstance(method, Several) else parts[0]
    return typing.cast(dict[str, Any], _plain(document))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every default spelt out; `load_recipe` gives it back."""
    import yaml

    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)
