"""`lorakit bench latency`: what LoRA and adapters add to inference (Hu et al. 2021, Table 1), as ratios to full fine-tuning.

Full fine-tuning leaves the plain model, and so does a merged LoRA; LoRA unmerged and the adapters compute something besides.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import walk
from lorakit.attach.api import attach, detach
from lorakit.attach.host import Record, host_of
from lorakit.attach.method import Method
from lorakit.bench.shapes import SHAPES, build
from lorakit.bench.train import machine
from lorakit.errors import UsageError
from lorakit.generate.modes import evaluating
from lorakit.methods.body import cache_name, cache_of
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.methods.lora import LoRA
from lorakit.models import list_models, load
from lorakit.models.limits import longest_row
from lorakit.run.device import best_device
from lorakit.run.listen import Listener
from lorakit.run.turns import Side, adapted_side, in_turns, merged_side, plain_side

FULL, MERGED, LORA, ADAPTER_L, ADAPTER_H = "full", "LoRA merged", "LoRA", "adapter L", "adapter H"
PAPER = ("32x512@0.5M", "16x256@11M", "1x128@11M")
"""Table 1's settings: batch x length @ trained parameters."""
_SETTING = re.compile(r"(?P<batch>\d+)x(?P<length>\d+)(\+(?P<decode>\d+))?@(?P<size>\d+(\.\d+)?)(?P<unit>[kM]?)")
_UNITS = {"": 1, "k": 1e3, "M": 1e6}


@dataclass(frozen=True)
class Setting:
    """A batch of `batch` rows of `length` tokens in one forward pass; decode: instead, so many tokens one by one behind them,
    from the cache. parameters: about how many each method trains.
    """

    batch: int
    length: int
    parameters: int
    decode: int = 0

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (f"+{self.decode}" if self.decode else "")


@dataclass(frozen=True)
class LatencyBench:
    """What is measured on what. Raises UsageError for a value that makes no sense."""

    model: str = "gpt2-medium"
    """A shape with random weights (shapes.py), a packaged name, a folder or a hub id of a decoder."""
    settings: Sequence[str] = ("4x128@0.5M", "2x64@11M", "1x128@11M", "1x128+16@11M")
    """BATCHxLENGTH@PARAMETERS each: Table 1's three, scaled to a laptop's CPU, and 16 tokens decoded one by one (+16)."""
    trials: int = 30
    """Measured turns of each side."""
    dtype: str = "float32"
    """Of the base's weights: float32, bfloat16 or float16."""
    device: str | None = None
    """Where to compute; None = the accelerator of this machine, else the CPU."""
    seed: int = 0
    """Of random weights, inputs and the order of the sides."""

    def __post_init__(self) -> None:
        if self.trials < 2:
            raise UsageError(f"trials must be at least 2, not {self.trials}: a spread is of several.")
        self.parsed()

    def parsed(self) -> list[Setting]:
        """The settings. Raises UsageError for one that is not written as expected."""
        if not self.settings:
            raise UsageError("settings: name at least one, such as 1x128@11M.")
        return [_setting(text) for text in self.settings]


def _setting(text: str) -> Setting:
    found = _SETTING.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"expected a setting such as 4x128@0.5M (batch x length @ trained parameters) or 1x128+16@11M, got {text!r}."
        )
    batch, length, decode = (int(found[name] or 0) for name in ("batch", "length", "decode"))
    parameters = round(float(found["size"]) * _UNITS[found["unit"]])
    if not batch or not length or not parameters:
        raise UsageError(f"a setting's batch, length and parameters are at least 1, got {text!r}.")
    return Setting(batch, length, parameters, decode)


@dataclass(frozen=True)
class Latency:
    """One side at one setting. r: the method's rank or width; trained: its parameters. Seconds over the trials, and `ratio`: each
    trial's time over full fine-tuning's in the same trial."""

    side: str
    r: int | None
    trained: int | None
    mean: float
    spread: float
    median: float
    ratio_mean: float
    ratio_spread: float
    ratio_median: float


@dataclass(frozen=True)
class SettingResult:
    """One setting of the table."""

    setting: Setting
    sides: Sequence[Latency]


@dataclass(frozen=True)
class LatencyReport:
    """Everything that was measured, and on what."""

    config: LatencyBench
    parameters: int
    machine: dict[str, Any]
    results: Sequence[SettingResult]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)


def bench_latency(config: LatencyBench, listener: Listener | None = None) -> LatencyReport:
    """Measure every setting. Raises UsageError, ModelError; TargetError for a model that a method cannot take."""
    listener = listener or Listener()
    listener.stage(f"loading {config.model}")
    model, longest = _model(config)
    settings = config.parsed()
    for one in settings:
        if longest is not None and one.length + one.decode > longest:
            raise UsageError(f"the setting {one} is longer than the model's {longest} positions.")
    listener.note(", ".join(f"{key} {value}" for key, value in machine().items()))
    results = []
    with evaluating(model):
        for one in settings:
            listener.stage(f"{one}, about {one.parameters:,} parameters each, {config.trials} trials")
            results.append(SettingResult(one, _measure(model, one, config, listener.progress)))
            listener.note(_in_short(results[-1]))
    total = sum(parameter.numel() for parameter in model.parameters())
    return LatencyReport(config, total, machine(), results)


def _in_short(result: SettingResult) -> str:
    """For whoever waits, or stops the measurement before its last setting."""
    sides = [
        f"{side.side} {side.ratio_mean:.3f} ± {side.ratio_spread:.3f}" for side in result.sides if side.side != FULL
    ]
    return f"{result.setting}, over full fine-tuning: {', '.join(sides)}"


def _model(config: LatencyBench) -> tuple[Any, int | None]:
    """(the model, how long its rows may be)."""
    device = config.device or best_device()
    if config.model in SHAPES:
        loaded = build(config.model, dtype=config.dtype, device=device, seed=config.seed)
    else:
        loaded = load(config.model, dtype=config.dtype, device=device, progress=True)
    if loaded.task != "causal-lm":
        packaged = [one.name for one in list_models() if one.kind == "causal-lm"]
        names = [name for name, (task, _) in SHAPES.items() if task == "causal-lm"]
        raise UsageError(f"{config.model} is no decoder. Take one such as {', '.join([*names, *packaged])}.")
    return loaded.model, longest_row(loaded.model, loaded.tokenizer)


def _measure(model: Any, setting: Setting, config: LatencyBench, progress: Callable[[int, int], None]) -> list[Latency]:
    makers = {LORA: lora_for(model), ADAPTER_L: LinAdapter, ADAPTER_H: HoulsbyAdapter}
    widths = {name: width_for(model, make, setting.parameters) for name, make in makers.items()}
    records = {name: _record(model, make(widths[name]), config.seed) for name, make in makers.items()}
    sides: list[Side] = [plain_side(FULL), merged_side(MERGED, model, records[LORA])]
    sides += [adapted_side(name, model, record) for name, record in records.items()]
    times = in_turns(sides, _work(model, setting, config.seed), config.trials, seed=config.seed, progress=progress)
    source = {MERGED: LORA}
    found = []
    for side, seconds in times.items():
        name = source.get(side, side)
        record = records.get(name)
        trained = None if record is None else sum(tensor.numel() for tensor in record.tensors())
        found.append(_latency(side, widths.get(name), trained, seconds, times[FULL]))
    return found


def lora_for(model: nn.Module) -> Callable[[int], Method]:
    """LoRA on query and value as a function of its rank, for GPT-2's fused projection and for separate ones."""
    leaves = {path.rpartition(".")[2] for path, _ in walk(model)}
    if "c_attn" in leaves:
        return lambda r: LoRA(r=r, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]})
    return lambda r: LoRA(r=r, target_modules=["q_proj", "v_proj"])


def width_for(model: nn.Module, make: Callable[[int], Method], parameters: int) -> int:
    """The rank or width at which the method trains nearest to `parameters`; their number grows evenly with it."""
    one, two = (_size(model, make(r)) for r in (1, 2))
    return max(1, round(1 + (parameters - one) / (two - one)))


def _size(model: nn.Module, method: Method) -> int:
    return sum(tensor.numel() for tensor in method.draft(model, dtype=None, generator=None).tensors())


def _record(model: nn.Module, method: Method, seed: int) -> Record:
    """The method's adapter, drafted and off the model again."""
    name = f"bench-{method.name}"
    attach(model, method, name=name, trainable=False, seed=seed)
    record = host_of(model).records[name]
    detach(model, name)
    return record


def _work(model: Any, setting: Setting, seed: int) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (setting.batch, setting.length), generator=draw).to(model.device)  # (batch, length)
    if not setting.decode:
        return lambda: model(input_ids=ids, use_cache=False)
    return lambda: _decode(model, ids, setting.decode)


def _decode(model: Any, ids: Tensor, count: int) -> None:
    """The likeliest tokens one by one, from the cache. ids: (batch, length)."""
    out = model(input_ids=ids, use_cache=True)
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        out = model(input_ids=token, use_cache=True, **{cache_name(model): cache_of(out)})


def _latency(side: str, r: int | None, trained: int | None, seconds: list[float], full: list[float]) -> Latency:
    ratios = [mine / theirs for mine, theirs in zip(seconds, full, strict=True)]
    figures = [
        of(values) for values in (seconds, ratios) for of in (statistics.fmean, statistics.stdev, statistics.median)
    ]
    return Latency(side, r, trained, *figures)
