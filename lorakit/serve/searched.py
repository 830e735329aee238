"""Requests that the continuous batch has no means for (beams, constrained decoding, penalties): `model.generate`, several
in one batch, each row with its own adapter. After each forward the continuous batch has a turn, so neither waits for long."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.errors import ServeError
from lorakit.serve.bank import Bank
from lorakit.serve.limits import Limits
from lorakit.serve.merging import Merging
from lorakit.serve.sample import drawn, likeliest, no_choice
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
        self,
        model: Any,
        tokenizer: Any,
        desk: Desk,
        bank: Bank,
        limits: Limits,
        turns: Turns,
        merging: Merging,
        *,
        strict: bool,
    ) -> None:
        self.limits, self.merging = limits, merging
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
        chosen = self._together()
        self._waiting = [work for work in self._waiting if work not in chosen]
        return chosen

    def _together(self) -> list[Work]:
        """The first that waits, and those of its settings, as far as the keys and values of all their beams have room."""
        chosen: list[Work] = []
        for work in self._waiting:
            if _alike(work) != _alike(self._waiting[0]):
                continue
            longest = max(len(one.prompt) for one in (*chosen, work)) + work.params.max_new_tokens
            tokens = (len(chosen) + 1) * work.params.num_beams * longest
            if chosen and (len(chosen) == TOGETHER or tokens > self.limits.cache_tokens):
                break
            chosen.append(work)
        return chosen

    def _take(self, work: Work | None) -> None:
        if work is not None:
            self._waiting.append(work)

    def _compute(self, works: list[Work]) -> None:
        if not works:
            return
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids, mask = self._padded(works)
        ending = _Ending(self, works, ids.shape[1])
        with self.turns, torch.no_grad():
            self._set(works)
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(works[0]),
                logits_processor=LogitsProcessorList([_Passing(self, works, ids.shape[1], ending.over)]),
                stopping_criteria=StoppingCriteriaList([ending]),
            )
            self.bank.live.plain()
        for work, row in zip(works, written[:, ids.shape[1] :].tolist(), strict=True):
            try:
                self._answer(work, row, ending.cut)
            except Exception as error:  # one request's fault is no other's
                self.desk.crashed(work, error)

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

    def _answer(self, work: Work, row: list[int], broken: bool) -> None:
        """broken: the thread closed under the search. What had not ended then is no answer, and `dropped` says so."""
        if work.handle.done:
            return
        ends = () if work.params.ignore_eos else work.ends
        cut = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if cut is None else row[:cut]
        if work.params.stop:
            found = (k for k in range(1, len(kept) + 1) if stop_found(self.tokenizer, kept[:k], work.params.stop))
            end = next(found, None)
            kept, cut = (kept, cut) if end is None else (kept[:end], end)
        if broken and len(row) < work.params.max_new_tokens and (cut is None or work.params.num_beams > 1):
            return  # of beams a better one might have come
        work.handle.push(kept)
        conclude(work, "length" if cut is None else "stop", self.tokenizer)


def _alike(work: Work) -> tuple[Any, ...]:
    params = work.params
    return params.num_beams, params.max_new_tokens, params.repetition_penalty, params.ignore_eos


class _Passing:
    """Called between two forwards: gives the other threads a turn, keeps constrained rows to their ids, samples."""

    def __init__(self, thread: SearchThread, works: list[Work], start: int, over: set[int]) -> None:
        self.thread, self.works, self.start, self.over = thread, works, start, over

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thread = self.thread
        thread.turns.pass_on()
        thread.bank.live.plain()
        thread._set(self.works)
        beams = len(input_ids) // len(self.works)
        for number, work in enumerate(self.works):
            rows = slice(number * beams, (number + 1) * beams)
            try:
                if number not in self.over and not work.handle.done:
                    self._choose(work, input_ids[rows, self.start :].tolist(), scores[rows])
            except Exception as error:  # one request's fault (its constraint's, say) is no other's
                thread.desk.crashed(work, error)
            if number in self.over or work.handle.done:
                scores[rows] = 0.0  # whatever they were: no one looks at what follows
        return scores

    def _choose(self, work: Work, answers: list[list[int]], scores: Tensor) -> None:
        """Change the scores of a request's beams in place. Raises ServeError where there is none to choose."""
        going = [
            row for row, tokens in enumerate(answers) if work.ends.isdisjoint(tokens)
        ]  # a constraint has no more to say
        if not all(likeliest(scores[going])[1]):
            raise no_choice()
        if work.params.allowed is not None:
            allowed = {row: work.params.allowed(answers[row]) for row in going}
            if going and not any(allowed.values()):
                raise ServeError("the constraint lets no id follow: `allowed` must give one id at least.")
            for row, ids in allowed.items():
                scores[row] = _only(scores[row], ids)
        if work.generator is not None and going:
            scores[0] = _only(scores[0], [drawn(scores[0], work.params, work.generator)])


def _only(scores: Tensor, ids: list[int]) -> Tensor:
    kept = torch.full_like(scores, -torch.inf)
    kept[ids] = scores[ids]
    return kept


class _Ending:
    """Rows that need no more tokens: cancelled, late, or with a stop text."""

    def __init__(self, thread: SearchThread, works: list[Work], start: int) -> None:
        self.thread, self.works, self.start = thread, works, start
        self.cut = False  # whether the thread closed under them
        self.over: set[int] = set()  # places of requests whose rows have ended by what is no end of sequence

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        beams = len(input_ids) // len(self.works)
        self.cut = self.thread._closing
        for number, work in enumerate(self.works):
            if work.late and not work.handle.done:
                self.thread.desk.expired(work)
            try:
                stopped = beams == 1 and self._stopped(work, input_ids[number, self.start :].tolist())
            except Exception as error:  # one request's fault is no other's
                self.thread.desk.crashed(work, error)
            else:
                self.over |= {number} if stopped else set()
        ended = [self.cut or work.handle.done or number in self.over for number, work in enumerate(self.works)]
        return torch.tensor(ended, device=input_ids.device).repeat_interleave(beams)

    def _stopped(self, work: Work, tokens: list[int]) -> bool:
        return bool(work.params.stop) and stop_found(self.thread.tokenizer, tokens, work.params.stop)
