"""Decoding, scoring and classifying with a model that is loaded (and perhaps adapted)."""

from lorakit.generate.classify import Prediction, classify, classify_images
from lorakit.generate.config import GenerateConfig
from lorakit.generate.decode import generate
from lorakit.generate.likelihood import mean_nll, perplexity
from lorakit.generate.prompts import Prompt
from lorakit.generate.spans import SpanAnswer, answer_questions

__all__ = [
    "GenerateConfig",
    "Prediction",
    "Prompt",
    "SpanAnswer",
    "answer_questions",
    "classify",
    "classify_images",
    "generate",
    "mean_nll",
    "perplexity",
]
