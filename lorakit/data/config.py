"""The settings of a run's data."""

from dataclasses import dataclass, field

from lorakit.errors import UsageError


@dataclass(frozen=True)
class Columns:
    """What the columns (keys) of the rows are called. Setting one to your own name is enough to use your file."""

    prompt: str = "prompt"
    """prompt-completion: the text that the model is given."""
    completion: str = "completion"
    """prompt-completion: the text that the model learns to write."""
    references: str = "references"
    """prompt-completion: a list of further right answers, for evaluation; rows may lack it."""
    messages: str | None = None
    """messages: the list of turns; None finds `messages` or `conversations`."""
    text: str | None = None
    """text-label: the (first) text; None finds text, sentence, sentence1, premise, question and the like."""
    pair: str | None = None
    """text-label: the second text of a pair; None finds it beside the first, if there is one."""
    label: str = "label"
    """text-label: the class (name or number) or the score."""


@dataclass(frozen=True)
class DataConfig:
    """Which data a run uses and how rows become examples. Raises UsageError for a number under 1."""

    train: str | None = None
    """A file (.jsonl .json .csv .tsv .parquet .txt), a folder, or a hub set `name[:config][@split]`."""
    eval: str | None = None
    """The same, for measuring during training and choosing the best adapter."""
    test: str | None = None
    """The same, for the figures at the end."""
    format: str = "auto"
    """auto, prompt-completion, messages, alpaca, text-label, e2e, webnlg (webnlg:seen, webnlg:unseen), dart, wikisql, samsum,
    squad, glue, glue:<task>, prompts or imagefolder (formats.py)."""
    max_length: int | None = None
    """The most tokens of a row; None is what the model takes."""
    truncate: bool = False
    """False: a longer row is an error that names its line. True: it is cut (encode.py says where)."""
    stride: int | None = None
    """question-answering: tokens that neighbouring windows of a long context share; None = a third of max_length, and never
    more than half of what the question leaves for the context."""
    limit: int | None = None
    """Use only so many training rows: a sample drawn with the run's seed, in the file's order; the 100 are among the 1,000."""
    eval_limit: int | None = None
    """The same for the eval and the test set."""
    columns: Columns = field(default_factory=Columns)
    """What the columns are called in your files."""

    def __post_init__(self) -> None:
        for name in ("max_length", "limit", "eval_limit", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"data.{name} must be at least 1, came {value}. Leave it out for no limit.")
