"""Many adapters in transformers' continuous batching. Import it lazily: it needs transformers at once, for its base classes.

No documented extension point: tested with transformers 5.20 to 5.24; tests/serve/test_serve_engine.py fails loudly where it
changes.
What is added to each part: the scheduler brings adapters to the device, in fair order, and puts requests of one adapter
side by side; blocks of the key-value cache are shared within one adapter version alone; the plan of a step's tokens is set
right before its forward; each request samples for itself.
"""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from lorakit.core.batched import LONG
from lorakit.serve.bank import Bank
from lorakit.serve.limits import Limits
from lorakit.serve.merging import Merging
from lorakit.serve.sample import drawn, likeliest, no_choice
from lorakit.serve.turns import Turns
from lorakit.serve.work import Work

NAME = "lorakit"
WORDS = 1 << 20  # no vocabulary has more ids
DIGIT = 11  # bits of a version's number that an int32 has room for beside an id
LARGEST = 1e30  # of keys and values: times those of another request they are no infinity
PATIENCE = 2.0  # seconds after which a request that finds no place on the device lets no other overtake it


class Desk(Protocol):
    """What the batch asks of the engine. All are called in the batch's own thread."""

    works: dict[str, Work]

    def told(self, work: Work, output: GenerationOutput) -> None: ...
    def dropped(self, work: Work) -> None: ...
    def expired(self, work: Work) -> None: ...
    def crashed(self, work: Work, error: BaseException) -> None: ...


class AdapterScheduler(FIFOScheduler):
    """First come, first served, but an adapter with many requests takes turns with the others."""

    desk: Desk
    bank: Bank
    turns: Turns
    batch: list[FutureRequestState]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        for work in [work for work in list(self.desk.works.values()) if work.late]:
            self.desk.expired(work)
        with self.turns:  # adapters come to their places: no forward of another thread may run
            scheduled, *rest = super().schedule_batch(token_budget, cache_budget)
            self._note()
            self.bank.settle()
            if scheduled:
                scheduled.sort(key=self._order)
                self.batch = scheduled
        return (scheduled, *rest)

    def _order(self, future: FutureRequestState) -> tuple[bool, int]:
        """Requests that go on by a token in the order of their adapters' rows, then prompts."""
        place = self.bank.places.placed.get(self._adapter(future.state))
        return future.query_length >= LONG, -1 if place is None else place.start

    def _note(self) -> None:
        """Tell the bank whose rows must stay where they are."""
        self.bank.places.running[NAME] = frozenset(self._adapter(one) for one in self.active_requests.values())

    def finish_request(self, request_id: str) -> None:
        super().finish_request(request_id)
        self._note()

    def clear_cancelled_requests(self) -> list[RequestState]:
        states = super().clear_cancelled_requests()
        self._note()
        for state in states:
            work = self.desk.works.get(state.request_id)
            if work is not None:
                self.desk.dropped(work)
        return states

    def _adapter(self, state: RequestState) -> int:
        return self.desk.works[state.request_id].adapter

    def _get_waiting_candidates(self) -> list[RequestState]:
        """The waiting requests that may run now, those of adapters with the fewest running ones first."""
        running = [self._adapter(state) for state in self.active_requests.values()]
        share, active = Counter(running), set(running)
        keyed = []
        for arrival, state in enumerate(super()._get_waiting_candidates()):
            adapter = self._adapter(state)
            keyed.append((share[adapter], arrival, state))
            share[adapter] += 1
        chosen: list[RequestState] = []
        for _, _, state in sorted(keyed, key=lambda one: one[:2])[: self.max_requests_per_batch - len(running)]:
            work = self.desk.works[state.request_id]
            if work.version is None or self.bank.place(work.version, active):
                active.add(work.adapter)
                chosen.append(state)
            elif work.handle.waited > PATIENCE:
                break
        return chosen


class Router(OutputRouter):
    """Outputs go to the engine, in the thread that makes them."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.desk = desk

    def deliver(self, output: GenerationOutput) -> None:
        work = self.desk.works.get(output.request_id)
        if work is not None:
            self.desk.told(work, output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class AdapterBatch(ContinuousBatchingManager):
    """The continuous batch of one model."""

    def __init__(
        self,
        model: Any,
        desk: Desk,
        bank: Bank,
        limits: Limits,
        ends: list[int],
        turns: Turns,
        merging: Merging,
        *,
        strict: bool,
    ) -> None:
        SCHEDULER_MAPPING.setdefault(NAME, AdapterScheduler)
        pages = -(-limits.cache_tokens // limits.page_tokens)
        config = ContinuousBatchingConfig(
            page_size=limits.page_tokens,
            num_blocks=pages,
            max_batch_tokens=max(limits.step_tokens, limits.running),
            max_requests_per_batch=limits.running,
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            scheduler_type=NAME,
            auto_switch_to_flash=False,
        )
        settings = GenerationConfig(do_sample=False, max_new_tokens=limits.new_tokens, eos_token_id=ends or None)
        super().__init__(model, settings, config)
        self.desk, self.bank, self.turns, self.merging, self.strict = desk, bank, turns, merging, strict
        self.output_router = Router(desk)
        self.steps = 0
        self.mix = (0, 0)  # requests and adapters of the last step
        self._apart: Apart | None = None  # while a step is computed again
        self._spoilt = False  # whether the last step had a row that is not finite

    def submit(self, work: Work) -> None:
        """Queue a request whose adapter is held."""
        work.handed = True
        ends: list[int] = [-1] if work.params.ignore_eos else sorted(work.ends)
        self.add_request(
            work.prompt,
            request_id=work.id,
            max_new_tokens=work.params.max_new_tokens,
            streaming=True,
            eos_token_id=ends or [-1],
        )

    def start(self) -> None:
        """Begin. transformers seeds torch's global generators on the way: that is undone, for they are the program's."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.batch_processor = self._create_batch_processor()
        super().start()

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is not None:
            return super()._create_batch_processor()
        processor = super()._create_batch_processor()
        scheduler: Any = processor.scheduler
        scheduler.desk, scheduler.bank, scheduler.turns, scheduler.batch = self.desk, self.bank, self.turns, []
        _salt(processor.cache, self.desk)
        self._part(processor.cache)
        processor.model_runner._sample = self._sample
        return processor

    def _generation_step(self) -> None:
        batch: list[FutureRequestState] = self.batch_processor.scheduler.batch  # type: ignore[union-attr]
        works = [self.desk.works[future.state.request_id] for future in batch]
        self.mix = len(works), len({work.adapter for work in works})
        with self.turns:
            plain = self.merging.covers({work.version for work in works}) or all(work.version is None for work in works)
            self._set(batch, works, plain=plain, strict=self.strict)
            self._spoilt = False
            super()._generation_step()
            if self._spoilt:
                self._apart = Apart()
                try:
                    self._set(batch, works, plain=plain, strict=True)  # no product of one's token with another's pair
                    super()._generation_step()
                finally:
                    self._apart = None
        self.steps += 1

    def _set(self, batch: list[FutureRequestState], works: list[Work], *, plain: bool, strict: bool) -> None:
        live = self.bank.live
        if plain:
            live.plain()
            return
        both = list(zip(works, batch, strict=True))
        packed = [(work.adapter, future.query_length) for work, future in both]
        if not self.batch_processor.model_runner.supports_logits_to_keep(self.model):  # type: ignore[union-attr]
            live.pack(packed, None, strict=strict)
            return
        kept = [(work.adapter, 1) for work, future in both if future.has_new_token]
        rest = [(-1, 1)] * (len(batch) - len(kept))  # transformers fills up with tokens that no one looks at
        live.pack(packed, [*kept, *rest], strict=strict)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """The next token of each request of the step that ends its prompt or goes on. scores: (1, n, vocabulary).

        A row that is not finite spoils the step: attention gives the keys and values of others a weight of 0, and 0 times
        NaN is NaN. The step is then computed again with each request apart, which writes over what it left in the cache.
        """
        batch: list[FutureRequestState] = self.batch_processor.scheduler.batch  # type: ignore[union-attr]
        works = [self.desk.works[future.state.request_id] for future in batch]
        rising = [place for place, future in enumerate(batch) if future.has_new_token]
        rows = scores[0, : len(rising)]
        tokens, sound = likeliest(rows)
        if self._apart is None and not all(sound):
            self._spoilt = True
            output_ids.zero_()
            return
        lost = set() if self._apart is None else self._apart.lost
        lost |= {place for place, fine in zip(rising, sound, strict=True) if not fine}
        for row, place in enumerate(rising):
            work = works[place]
            if place in lost:
                tokens[row] = 0
            elif work.generator is not None:
                tokens[row] = drawn(rows[row], work.params, work.generator)
        output_ids[0, : len(rising)].copy_(tokens)
        for place in lost:
            self.desk.crashed(works[place], no_choice())
            self.cancel_request(works[place].id)

    def _part(self, cache: Any) -> None:
        """Have the cache give out finite keys and values while a step is computed again, and note whose were not."""
        update: Callable[..., tuple[Tensor, Tensor]] = cache.update

        def finite(
            key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
        ) -> tuple[Tensor, Tensor]:
            both = update(key_states, value_states, layer_idx, kwargs)
            return both if self._apart is None else self._apart.clean(*both, kwargs["cu_seq_lens_k"].tolist())

        cache.update = finite

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        """The loop ends: so do all requests that it has, one too that had ended in this step and was not told."""
        try:
            super()._handle_critical_error(error, batch_processor)
        finally:
            for work in [work for work in list(self.desk.works.values()) if work.handed]:
                self.desk.crashed(work, error)
                self.desk.dropped(work)
            self.bank.places.running.pop(NAME, None)


class Apart:
    """A step in which no request's keys and values reach another. lost: places of those that had some that are not finite."""

    def __init__(self) -> None:
        self.lost: set[int] = set()

    def clean(self, key: Tensor, value: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """key, value: (1, heads, tokens, dim) of all requests, one after the other; ends: where each begins and ends."""
        fine = [(one.float().abs() <= LARGEST).all(-1).all(1)[0] for one in (key, value)]  # of NaN: no
        spoilt = ~(fine[0] & fine[1])
        self.lost |= {k for k, (start, end) in enumerate(pairwise(ends)) if bool(spoilt[start:end].any())}
        key, value = (one.masked_fill(spoilt[:, None], 0.0) for one in (key, value))
        return key, value


def _salt(cache: Any, desk: Desk) -> None:
    """Have the cache tell prefixes of one adapter version from those of all others. See salted."""
    search: Callable[[str, list[int]], int] = cache.search_prefix_match

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        return search(request_id, salted(desk.works[request_id].adapter, prompt_ids))

    def mark_complete_blocks(state: RequestState, complete_blocks: dict[str, int]) -> None:
        if not cache.allow_block_sharing or not complete_blocks or state.request_id not in desk.works:
            return
        tokens = salted(desk.works[state.request_id].adapter, state.initial_tokens + state.generated_tokens)
        for name, count in complete_blocks.items():
            cache.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    cache.search_prefix_match = search_prefix_match
    cache.mark_complete_blocks = mark_complete_blocks


def salted(adapter: int, tokens: list[int]) -> list[int]:
    """Tokens as the cache is to read them: with the version's number, in digits, above the ids of the first four.

    A page has at least four tokens (Limits), and its hash chains to that of the first one, so no two versions share one; all
    stay int32, as transformers hashes them.
    """
    if adapter < 0:
        return tokens
    first = [token + (adapter >> DIGIT * k) % (1 << DIGIT) * WORDS for k, token in enumerate(tokens[:4])]
    return [*first, *tokens[4:]]


def check_batch(batch: AdapterBatch) -> str | None:
    """Why the batch takes no more requests; None where it does."""
    return batch.background_thread_status.can_accept_new_requests()
