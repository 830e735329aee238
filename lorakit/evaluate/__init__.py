"""Metrics, and a model's figures on a data set."""

from lorakit.evaluate.labels import accuracy, f1, f1_macro, matthews
from lorakit.evaluate.numbers import pearson, spearman
from lorakit.evaluate.registry import METRICS, Metric, check_metrics, default_metrics, score
from lorakit.evaluate.tasks import Evaluation, evaluate_classification, evaluate_generation
from lorakit.evaluate.text import bleu, exact_match, rouge
from lorakit.evaluate.write import write_predictions

__all__ = [
    "METRICS",
    "Evaluation",
    "Metric",
    "accuracy",
    "bleu",
    "check_metrics",
    "default_metrics",
    "evaluate_classification",
    "evaluate_generation",
    "exact_match",
    "f1",
    "f1_macro",
    "matthews",
    "pearson",
    "rouge",
    "score",
    "spearman",
    "write_predictions",
]
