"""Requests that the continuous batch has no means for (beams, constrained decoding, penalties): `model.generate`, several
in one batch, each row with its own adapter. After each forward the continuous batch has a turn, so neither waits for long."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.serve.bank import Bank
from lorakit.serve.merging import Merging
from lorakit.serve.sample import next_tokens
from lorakit.serve.turns import Turns
from lorakit.serve.work import Work, conclude, stop_found

NAME = "search"
TOGETHER = 8  # requests of one batch


class Desk(Protocol):
    """What this thread asks of the engine."""

    def dropped(self, work: Work) -> None: ...
    def expired(self, work: Work) -> None: ...
    def crashed(self, work: Work, error: BaseException) -> None: ...


class SearchThread:
    """One thread over one queue. Requests that can share a batch (equal settings of the search) are taken together."""

    def __init__(
        self, model: Any, tokenizer: Any, desk: Desk, bank: Bank, turns: Turns, merging: Merging, *, strict: bool
    ) -> None:
        self.merging = merging
        self.model, self.tokenizer, self.desk, self.bank, self.turns = model, tokenizer, desk, bank, turns
        self.strict = strict
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._waiting: list[Work] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorakit-search", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        self._queue.put(work)

    def close(self) -> None:
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            works = self._next()
            try:
                works = self._placed(works)
                self._compute(works)
            except Exception as error:  # a fault in one batch must not end the thread
                for work in works:
                    self.desk.crashed(work, error)
            finally:
                self.bank.places.running.pop(NAME, None)
                for work in works:
                    self.desk.dropped(work)

    def _placed(self, works: list[Work]) -> list[Work]:
        """Those whose adapters have a place on the device, which is now kept for them; the others wait on."""
        with self.turns:
            active: set[int] = set()
            chosen = []
            for work in works:
                if work.version is None or self.bank.place(work.version, active):
                    active |= {work.adapter} - {-1}
                    chosen.append(work)
            self.bank.places.running[NAME] = frozenset(active)
        self._waiting = [work for work in works if work not in chosen] + self._waiting
        if works and not chosen:
            time.sleep(0.01)  # until requests of the continuous batch end
        return chosen

    def _next(self) -> list[Work]:
        """The oldest request, and those that can share its batch; requests of other settings wait for the next."""
        if not self._waiting:
            self._take(self._queue.get())
        while not self._queue.empty():
            self._take(self._queue.get())
        over = [work for work in self._waiting if work.handle.done or work.late]
        for work in over:
            self._waiting.remove(work)
            self.desk.expired(work) if not work.handle.done else None
            self.desk.dropped(work)
        if not self._waiting:
            return []
        chosen = [work for work in self._waiting if _alike(work) == _alike(self._waiting[0])][:TOGETHER]
        self._waiting = [work for work in self._waiting if work not in chosen]
        return chosen

    def _take(self, work: Work | None) -> None:
        if work is not None:
            self._waiting.append(work)

    def _compute(self, works: list[Work]) -> None:
        if not works:
            return
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids, mask = self._padded(works)
        with self.turns, torch.no_grad():
            self._set(works)
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(works[0]),
                logits_processor=LogitsProcessorList([_Passing(self, works, ids.shape[1])]),
                stopping_criteria=StoppingCriteriaList([_Ending(self, works, ids.shape[1])]),
            )
            self.bank.live.plain()
        for work, row in zip(works, written[:, ids.shape[1] :].tolist(), strict=True):
            self._answer(work, row)

    def _set(self, works: Sequence[Work]) -> None:
        self.merging.apart()
        self.bank.live.spread(tuple(work.adapter for work in works), strict=self.strict)

    def _padded(self, works: list[Work]) -> tuple[Tensor, Tensor]:
        """(ids, mask), (rows, longest), filled on the left."""
        width = max(len(work.prompt) for work in works)
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (width - len(work.prompt)) + work.prompt for work in works]
        mask = [[0] * (width - len(work.prompt)) + [1] * len(work.prompt) for work in works]
        device = next(self.model.parameters()).device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _settings(self, work: Work) -> Any:
        from transformers import GenerationConfig

        params = work.params
        ends = sorted(work.ends)
        return GenerationConfig(
            do_sample=False,
            num_beams=params.num_beams,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=None if params.ignore_eos else ends or None,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            repetition_penalty=params.repetition_penalty,
            use_cache=True,
        )

    def _answer(self, work: Work, row: list[int]) -> None:
        if work.handle.done:
            return
        ends = () if work.params.ignore_eos else work.ends
        cut = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if cut is None else row[:cut]
        if work.params.stop:
            found = (k for k in range(1, len(kept) + 1) if stop_found(self.tokenizer, kept[:k], work.params.stop))
            end = next(found, None)
            kept, cut = (kept, cut) if end is None else (kept[:end], end)
        work.handle.push(kept)
        conclude(work, "length" if cut is None else "stop", self.tokenizer)


def _alike(work: Work) -> tuple[Any, ...]:
    params = work.params
    return params.num_beams, params.max_new_tokens, params.repetition_penalty, params.ignore_eos


class _Passing:
    """Called between two forwards: gives the other threads a turn, keeps constrained rows to their ids, samples."""

    def __init__(self, thread: SearchThread, works: list[Work], start: int) -> None:
        self.thread, self.works, self.start = thread, works, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thread = self.thread
        thread.turns.pass_on()
        thread.bank.live.plain()
        thread._set(self.works)
        beams = len(input_ids) // len(self.works)
        for number, work in enumerate(self.works):
            rows = range(number * beams, (number + 1) * beams)
            if work.params.allowed is not None:
                for row in rows:
                    scores[row] = _only(scores[row], work.params.allowed(input_ids[row, self.start :].tolist()))
            if work.generator is not None:
                drawn = next_tokens(scores[rows.start : rows.stop], [work.params], [work.generator])
                scores[rows.start] = _only(scores[rows.start], drawn.tolist())
        return scores


def _only(scores: Tensor, ids: list[int]) -> Tensor:
    kept = torch.full_like(scores, -torch.inf)
    kept[ids] = scores[ids]
    return kept


class _Ending:
    """Rows that need no more tokens: cancelled, late, or with a stop text."""

    def __init__(self, thread: SearchThread, works: list[Work], start: int) -> None:
        self.thread, self.works, self.start = thread, works, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        beams = len(input_ids) // len(self.works)
        for work in self.works:
            if work.late and not work.handle.done:
                self.thread.desk.expired(work)
        ended = [
            self.thread._closing
            or work.handle.done
            or (beams == 1 and self._stopped(work, input_ids[number, self.start :].tolist()))
            for number, work in enumerate(self.works)
        ]
        return torch.tensor(ended, device=input_ids.device).repeat_interleave(beams)

    def _stopped(self, work: Work, tokens: list[int]) -> bool:
        return bool(work.params.stop) and stop_found(self.thread.tokenizer, tokens, work.params.stop)
