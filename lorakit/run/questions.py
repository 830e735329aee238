"""`task: question-answering`: a run whose rows are windows of questions' contexts and whose head marks an answer's ends."""

from lorakit.data import Dataset, Encoded, encode_questions
from lorakit.evaluate import Evaluation, evaluate_questions
from lorakit.run.batches import longest
from lorakit.run.train import Run


class QuestionRun(Run):
    """The head is new and trained in full beside the adapter, as a classifier's is."""

    @property
    def trains_head(self) -> bool:
        return True

    def encode(self) -> None:
        super().encode()
        if self.test_set is not None:
            self._encode(self.test_set)  # a question that is too long is told now, not after training

    def _encode(self, dataset: Dataset) -> list[Encoded]:
        """The windows of all questions, one behind the other."""
        questions = encode_questions(
            dataset,
            self.loaded.tokenizer,
            max_length=longest(self.recipe, self.loaded),
            stride=self.recipe.data.stride,
            progress=self.listener.progress,
        )
        return [window.row for windows in questions for window in windows]

    def evaluate(self) -> dict[str, float]:
        metrics = super().evaluate()
        return metrics if self.eval_set is None else metrics | self._answered(self.eval_set).metrics

    def measure_base(self) -> None:
        """Nothing: a head that was just drawn has nothing to measure."""

    def measure_adapter(self) -> dict[str, float]:
        return {} if self.measured_set is None else self._answered(self.measured_set).metrics

    def _answered(self, dataset: Dataset) -> Evaluation:
        return evaluate_questions(
            self.model,
            self.loaded.tokenizer,
            dataset,
            self._metrics(dataset),
            max_length=longest(self.recipe, self.loaded),
            stride=self.recipe.data.stride,
        )

    def next_steps(self) -> list[tuple[str, str]]:
        return [step for step in super().next_steps() if "generate" not in step[1]]
