"""What can be known to be wrong with a run before a model is loaded: nobody wants to hear of it after an epoch."""

from collections.abc import Sequence

from lorakit.data import ChatExample, Dataset, ImageExample, LabelExample, PromptExample, QuestionExample
from lorakit.errors import DataError, RecipeError
from lorakit.evaluate import check_metrics
from lorakit.methods.warp import Warp
from lorakit.run.diffusion.config import TEXT_TO_IMAGE, DiffusionConfig
from lorakit.run.recipe import CLASSIFICATION, CLASSIFIERS, IMAGE_CLASSIFICATION, QUESTION_ANSWERING, Recipe
from lorakit.run.track import check_trackers

TASK_OF: dict[type, str] = {
    PromptExample: "causal-lm",
    ChatExample: "causal-lm",
    LabelExample: CLASSIFICATION,
    ImageExample: IMAGE_CLASSIFICATION,
    QuestionExample: QUESTION_ANSWERING,
}
"""The task that examples of each kind are for; seq2seq takes what causal-lm does, chats excepted."""


def check_recipe(recipe: Recipe, *, own_loss: bool) -> None:
    """Raise RecipeError (UsageError for a metric's name) for settings that contradict each other or would do nothing."""
    data, train, metrics = recipe.data, recipe.train, recipe.evaluate.metrics
    classifies = recipe.task in CLASSIFIERS
    if data.train is None:
        raise RecipeError("data.train is missing: a training set is needed.")
    if metrics is not None:
        check_metrics(metrics, None if classifies else "text")
        if data.eval is None and data.test is None:
            raise RecipeError("evaluate.metrics are named, but there is neither data.test nor data.eval to measure on.")
    if data.eval is None and (train.eval_every is not None or train.best_metric != "loss"):
        raise RecipeError("train.eval_every and train.best_metric need data.eval, which is missing.")
    if train.best_metric != "loss" and not classifies and recipe.task != QUESTION_ANSWERING:
        raise RecipeError(f"train.best_metric: {recipe.task} is judged by its loss, not by {train.best_metric!r}.")
    if recipe.task == IMAGE_CLASSIFICATION and (data.max_length is not None or data.truncate):
        raise RecipeError("data.max_length and data.truncate are of texts; the model says how large its images are.")
    if recipe.task != TEXT_TO_IMAGE and recipe.diffusion != DiffusionConfig():
        raise RecipeError(
            f"the section diffusion belongs to `task: {TEXT_TO_IMAGE}`, not to {recipe.task}. Leave it out."
        )
    _check_method(recipe)
    _check_questions(recipe)
    check_trackers(train.trackers)
    if own_loss and train.label_smoothing:
        raise RecipeError("train.label_smoothing belongs to the task's own loss, not to one of yours. Leave it out.")


def check_world(recipe: Recipe, processes: int) -> None:
    """Raise RecipeError for what several processes cannot train together."""
    if processes > 1 and recipe.task == TEXT_TO_IMAGE:
        raise RecipeError(f"{TEXT_TO_IMAGE} is trained by one process, not by {processes}. Start one.")
    if processes > 1 and recipe.train.prefix_cache is True:
        raise RecipeError("train.prefix_cache: true keeps states in one process. Start one, or leave it out.")


def _check_method(recipe: Recipe) -> None:
    """Raise RecipeError for a method that no task of a recipe trains."""
    parts = recipe.method.members
    if any(isinstance(one, Warp) for one in parts):
        raise RecipeError(
            f"method: WARP classifies through a language-model head, and `task: {recipe.task}` loads no such head for classes. "
            "Attach lorakit.Warp(...) to a model with its head in Python, and train it there."
        )


def _check_questions(recipe: Recipe) -> None:
    """Raise RecipeError for settings that would do nothing for questions, or that only questions have."""
    if recipe.task != QUESTION_ANSWERING:
        if recipe.data.stride is not None:
            raise RecipeError(
                f"data.stride belongs to `task: {QUESTION_ANSWERING}`, not to {recipe.task}. Leave it out."
            )
    elif recipe.data.truncate:
        raise RecipeError(
            f"data.truncate: {QUESTION_ANSWERING} cuts no context but reads it in windows (data.stride). Leave it out."
        )
    elif recipe.train.label_smoothing:
        raise RecipeError("train.label_smoothing is of tokens and classes, not of an answer's place. Leave it out.")


def check_fits(recipe: Recipe, dataset: Dataset) -> None:
    """Raise DataError where the data are of another task."""
    fitting = TASK_OF[type(dataset.examples[0])]
    if fitting != ("causal-lm" if recipe.task == "seq2seq" else recipe.task):
        raise DataError(
            f"the task {recipe.task} does not go with {dataset.format} data. Set `task: {fitting}`, or name the data's "
            "format.",
            source=dataset.source,
        )


def check_class_metrics(recipe: Recipe, dataset: Dataset, names: Sequence[str]) -> None:
    """Raise UsageError or RecipeError where the metrics or the loss do not go with the training set's labels."""
    check_metrics(names, "number" if dataset.regression else "label")
    best = recipe.train.best_metric
    if best not in ("loss", *names):
        raise RecipeError(f"train.best_metric is {best!r}, but what is measured is: loss, {', '.join(names)}.")
    if dataset.regression and recipe.train.label_smoothing:
        raise RecipeError("train.label_smoothing needs classes, and these labels are scores. Leave it out.")
