"""What `lorakit bench train` measures, and the rows that it knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import UsageError

UPPER_THIRD = "upper-third"

LORAKIT, PEFT, FULL, FLOOR, CEILING, PLAIN = "lorakit", "peft", "full", "floor", "ceiling", "lorakit, dropout 0"


@dataclass(frozen=True)
class RowKind:
    """One row of the table. The first side is lorakit; the others' times are told over its.

    given: every side takes the same padded batch; else each batches the round's examples as its users would.
    real: rows of a data set, of their own lengths; else drawn, all of one length.
    """

    name: str
    about: str
    sides: tuple[str, ...]
    given: bool = True
    real: bool = False
    masked: bool = False
    upper: bool = False


_KINDS = (
    RowKind("equal", "equal padded batches, every token a target; kernels only", (LORAKIT, PEFT)),
    RowKind("masked", "the same, a part of the tokens masked from the loss", (LORAKIT, PEFT), masked=True),
    RowKind("floor", "equal batches; floor: the base frozen, forward and activation gradients only", (LORAKIT, FLOOR)),
    RowKind("full", "equal batches against full fine-tuning", (LORAKIT, FULL)),
    RowKind("dropout", "equal batches, dropout on all adapters against none", (LORAKIT, PLAIN)),
    RowKind(
        "upper",
        "upper layers adapted, the same batch again and again; ceiling: these layers without adapters, their input kept",
        (LORAKIT, PEFT, CEILING),
        given=False,
        upper=True,
    ),
    RowKind(
        "upper-masked",
        "the same, a part of the tokens masked from the loss",
        (LORAKIT, PEFT, CEILING),
        given=False,
        upper=True,
        masked=True,
    ),
    RowKind(
        "real", "real lengths as users run it, the same examples in each step", (LORAKIT, PEFT), given=False, real=True
    ),
    RowKind(
        "free",
        "real lengths, lorakit's steps free to hold more examples; the same examples in all",
        (LORAKIT, PEFT),
        given=False,
        real=True,
    ),
)
ROWS = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True)
class BenchConfig:
    """What is measured on what. Raises UsageError for a value that makes no sense."""

    model: str = "smollm2-135m"
    """A packaged name, a folder, a hub id, or a shape with random weights (shapes.py)."""
    rows: Sequence[str] | None = None
    """Names of ROWS; None = all that go with the model, and with the data where there are any."""
    task: str | None = None
    """causal-lm or sequence-classification; None = what the data or the model are for."""
    batch: int = 8
    """Examples in one optimizer step (of PEFT; of lorakit too, where the row does not free it)."""
    batch_tokens: int | None = None
    """Most tokens, padding included, of lorakit's batches in the row `free`; None = batch * length."""
    length: int = 128
    """Tokens of each drawn example."""
    rounds: int = 5
    """Measured turns of each side; two turns before them are not measured."""
    masked: float = 0.5
    """The part of each drawn example that carries no loss in the rows that mask."""
    data: str | None = None
    """A data set, for the rows of real lengths."""
    format: str = "auto"
    """Of the data set (data.format of a recipe)."""
    limit: int | None = 4096
    """Use only so many examples of the data set, drawn with the seed; None = all."""
    layers: str | None = None
    """Layers adapted in every row: "upper-third", or numbers such as "8,9,10"; None = all (the upper rows: upper-third)."""
    r: int = 8
    """Rank of the adapters."""
    dropout: float = 0.05
    """Of the row `dropout`; all others have none."""
    lr: float = 2.0e-4
    """Learning rate of the adapters; full fine-tuning takes a tenth."""
    dtype: str = "float32"
    """Of the base's weights: float32, bfloat16 or float16."""
    device: str | None = None
    """Where to compute; None = the accelerator of this machine, else the CPU."""
    seed: int = 0
    """Of drawn examples, weights and orders."""
    memory: bool = True
    """Measure each side's peak memory too, in a process of its own (the model is loaded once more for each)."""
    overrides: Sequence[str] = ()
    """Further settings of lorakit's recipe, "train.epochs=2" each: they change lorakit's side alone."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("length", 4), ("rounds", 1), ("r", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("limit", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}. Leave it out for the default.")
        for name in ("masked", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), not {getattr(self, name)}.")
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, not {self.lr}.")
        for name in self.rows or ():
            if name not in ROWS:
                raise UsageError(f"row {name!r} is unknown; expected some of: {', '.join(ROWS)}.")
            if ROWS[name].real and self.data is None:
                raise UsageError(f"the row {name!r} measures real lengths: name a data set (--data).")
