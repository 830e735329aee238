"""Classification and embedding: texts of all callers in dynamic batches, each row with its own adapter and its own head."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import QueueFullError, ServeError, TimedOutError, TooLongError, UsageError
from lorakit.serve.bank import Bank, Version
from lorakit.serve.heads import Heads
from lorakit.serve.kinds import Kind
from lorakit.serve.limits import Limits
from lorakit.serve.stats import Stats


@dataclass(frozen=True)
class Classified:
    """label: the likeliest class; scores: {class: probability}. A regression has one class, and its number as it is."""

    label: str
    scores: dict[str, float]
    adapter: str | None
    tokens: int


@dataclass(frozen=True)
class Embedded:
    """vector: the mean over the text's tokens, of length 1."""

    vector: tuple[float, ...]
    adapter: str | None
    tokens: int


@dataclass(eq=False)
class Item:
    """One text that waits. inputs: what the tokenizer made of it, lists of one number a token."""

    inputs: dict[str, list[int]]
    version: Version | None
    outcome: Future[Any] = field(default_factory=Future)

    @property
    def adapter(self) -> int:
        return -1 if self.version is None else self.version.id

    @property
    def tokens(self) -> int:
        return len(self.inputs["input_ids"])


class RowsThread:
    """One thread that takes what waits, as much as a batch holds, those of adapters with the fewest rows in it first."""

    def __init__(self, model: Any, tokenizer: Any, bank: Bank, limits: Limits, kind: Kind, *, strict: bool) -> None:
        self.model, self.tokenizer, self.bank, self.limits, self.strict = model, tokenizer, bank, limits, strict
        self._heads = Heads(model) if kind == "classification" else None
        self._changed = threading.Condition()
        self._waiting: list[Item] = []
        self._running: set[Item] = set()
        self._closing = False
        self._counts = dict.fromkeys(("running", "finished", "failed", "cancelled", "prompt_tokens"), 0)
        self._steps, self._mix = 0, (0, 0)
        self._pad = model.config.pad_token_id
        if self._pad is None:
            model.config.pad_token_id = tokenizer.pad_token_id  # decoders find a row's last token by it
        self._thread = threading.Thread(target=self._run, name="lorakit-rows", daemon=True)
        self._thread.start()

    # -- callers -----------------------------------------------------------------------------------------------------

    def answer(self, texts: Sequence[str | tuple[str, str]], version: Version | None) -> list[Any]:
        """What the model says of each text. See Engine.classify."""
        if not texts:
            raise UsageError("expected at least one text.")
        items = [Item(self._encoded(text), version) for text in texts]
        until = time.monotonic() + self.limits.seconds
        if version is None:
            return self._through(items, until)
        with self.bank.lease(version):
            return self._through(items, until)

    def _encoded(self, text: str | tuple[str, str]) -> dict[str, list[int]]:
        pair = (text,) if isinstance(text, str) else tuple(text)
        if len(pair) > 2 or not all(isinstance(part, str) for part in pair) or not any(pair):
            raise UsageError("expected a text, or a pair of texts, that is not empty.")
        inputs = {name: list(values) for name, values in self.tokenizer(*pair, truncation=False, verbose=False).items()}
        longest = _longest(self.model, self.tokenizer, self.limits)
        if not 0 < len(inputs["input_ids"]) <= longest:
            raise TooLongError(f"a text may have 1 to {longest} tokens; this one has {len(inputs['input_ids'])}.")
        return inputs

    def _through(self, items: list[Item], until: float) -> list[Any]:
        with self._changed:
            if self._closing:
                raise ServeError("this engine is closed.")
            if len(self._waiting) + self._counts["running"] + len(items) > self.limits.queue:
                raise QueueFullError(f"at most {self.limits.queue} texts may wait. Ask again in a moment.")
            self._waiting += items
            self._changed.notify_all()
        try:
            return [item.outcome.result(max(0.0, until - time.monotonic())) for item in items]
        except TimeoutError:
            raise TimedOutError(f"not done within {self.limits.seconds:g} seconds.") from None
        finally:
            self._withdraw(items)

    def _withdraw(self, items: list[Item]) -> None:
        """Take back what still waits, and wait for what is being computed: the adapter's lease ends behind this."""
        with self._changed:
            self._waiting = [item for item in self._waiting if item not in items]
            self._changed.wait_for(lambda: self._running.isdisjoint(items))

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                try:
                    batch = self._next()
                except Exception as error:  # of the device's memory, say: those that wait are told, others may follow
                    self._refuse(error)
                    continue
                self._running = set(batch)
                self._counts["running"] = len(batch)
            try:
                answers = self._computed(batch)
                for item, answer in zip(batch, answers, strict=True):
                    if isinstance(answer, ServeError):
                        item.outcome.set_exception(answer)
                    else:
                        item.outcome.set_result(answer)
            except Exception as error:  # a fault in one batch must not end the thread
                for item in batch:
                    if not item.outcome.done():
                        item.outcome.set_exception(ServeError(f"the engine failed: {error!r}"))
            self._done(batch)

    def _refuse(self, error: Exception) -> None:
        """Fail all that waits, for no batch can be made of it."""
        for item in self._waiting:
            item.outcome.set_exception(ServeError(f"the engine failed: {error!r}"))
        self._counts["failed"] += len(self._waiting)
        self._waiting = []
        self._changed.notify_all()

    def _done(self, batch: list[Item]) -> None:
        with self._changed:
            failed = sum(item.outcome.exception() is not None for item in batch)
            self._counts["finished"] += len(batch) - failed
            self._counts["failed"] += failed
            self._counts["prompt_tokens"] += sum(item.tokens for item in batch)
            self._counts["running"] = 0
            self._running = set()
            self._changed.notify_all()

    def _next(self) -> list[Item]:
        """A batch: rows as they fit, filled up to the longest, into the tokens of a step; one row always does."""
        share: Counter[int] = Counter()
        keyed = []
        for arrival, item in enumerate(self._waiting):
            keyed.append((share[item.adapter], arrival, item))
            share[item.adapter] += 1
        batch: list[Item] = []
        active: set[int] = set()
        longest = 0
        for _, _, item in sorted(keyed, key=lambda one: one[:2]):
            width = max(longest, item.tokens)
            if batch and (len(batch) == self.limits.running or width * (len(batch) + 1) > self.limits.step_tokens):
                break
            if item.version is not None and not self.bank.place(item.version, active):
                break
            longest = width
            active.add(item.adapter)
            batch.append(item)
        self._waiting = [item for item in self._waiting if item not in batch]
        return batch

    def _computed(self, batch: list[Item]) -> list[Any]:
        """An answer for each; a ServeError for one whose numbers are not finite, which is no fault of the others."""
        live, rows = self.bank.live, tuple(item.adapter for item in batch)
        if self._heads is not None:
            held = {item.version for item in batch if item.version is not None and item.version.labels is not None}
            self._heads.own = {version.id: self.bank.rows(version).head for version in held}
            self._heads.rows = rows
        inputs = _padded([item.inputs for item in batch], self.tokenizer, next(self.model.parameters()).device)
        live.spread(rows, strict=self.strict)
        try:
            with torch.no_grad():
                output = self.model(**inputs)
        finally:
            live.plain()
        self._steps, self._mix = self._steps + 1, (len(rows), len(set(rows)))
        if self._heads is not None:
            logits = output.logits.float()
            fine = logits.isfinite().all(-1).tolist()
            each = zip(batch, logits, fine, strict=True)
            return [self._classified(item, row) if one else _not_finite() for item, row, one in each]
        mask = inputs["attention_mask"][..., None]
        means = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        vectors = torch.nn.functional.normalize(means, dim=-1)
        fine = vectors.isfinite().all(-1).tolist()
        each = zip(batch, vectors.tolist(), fine, strict=True)
        return [Embedded(tuple(v), _hash(item), item.tokens) if one else _not_finite() for item, v, one in each]

    def _classified(self, item: Item, logits: Tensor) -> Classified:
        labels = None if item.version is None else item.version.labels
        if labels is None:
            names = self.model.config.id2label
            labels = tuple(str(names[k]) for k in range(self.model.config.num_labels))
        values = logits[: len(labels)]
        scores = values if len(labels) == 1 else values.softmax(-1)
        best = labels[int(values.argmax())]
        return Classified(best, dict(zip(labels, scores.tolist(), strict=True)), _hash(item), item.tokens)

    def stats(self) -> Stats:
        """See Engine.stats. running counts texts that wait with those in the batch."""
        with self._changed:
            counts = dict(self._counts)
            counts["running"] += len(self._waiting)
        return Stats(
            **counts, new_tokens=0, steps=self._steps, requests_in_batch=self._mix[0], adapters_in_batch=self._mix[1]
        )

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        for item in self._waiting:
            item.outcome.set_exception(ServeError("the engine stopped before this was done."))
        self.model.config.pad_token_id = self._pad
        if self._heads is not None:
            self._heads.close()


def _not_finite() -> ServeError:
    return ServeError(
        "expected finite numbers of the model, and those for this text are not finite (NaN or infinity). The adapter's weights "
        "are too large for the base, or the base's own are damaged. Serve another version."
    )


def _hash(item: Item) -> str | None:
    return None if item.version is None else item.version.hash


def _longest(model: Any, tokenizer: Any, limits: Limits) -> int:
    from lorakit.models import longest_row

    found = longest_row(model, tokenizer)
    return limits.prompt_tokens if found is None else min(found, limits.prompt_tokens)


def _padded(rows: list[dict[str, list[int]]], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Filled on the right up to the longest row."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id or 0}
    padded = {
        name: [row[name] + [fill.get(name, 0)] * (width - len(row["input_ids"])) for row in rows] for name in rows[0]
    }
    padded.setdefault(
        "attention_mask", [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    )
    return {name: torch.tensor(values, device=device) for name, values in padded.items()}
