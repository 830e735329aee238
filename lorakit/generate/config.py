"""How to decode."""

from dataclasses import dataclass

from lorakit.errors import UsageError


@dataclass(frozen=True)
class GenerateConfig:
    """How to decode. The default is greedy. Raises UsageError for a value out of range or one that would do nothing."""

    max_new_tokens: int = 128
    """The most tokens to write after a prompt."""
    num_beams: int = 1
    """Beams of a beam search; 1 is none."""
    do_sample: bool = False
    """Draw each token at random instead of taking the likeliest."""
    temperature: float = 1.0
    """Sampling: divides the logits; above 0, lower is closer to greedy."""
    top_p: float = 1.0
    """Sampling: draw from the smallest set of tokens with this probability together, in (0, 1]; 1 is all."""
    top_k: int = 0
    """Sampling: draw from so many likeliest tokens; 0 is all."""
    length_penalty: float = 1.0
    """Beams: a beam's log-probability is divided by its length to this power; above 0 favours longer texts."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens is written twice; 0 lets them repeat."""
    batch_size: int = 16
    """Prompts decoded at once (each takes num_beams rows)."""
    seed: int = 0
    """Sampling: of the draws. They also depend on batch_size and on the other prompts."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; the answer is cut before the first of them."""

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": 1,
            "num_beams": 1,
            "batch_size": 1,
            "top_k": 0,
            "no_repeat_ngram_size": 0,
            "seed": 0,
        }
        for name, least in bounds.items():
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name} must be at least {least}, came {value}.")
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, came {self.temperature}. For greedy use do_sample=False.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], came {self.top_p}.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UsageError(f"stop must be a list of texts, none of them empty; came {self.stop!r}.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """A setting that another one makes do nothing is a mistake to name, not to pass over."""
        if not self.do_sample:
            for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
                if getattr(self, name) != neutral:
                    raise UsageError(f"{name} acts only with do_sample=True; set that, or leave {name} out.")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise UsageError("length_penalty acts only with num_beams above 1; set that, or leave length_penalty out.")
