"""`train`: a recipe to a trained, measured, stored adapter with its report."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import output_head
from lorakit.attach.api import attach, learning_rates, parameters, use
from lorakit.data import Dataset, load_examples, prompt_text, references_of
from lorakit.errors import DataError
from lorakit.evaluate import METRICS, Evaluation, default_metrics, evaluate_classification, evaluate_generation
from lorakit.generate import generate
from lorakit.methods.kept import with_head
from lorakit.models import Loaded, load
from lorakit.report import Report, Sample, run_report, write_report
from lorakit.run.batches import OrderedBatches, batches_of, encode_rows, longest, packed, parts_of, told
from lorakit.run.begin import begin_from
from lorakit.run.check import check_class_metrics, check_fits, check_recipe, check_world
from lorakit.run.device import best_device
from lorakit.run.diffusion.config import TEXT_TO_IMAGE
from lorakit.run.figures import figures, next_steps
from lorakit.run.folder import RunFolder, finite
from lorakit.run.listen import Listener
from lorakit.run.prefix import prefixed
from lorakit.run.rate import settings_on
from lorakit.run.recipe import CLASSIFIERS, QUESTION_ANSWERING, Recipe, load_recipe, to_mapping, to_yaml
from lorakit.run.rescue import rescued
from lorakit.run.result import RunResult
from lorakit.run.resume import check_same, fingerprint
from lorakit.run.subject import NAME
from lorakit.run.track import Trackers
from lorakit.store.api import save
from lorakit.store.files import write_text
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Hooks, Trainer
from lorakit.train.loss import Objective, custom_objective, mean_loss, objective_for
from lorakit.train.prune import pruned_forward, pruned_objective
from lorakit.train.world import join

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def train(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    loss: Loss | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Train an adapter as the recipe says and leave a run's folder: adapter, metrics, summary, report.

    loss: an objective of your own, `loss(model, batch)` -> the mean over the batch's rows, in place of the task's.
    overrides: "train.lr=1e-4" each. resume: go on from the folder's checkpoint. overwrite: replace a run that is there.
    Ctrl-C ends the current step, saves, and returns with `interrupted` true. Raises LorakitError, with what was trained
    so far saved where there was anything.
    """
    resolved = load_recipe(recipe, overrides)
    return kind_of(resolved.task)(resolved, loss, listener or Listener()).go(resume=resume, overwrite=overwrite)


def kind_of(task: str) -> "type[Run]":
    if task == QUESTION_ANSWERING:
        from lorakit.run.questions import QuestionRun  # it builds on Run

        return QuestionRun
    if task != TEXT_TO_IMAGE:
        return Run
    from lorakit.run.diffusion.run import TextToImageRun  # it builds on Run

    return TextToImageRun


class Run:
    """One run from recipe to report; each method is one part of it. name: of its adapter on the model."""

    name = NAME

    def __init__(self, recipe: Recipe, loss: Loss | None, listener: Listener) -> None:
        self.world = join()
        # Of several processes that train together the first one speaks and writes.
        self.recipe, self.loss, self.listener = recipe, loss, listener if self.world.first else Listener()
        self.folder = RunFolder(recipe.output)
        trackers = recipe.train.trackers if self.world.first else ()
        self.trackers = Trackers(trackers, self.folder.path, to_mapping(recipe), self.listener.note)
        self.began = time.perf_counter()
        self.before: dict[str, float] = {}
        self.answers_before: list[str] = []

    def go(self, *, resume: bool, overwrite: bool) -> RunResult:
        check_recipe(self.recipe, own_loss=self.loss is not None)
        check_world(self.recipe, self.world.size)
        if resume:
            check_same(self.folder, self.recipe)
        else:
            self.folder.check_free(overwrite=overwrite)
        self.world.wait()  # all have looked before one begins to write
        self.read_data()
        self.load_model()
        if self.recipe.start_from is not None and not resume:  # a checkpoint holds what came of it
            begin_from(self.model, self.recipe.start_from, self.name)
        self.encode()
        trainer = self.trainer()
        if resume:
            self.recall(trainer)
        elif self.world.first:
            self.measure_base()
            self.folder.begin(to_yaml(self.recipe), self.start())
        self.listener.stage(f"training for {trainer.total:,} steps")
        with rescued(trainer, self.folder, self.save_adapter):
            trainer.run()
            self.save_adapter()
        self.world.wait()  # what the first process writes is there for all
        self.trackers.finish()
        if trainer.interrupted and trainer.state.step < trainer.total:
            self.listener.note(f"stopped at step {trainer.state.step:,} of {trainer.total:,}; everything is saved.")
            return RunResult(self.folder.path, {"step": trainer.state.step}, True, self.model, self.loaded.tokenizer)
        summary = self.world.same(self.summarise(trainer) if self.world.first else None)
        return RunResult(self.folder.path, summary, False, self.model, self.loaded.tokenizer)

    # -- before training -----------------------------------------------------------------------------------------------

    @property
    def classifies(self) -> bool:
        return self.recipe.task in CLASSIFIERS

    @property
    def trains_head(self) -> bool:
        """Whether the model's head is of the task alone, so that it is trained beside the adapter."""
        return self.classifies

    def read_data(self) -> None:
        self.listener.stage("reading data")
        data, seed = self.recipe.data, self.recipe.train.seed
        self.train_set = self._read(data.train, "train", data.limit, seed)
        self.eval_set = self._read(data.eval, "eval", data.eval_limit, seed)
        self.test_set = self._read(data.test, "test", data.eval_limit, seed)
        for dataset in (self.train_set, self.eval_set, self.test_set):
            if dataset is not None:
                check_fits(self.recipe, dataset)
        if self.classifies:
            check_class_metrics(self.recipe, self.train_set, self._metrics(self.train_set))

    def _read(self, source: str | None, split: str, limit: int | None, seed: int) -> Any:
        if source is None:
            return None
        data, known = self.recipe.data, getattr(self, "train_set", None)
        return load_examples(
            source,
            format=data.format,
            split=split,
            columns=data.columns,
            label_names=known.label_names if known else None,
            regression=known.regression if known and known.regression else None,
            limit=limit,
            seed=seed,
        )

    def load_model(self) -> None:
        self.listener.stage(f"loading {self.recipe.model}")
        torch.manual_seed(self.recipe.train.seed)  # a new head is drawn from the global generator
        self.loaded: Loaded = load(
            self.recipe.model,
            task=self.recipe.task,
            dtype=self.recipe.base.dtype,
            revision=self.recipe.base.revision,
            quantize=self.recipe.base.quantize,
            label_names=self.train_set.label_names if self.classifies else None,
            regression=self.classifies and self.train_set.regression,
            device=best_device(),
            progress=True,
        )
        self.model = self.loaded.model
        if self.loaded.quantized is not None:
            self.listener.note(str(self.loaded.quantized))
        self.adapt()

    def adapt(self) -> None:
        # Adapters are trained in float32 whatever the base is in: small steps vanish in half precision.
        report = attach(self.model, self.method(), name=self.name, dtype=torch.float32, seed=self.recipe.train.seed)
        self.listener.note(
            f"{report.trainable:,} of {report.total:,} parameters are trained ({report.trainable / report.total:.2%})"
        )

    def method(self) -> Any:
        """The recipe's method; a classification head is trained in full beside it unless the recipe names what is."""
        return with_head(self.recipe.method, output_head(self.model)) if self.trains_head else self.recipe.method

    def encode(self) -> None:
        self.listener.stage("encoding")
        self.train_rows = self._encode(self.train_set)
        self.eval_rows = self._encode(self.eval_set) if self.eval_set is not None else None
        if self.classifies and self.test_set is not None:
            self._encode(self.test_set)  # a row that is too long is told now, not after training
        self.listener.note(told(self.recipe, self.train_set, self.train_rows))

    def _encode(self, dataset: Dataset) -> list[Any]:
        return encode_rows(self.recipe, self.loaded, dataset, progress=self.listener.progress)

    def batches(self, rows: Sequence[Any]) -> OrderedBatches:
        return batches_of(self.recipe, self.loaded, rows)

    @property
    def settings(self) -> TrainConfig:
        """Of the training; the model is loaded."""
        return settings_on(self.recipe, self.model)

    def task_objective(self, label_smoothing: float = 0.0) -> Objective:
        return objective_for(self.recipe.task, label_smoothing=label_smoothing)

    def trainer(self) -> Trainer:
        settings = self.settings
        if self.recipe.train.lr is None:
            self.listener.note(f"learning rate {settings.rate:g}, by method and width of the base")
        own = None if self.loss is None else custom_objective(self.loss)
        self.objective = own or self.task_objective(settings.label_smoothing)
        # The eval loss is the plain one: smoothing shapes training, it is not what is wanted.
        self.measured = own or self.task_objective()
        hooks = Hooks(
            row=self.add_row,
            evaluate=self.evaluate if self.eval_rows else None,
            higher_is_better=lambda name: name in METRICS and METRICS[name].higher_is_better,
            checkpoint=lambda trainer: trainer.save(self.folder.checkpoint),
        )
        batches, note = self.batches(self.train_rows), self.listener.note
        batches.world = self.world
        self.objective = packed(self.recipe, self.loaded, batches, self.objective, own_loss=own is not None, note=note)
        if settings.prune_last_block and own is None:
            self.objective, self.measured = (
                pruned_objective(one, self.model) for one in (self.objective, self.measured)
            )
        trained, rates = parameters(self.model, self.name), learning_rates(self.model, self.name)
        given: dict[str, Any] = {"own_loss": own is not None, "note": note, "world": self.world}
        feed, self.objective = prefixed(self.recipe, self.model, batches, self.objective, **given)
        parts = parts_of(self.recipe, own_loss=own is not None)
        if self.world.size > 1:  # the same seed would drop the same entries of each one's rows
            torch.manual_seed(settings.seed + self.world.rank)
        trainer = Trainer(self.model, trained, feed, self.objective, settings, hooks, rates, parts)
        self.total_steps = trainer.total
        return trainer

    def start(self) -> dict[str, Any]:
        """What a resumed run has to know of the beginning."""
        return {"before": finite(self.before), "answers_before": self.answers_before, "data": self.data_key()}

    def data_key(self) -> str:
        return fingerprint(self.train_rows)

    def recall(self, trainer: Trainer) -> None:
        """Go on from the checkpoint."""
        start = self.folder.read_start()
        if start.get("data") != self.data_key():
            raise DataError(
                "these are not the rows that the run began with, so it cannot go on. Bring them back, or start anew "
                "(--overwrite)",
                source=self.train_set.source,
            )
        self.before, self.answers_before = start["before"], start["answers_before"]
        trainer.load(self.folder.checkpoint)
        if self.world.first:
            self.folder.cut_rows(trainer.state.step)
            write_text(self.folder.recipe, to_yaml(self.recipe))
        self.listener.note(f"going on from step {trainer.state.step:,}")

    # -- while training ------------------------------------------------------------------------------------------------

    def add_row(self, row: Mapping[str, float]) -> None:
        self.folder.add_row(row)
        self.trackers.row(row)
        self.listener.row(row, self.total_steps)

    def evaluate(self) -> dict[str, float]:
        """The eval loss, and for classification its metrics: quick enough for every time."""
        batches = self.batches(self.eval_rows or []).evaluation()
        device = next(self.model.parameters()).device
        moved = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
        metrics = {"loss": mean_loss(self.model, moved, self.measured)}
        if self.classifies and self.eval_set is not None:
            metrics |= self._classify(self.eval_set).metrics
        return metrics

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _classify(self, dataset: Dataset) -> Evaluation:
        with pruned_forward(self.model) if self.recipe.train.prune_last_block else nullcontext():
            return evaluate_classification(
                self.model,
                self.loaded.tokenizer,
                dataset,
                self._metrics(dataset),
                max_length=longest(self.recipe, self.loaded),
                truncate=self.recipe.data.truncate,
            )

    def _metrics(self, dataset: Dataset) -> Sequence[str]:
        if self.recipe.evaluate.metrics is not None:
            return self.recipe.evaluate.metrics
        count = len(dataset.label_names) if dataset.label_names else None
        return default_metrics(self.recipe.task, dataset.format, num_labels=count, regression=dataset.regression)

    @property
    def measured_set(self) -> Dataset | None:
        return self.eval_set if self.test_set is None else self.test_set  # type: ignore[no-any-return]

    def measure_base(self) -> None:
        """The base's metrics and answers, before the adapter has learnt anything."""
        dataset = self.measured_set
        if dataset is None or self.classifies:
            return
        with use(self.model, None):
            if self.recipe.evaluate.metrics and self.recipe.evaluate.before:
                self.listener.stage("measuring the base")
                self.before = self._generate(dataset).metrics
            if self.recipe.evaluate.samples:
                self.listener.stage("the base's answers")
                self.answers_before = self._answers(dataset)

    def _generate(self, dataset: Dataset) -> Evaluation:
        examples: Any = dataset.examples
        return evaluate_generation(
            self.model,
            self.loaded.tokenizer,
            examples,
            self.recipe.generate,
            self.recipe.evaluate.metrics or (),
            progress=self.listener.progress,
        )

    def _answers(self, dataset: Dataset) -> list[str]:
        examples: Any = dataset.examples[: self.recipe.evaluate.samples]
        return generate(
            self.model, self.loaded.tokenizer, examples, self.recipe.generate, progress=self.listener.progress
        )

    # -- after training ------------------------------------------------------------------------------------------------

    def save_adapter(self) -> None:
        if not self.world.first:
            return
        notes = {"model": self.recipe.model, "task": self.recipe.task, "label_names": self.train_set.label_names}
        if self.recipe.base.quantize is not None:
            notes |= {"quantize": self.recipe.base.quantize, "base_dtype": self.recipe.base.dtype}
        save(self.model, self.folder.adapter, self.name, notes=notes)

    def measure_adapter(self) -> dict[str, float]:
        dataset = self.measured_set
        if dataset is None or not (self.classifies or self.recipe.evaluate.metrics):
            return {}
        if self.classifies:
            return self._classify(dataset).metrics
        self.listener.stage("measuring the adapter")
        return self._generate(dataset).metrics

    def summarise(self, trainer: Trainer) -> dict[str, Any]:
        after = self.measure_adapter()
        summary = figures(self.recipe, self.folder, self.model, trainer.state, self.before, after)
        samples = self.samples()
        summary["seconds"] = time.perf_counter() - self.began
        self.folder.write_summary(summary)
        write_report(self.folder.report, self.report(summary, samples))
        return summary

    def samples(self) -> list[Sample]:
        dataset = self.measured_set
        if dataset is None or self.classifies or not self.answers_before:
            return []
        self.listener.stage("the adapter's answers")
        examples: Any = dataset.examples[: self.recipe.evaluate.samples]
        return [
            Sample(
                prompt=prompt_text(example, self.loaded.tokenizer),
                reference=next(iter(references_of(example)), None),
                before=before,
                after=after,
            )
            for example, before, after in zip(examples, self.answers_before, self._answers(dataset), strict=True)
        ]

    def next_steps(self) -> list[tuple[str, str]]:
        return next_steps(self.folder, answers=not self.classifies)

    def report(self, summary: Mapping[str, Any], samples: Sequence[Sample]) -> Report:
        title = f"{self.recipe.model} on {self.train_set.source}"
        return run_report(self.folder.path, summary, title=title, samples=samples, next_steps=self.next_steps())
