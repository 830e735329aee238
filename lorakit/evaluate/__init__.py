"""Metrics, and a model's figures on a data set."""

from lorakit.evaluate.labels import accuracy, f1, f1_macro, matthews
from lorakit.evaluate.logical import logical_form
from lorakit.evaluate.nlg import cider, meteor, nist, rouge_l_coco, ter
from lorakit.evaluate.numbers import pearson, spearman
from lorakit.evaluate.questions import evaluate_questions
from lorakit.evaluate.registry import METRICS, Metric, check_metrics, default_metrics, score
from lorakit.evaluate.seeds import Best, SeedSummary, best_epoch, over_seeds
from lorakit.evaluate.squad import squad_exact, squad_f1
from lorakit.evaluate.tasks import Evaluation, evaluate_classification, evaluate_generation
from lorakit.evaluate.text import bleu, exact_match, rouge
from lorakit.evaluate.write import write_predictions

__all__ = [
    "METRICS",
    "Best",
    "Evaluation",
    "Metric",
    "SeedSummary",
    "accuracy",
    "best_epoch",
    "bleu",
    "check_metrics",
    "cider",
    "default_metrics",
    "evaluate_classification",
    "evaluate_generation",
    "evaluate_questions",
    "exact_match",
    "f1",
    "f1_macro",
    "logical_form",
    "matthews",
    "meteor",
    "nist",
    "over_seeds",
    "pearson",
    "rouge",
    "rouge_l_coco",
    "score",
    "spearman",
    "squad_exact",
    "squad_f1",
    "ter",
    "write_predictions",
]
