"""The settings of a training run."""

import math
from dataclasses import dataclass

from lorakit.attach.method import Method
from lorakit.errors import UsageError

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
ADAMW_8BIT = "adamw8bit"
OPTIMIZERS = ("adamw", ADAMW_8BIT)


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. Raises UsageError for a value that makes no sense."""

    epochs: float = 1.0
    """Passes over the training set; a fraction stops inside one."""
    max_steps: int | None = None
    """Optimizer steps at the most; None = what `epochs` gives."""
    batch_size: int = 8
    """Examples that make up one optimizer step (with `accumulate`: that many times as many)."""
    pass_tokens: int | None = 8192
    """The most positions (tokens and padding) of one forward pass: a batch that has more is run in several, rows of like
    length together, and so is one where that saves enough padding. The optimizer step is the same. None = never."""
    batch_tokens: int | None = None
    """In place of batch_size: the most tokens in one forward pass, padding included; as many examples of like length as fit
    (an example that is longer comes alone)."""
    packing: bool | str = "auto"
    """Several examples in one row, none of which sees another: auto = where the model takes it and it saves padding."""
    pack_length: int | None = None
    """The most tokens of a packed row; None = 256, or the batch's longest example where it has more."""
    accumulate: int = 1
    """Batches per optimizer step; the loss is normalised over all of them together."""
    lr: float | None = None
    """Peak learning rate; None = in a recipe by method and width of the base (lorakit.run.rate), elsewhere 2e-4. LoRA wants about
    ten times what full fine-tuning does."""
    schedule: str = "linear"
    """How the rate goes after warm-up: linear or cosine to zero, or constant."""
    warmup: float = 0.06
    """Warm-up: a share of all steps where below 1, else a number of steps."""
    optimizer: str = "adamw"
    """adamw, or adamw8bit: the same with its state in 8 bits (a quarter of the memory; needs torchao)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.999
    """AdamW's decay of the gradient's square."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None = unbounded."""
    precision: str = "fp32"
    """fp32, or autocast to bf16 or fp16 (fp16 on a GPU only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    prefix_cache: bool | str = "auto"
    """Compute the states below the first adapted block once for each training row and keep them: auto = where that is exact
    (nothing is trained and nothing random below it) and rows are seen more than once."""
    prefix_memory: float = 1.0
    """GiB of memory that kept states may take; what is beyond goes to a nameless file in the run's folder."""
    prefix_disk: float = 16.0
    """GiB of that file; where the states need more, they are not kept."""
    prune_last_block: bool = True
    """Run the last block only at the position that a classification head reads: exact, for BERT, RoBERTa, Llama and GPT-2."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all classes."""
    group_by_length: bool | None = None
    """Put rows of like length together in a batch; None = only where rows are not packed. A batch of rows of one length is a less
    fair sample of the data, and packing is rid of the padding without it."""
    seed: int = 0
    """Of the adapter's first values, a new head, the order of the data and dropout."""
    eval_every: int | None = None
    """Steps between evaluations; None = after each epoch."""
    keep: str = "best"
    """Which adapter stays: "best" on the eval set (the last where there is none), or "last"."""
    best_metric: str = "loss"
    """What "best" means: the eval loss, or the name of an evaluated metric."""
    save_every: int | None = None
    """Steps between checkpoints from which a run can be resumed; None = at the end and on Ctrl-C."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    trackers: tuple[str, ...] = ()
    """Where rows of metrics.jsonl go as well: tensorboard (into the run's folder), trackio, wandb."""

    def __post_init__(self) -> None:
        self._check_batching()
        for name in ("max_steps", "batch_size", "accumulate", "eval_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"train.{name} must be at least 1, not {value}.")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"train.{name} must be a finite number above 0, not {value}.")
        for name in ("warmup", "weight_decay", "prefix_memory", "prefix_disk"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"train.{name} must be a finite number of at least 0, not {getattr(self, name)}.")
        for name in ("beta1", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"train.{name} must be in [0, 1), not {getattr(self, name)}.")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"train.clip must be above 0 (leave it empty for no clipping), not {self.clip}.")
        known_values = {
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "keep": ("best", "last"),
        }
        for name, known in known_values.items():
            if getattr(self, name) not in known:
                raise UsageError(f"train.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")

    @property
    def rate(self) -> float:
        """The peak learning rate, given or not."""
        return Method.learning_rate if self.lr is None else self.lr

    def _check_batching(self) -> None:
        if self.prefix_cache not in (True, False, "auto"):
            raise UsageError(f"train.prefix_cache must be auto, true or false, not {self.prefix_cache!r}.")
        for name in ("pass_tokens", "batch_tokens", "pack_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"train.{name} must be at least 1, not {value}.")
        if self.packing not in (True, False, "auto"):
            raise UsageError(f"train.packing must be auto, true or false, not {self.packing!r}.")
        if self.packing is False and self.pack_length is not None:
            raise UsageError("train.pack_length does nothing without train.packing. Leave it out.")
        if self.batch_tokens is not None and self.group_by_length is False:
            raise UsageError("train.batch_tokens puts rows of like length together: leave train.group_by_length true.")
