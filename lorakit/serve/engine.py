"""Requests on one base with many adapters, without HTTP.

Generation runs on transformers' continuous batching (lorakit.serve.paged), what that has no means for on `model.generate`
(lorakit.serve.searched); classification and embedding in dynamic batches (lorakit.serve.classify). Whatever the mixture of
adapters, ranks and lengths, each request gets what its own adapter alone would give it.
"""

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from lorakit.errors import (
    QueueFullError,
    ServeError,
    TimedOutError,
    TooLongError,
    UsageError,
    WrongKindError,
)
from lorakit.serve.bank import Bank, Version
from lorakit.serve.classify import Classified, Embedded, RowsThread
from lorakit.serve.handle import Handle
from lorakit.serve.kinds import Kind, kind_of
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.merging import Merging
from lorakit.serve.stats import Stats
from lorakit.serve.turns import Turns
from lorakit.serve.work import Work, conclude, take_tokens

LOG = logging.getLogger("lorakit.serve")


class Engine:
    """Owns the model until `close`; `with Engine(model, tokenizer, bank) as engine:`. Every method is thread safe.

    strict: each request's low-rank part is computed on its own, so that it has the very bits that it has alone in the same
    steps. Where a prompt is cut into steps depends on what runs beside it (and on what the cache holds of it), and with the
    number of a product's rows its last bits may change: so may those of a prompt that is cut at another place.
    merge_after: steps in a row of one adapter alone after which it is merged into float32 weights, until another is asked
    for (see lorakit.serve.merging: it costs a second copy of those weights, and a pause of some forwards to make it).
    Raises WrongKindError where the model is none that can be served.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank,
        limits: Limits | None = None,
        *,
        strict: bool = False,
        merge_after: int | None = None,
    ) -> None:
        if bank.model is not model:
            raise UsageError(
                "the bank was made for another model. Give the engine the model that the bank was made for."
            )
        self.model, self.tokenizer, self.bank, self.limits = model, tokenizer, bank, limits or Limits()
        self.kind: Kind = kind_of(model)
        self.works: dict[str, Work] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._counts = {"finished": 0, "failed": 0, "cancelled": 0, "prompt_tokens": 0, "new_tokens": 0}
        self._closed = False
        self._training = model.training
        model.eval()
        if merge_after is not None and merge_after < 1:
            raise UsageError(f"merge_after must be at least 1, or None, not {merge_after}.")
        if merge_after is not None and strict:
            raise UsageError(
                "merge_after and strict exclude each other: a merged request has other bits than beside others."
            )
        self._turns, self._merging = Turns(), Merging(bank, merge_after)
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="lorakit-load")
        self._batch: Any = None
        self._search: Any = None
        self._rows: Any = None
        self._start(strict)

    def _start(self, strict: bool) -> None:
        if self.kind != "generation":
            self._rows = RowsThread(self.model, self.tokenizer, self.bank, self.limits, self.kind, strict=strict)
            return
        from lorakit.serve.paged import AdapterBatch
        from lorakit.serve.searched import SearchThread

        self._ends = end_ids(self.model, self.tokenizer)
        head = self.model.get_output_embeddings()
        paths = {id(module): path for path, module in self.model.named_modules()}
        self.bank.live.head_path = paths.get(id(head))
        self._batch = AdapterBatch(
            self.model, self, self.bank, self.limits, sorted(self._ends), self._turns, self._merging, strict=strict
        )
        self._search = SearchThread(
            self.model, self.tokenizer, self, self.bank, self.limits, self._turns, self._merging, strict=strict
        )
        self._batch.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and (self._batch is None or self._denial() is None)

    def check_kind(self, kind: Kind) -> None:
        """Raise WrongKindError where the base does not answer requests of this kind."""
        if kind != self.kind:
            raise WrongKindError(
                f"this server's base ({type(self.model).__name__}) is for {self.kind}, and the request is for {kind}. "
                f"Start another server with a base for {kind}."
            )

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self, prompt_ids: Sequence[int], adapter: Version | None = None, params: SamplingParams | None = None
    ) -> Handle:
        """Queue a request and return at once. adapter: None = the base.

        Raises WrongKindError, UsageError (ids that the base does not know), TooLongError, QueueFullError,
        UnknownAdapterError, ServeError (closed, or stopped by a fault).
        """
        self.check_kind("generation")
        params = params or SamplingParams()
        prompt = [int(token) for token in prompt_ids]
        self._check_prompt(prompt, params)
        self._check_alive()
        handle = Handle(len(prompt), None if adapter is None else adapter.hash, self._cancel)
        name = f"request-{next(self._numbers)}"
        deadline = time.monotonic() + self.limits.seconds
        ends = frozenset() if params.ignore_eos else self._ends
        work = handle.work = Work(name, prompt, adapter, params, handle, deadline, ends)
        resident = adapter is None or self.bank.hold(adapter)
        try:
            self._register(work)
        except BaseException:
            if adapter is not None:
                self.bank.release(adapter)
            raise
        self._enter(work, resident)
        return handle

    def _register(self, work: Work) -> None:
        """From here on `dropped` gives back what the request holds, whoever calls it."""
        with self._lock:
            self._check_open()
            self._check_queue()
            self.works[work.id] = work
            self._counts["prompt_tokens"] += len(work.prompt)

    def _enter(self, work: Work, resident: bool) -> None:
        """Hand a request to its thread: at once where its adapter is in memory, else when it is read."""
        try:
            if resident:
                self._submit(work)
            else:
                self._loader.submit(self._fetch_and_submit, work)
        except BaseException:
            self.dropped(work)
            self._check_open()  # the loader takes no more once the engine closes
            raise

    def _fetch_and_submit(self, work: Work) -> None:
        try:
            if work.version is not None and not work.handle.done:
                self.bank.fetch(work.version, patience=self.limits.seconds)
            self._submit(work)
        except Exception as error:  # in a thread that would keep it to itself
            self._fail(work, error)
            self.dropped(work)

    def _submit(self, work: Work) -> None:
        if work.handle.done:  # cancelled while its adapter was read
            self.dropped(work)
            return
        if not work.params.paged:
            self._search.submit(work)
            return
        self._batch.submit(work)
        if self._denial() is not None:
            self.crashed(work, ServeError("the engine has stopped."))
            self.dropped(work)

    def _check_prompt(self, prompt: list[int], params: SamplingParams) -> None:
        config = self.model.config.get_text_config()
        limits, count, new = self.limits, len(prompt), params.max_new_tokens
        if not prompt:
            raise UsageError("the prompt is empty.")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UsageError(f"the prompt has ids outside the base's vocabulary of {config.vocab_size}.")
        if count > limits.prompt_tokens or new > limits.new_tokens:
            raise TooLongError(
                f"a request may have {limits.prompt_tokens} tokens of prompt and {limits.new_tokens} of answer; this one has "
                f"{count} and asks for {new}."
            )
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        held = int(limits.cache_tokens * 0.8) - limits.page_tokens
        room = min(longest or held, held)
        if count + new > room:
            raise TooLongError(f"prompt and answer may have {room} tokens together; these are {count} + {new}.")
        if params.num_beams * (count + new) > held:
            raise TooLongError(
                f"the beams of a request may have {held} tokens together, for each keeps keys and values of its own; these "
                f"are {params.num_beams} times {count} + {new}. Ask for fewer beams or tokens."
            )

    def _check_queue(self) -> None:
        if len(self.works) >= self.limits.queue:
            raise QueueFullError(
                f"{len(self.works)} requests wait or run already. Ask again in a moment.", retry_after=1.0
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ServeError("this engine is closed.")

    def _check_alive(self) -> None:
        self._check_open()
        denial = self._denial()
        if denial is not None:
            raise ServeError(f"the engine has stopped ({denial}). Start it anew.")

    def _denial(self) -> str | None:
        if self._batch is None:
            return None
        found: str | None = self._batch.background_thread_status.can_accept_new_requests()
        return found

    def _cancel(self, handle: Handle) -> None:
        work: Work = handle.work
        self._count("cancelled")
        conclude(work, "cancelled", self.tokenizer)
        if self._batch is not None:
            self._batch.cancel_request(work.id)

    # -- called by the threads that compute --------------------------------------------------------------------------

    def told(self, work: Work, output: Any) -> None:
        """New tokens of a request, or its end. A fault in what is made of them ends this request alone."""
        try:
            if not work.handle.done:
                self._take(work, output)
        except Exception as error:  # the thread computes for the others too
            self.crashed(work, error)
        if output.is_finished():
            self.dropped(work)
        elif work.handle.done:  # perhaps cancelled so early that the batch knew nothing to cancel
            self._batch.cancel_request(work.id)

    def _take(self, work: Work, output: Any) -> None:
        if output.error is not None:
            self._fail(work, ServeError(f"the engine failed: {output.error}"))
        elif take_tokens(work, output.generated_tokens, self.tokenizer):
            self._finish(work, "stop")
        elif output.is_finished():
            self._finish(work, "stop" if output.generated_tokens[-1] in work.ends else "length")

    def dropped(self, work: Work) -> None:
        """No forward will see this request again: what it holds is free. A second call does nothing."""
        if self.works.pop(work.id, None) is None:
            return
        if work.version is not None:
            self.bank.release(work.version)
        with self._lock:
            self._counts["new_tokens"] += len(work.handle.tokens)
        if not work.handle.done:
            self._fail(work, ServeError("the engine stopped before this request was done."))

    def expired(self, work: Work) -> None:
        """A request's time is up."""
        self._fail(work, TimedOutError(f"not done within {self.limits.seconds:g} seconds."))
        self._batch.cancel_request(work.id)

    def crashed(self, work: Work, error: BaseException) -> None:
        """A request met a fault."""
        if not work.handle.done:
            LOG.exception("a request failed", exc_info=error)
            self._fail(work, error)

    def _finish(self, work: Work, finish: Literal["stop", "length"]) -> None:
        self._count("finished")
        conclude(work, finish, self.tokenizer)

    def _fail(self, work: Work, error: BaseException) -> None:
        if not work.handle.done:
            self._count("failed")
            work.handle.crash(error)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    # -- classification and embedding --------------------------------------------------------------------------------

    def classify(self, texts: Sequence[str | tuple[str, str]], adapter: Version | None = None) -> list[Classified]:
        """A `Classified` for each text, or pair of texts. Blocks; texts of all callers share batches.

        Raises as `generate` does, and TimedOutError.
        """
        self.check_kind("classification")
        self._check_alive()
        return self._rows.answer(list(texts), adapter)  # type: ignore[no-any-return]

    def embed(self, texts: Sequence[str], adapter: Version | None = None) -> list[Embedded]:
        """An `Embedded` for each text. Blocks; raises as `classify` does."""
        self.check_kind("embedding")
        self._check_alive()
        return self._rows.answer(list(texts), adapter)  # type: ignore[no-any-return]

    # -- state -------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the engine does and has done."""
        if self._rows is not None:
            return self._rows.stats()  # type: ignore[no-any-return]
        mix = (0, 0) if self._batch is None else self._batch.mix
        with self._lock:
            counts = dict(self._counts)
        steps = 0 if self._batch is None else self._batch.steps
        return Stats(len(self.works), **counts, steps=steps, requests_in_batch=mix[0], adapters_in_batch=mix[1])

    def close(self) -> None:
        """Stop. Requests that run fail with ServeError; the model is as it was before (the bank is its owner's to close)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loader.shutdown(wait=False, cancel_futures=True)
        if self._search is not None:
            self._search.close()
        if self._rows is not None:
            self._rows.close()
        if self._batch is not None:
            self._batch.stop(block=True, hard_stop=True)
        for work in list(self.works.values()):
            self.dropped(work)
        self._loader.shutdown(wait=True)  # reads that waited for room have it now
        self._merging.apart()
        self.bank.live.plain()
        self.model.train(self._training)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    ids = found if isinstance(found, list) else [found]
    return frozenset(int(one) for one in ids if one is not None)
