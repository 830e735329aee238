"""What a base can answer."""

from typing import Any, Literal

from lorakit.errors import WrongKindError

Kind = Literal["generation", "classification", "embedding"]


def kind_of(model: Any) -> Kind:
    """By the model's class: what it is for. Raises WrongKindError for what no route serves."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise WrongKindError(f"{name} is an encoder-decoder, which is not served. Use lorakit generate for it.")
    if name.endswith("ForSequenceClassification"):
        return "classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "generation"
    if name.endswith("Model"):
        return "embedding"
    raise WrongKindError(
        f"{name} is not served: expected a causal language model, a sequence classifier, or an encoder without a head."
    )
