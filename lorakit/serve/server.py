"""A base and a folder of adapters, in this process: what the HTTP app speaks to, and what programs can use without it."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, QueueFullError, UsageError
from lorakit.generate.prompts import Prompt, prompt_ids
from lorakit.models import Loaded, longest_row
from lorakit.models import load as load_model
from lorakit.serve.bank import Bank, Version
from lorakit.serve.engine import Engine
from lorakit.serve.handle import Generated, Handle
from lorakit.serve.intake import AdapterBounds
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.registry import Registry
from lorakit.serve.shelf import BASES_NAME, Shelf

if TYPE_CHECKING:
    from lorakit.serve.classify import Classified, Embedded

DEFAULT_TOKENS = SamplingParams.max_new_tokens
LANES = 16  # adapters of one call whose texts are answered side by side
Adapters = str | None | Sequence[str | None]
"""One adapter for all, or one for each prompt: "name", "name@hash", an alias, or None for the base."""


@dataclass(frozen=True)
class ServerConfig:
    """How a server runs its base."""

    task: str = "causal-lm"
    """What the base is loaded for: causal-lm, sequence-classification or feature-extraction (embeddings)."""
    dtype: str = "float32"
    """Of the base's weights."""
    device: str | None = None
    """Where the base computes ("cuda"); None = the CPU."""
    num_labels: int | None = None
    """Labels of the base's own head, for sequence-classification on a base that is no classifier yet."""
    memory: int = 8 << 30
    """Bytes of main memory for adapters; those used least recently are read again from disk."""
    device_ranks: int = 1024
    """Ranks that are kept on the device, over all adapters in one batch."""
    strict: bool = False
    """Let an adapter's own part of an answer not depend, in any bit, on the requests beside it (for the same cut of its prompt
    into steps; see docs/serving.md)."""
    warm: bool = True
    """Load every adapter in service at the start, in the background; else each with its first request."""
    limits: Limits = field(default_factory=Limits)
    """How much requests may take."""
    bounds: AdapterBounds = field(default_factory=AdapterBounds)
    """How large an adapter may be."""


@dataclass(frozen=True)
class Started:
    """A request that runs. name, hash: of the adapter that answers it; None for the base."""

    handle: Handle
    name: str | None
    hash: str | None

    @property
    def reference(self) -> str | None:
        """What leads to this very version, whatever is published meanwhile."""
        return None if self.name is None else f"{self.name}@{self.hash}"


class Server(Shelf):
    """`with lk.Server("smollm2-135m-instruct", "adapters/") as server: server.generate(["..."], adapters=["sql"])`.

    model: what `lorakit.models.load` takes, or what it gave. folder: the registry (lorakit.serve.registry). Adapters load
    in the background; a call waits for its own. Methods may be called from any thread; `publish`, `roll_back` and the others
    that change what is served are lorakit.serve.shelf's. Raises what loading the model, and opening the folder, raise.
    """

    def __init__(
        self, model: str | PathLike[str] | Loaded, folder: str | Path, config: ServerConfig | None = None
    ) -> None:
        self.config = config or ServerConfig()
        # Opened before the model is loaded: a wrong folder fails at once. What lies in it is taken in when the base has a name.
        registry = Registry(folder, bounds=self.config.bounds, adopt=False)
        loaded = model if isinstance(model, Loaded) else self._load(model)
        name = _public_name(loaded.name)
        registry.adopt({name: BASES_NAME})
        self.tokenizer = loaded.tokenizer
        self._positions = longest_row(loaded.model, loaded.tokenizer)
        bank = Bank(loaded.model, memory=self.config.memory, device_ranks=self.config.device_ranks)
        try:
            self.engine = Engine(loaded.model, loaded.tokenizer, bank, self.config.limits, strict=self.config.strict)
        except BaseException:
            bank.close()
            raise
        super().__init__(registry, bank, name, warm=self.config.warm)

    def _load(self, model: str | PathLike[str]) -> Loaded:
        config = self.config
        return load_model(
            model,
            task=config.task,
            dtype=config.dtype,
            device=config.device,
            num_labels=config.num_labels,
            progress=True,
        )

    # -- answering

    def generate(
        self, prompts: Sequence[Prompt], adapters: Adapters = None, params: SamplingParams | None = None
    ) -> list[Generated]:
        """The answer to each prompt by its adapter, in order; more prompts than the queue takes wait their turn here.

        prompts: texts, chats (lists of {"role", "content"}) or token ids. Raises ServeError's kinds, DataError, FileError.
        """
        chosen = self._per_row(len(prompts), adapters)
        rows = [self.encode(prompt, index) for index, prompt in enumerate(prompts)]
        for adapter in dict.fromkeys(chosen):
            self.find(adapter, wait=True)  # a name that is unknown is told before anything runs
        handles: list[Handle] = []
        waiting: deque[Handle] = deque()
        try:
            for ids, adapter in zip(rows, chosen, strict=True):
                handle = self._begin_when_free(ids, adapter, params, waiting)
                handles.append(handle)
                waiting.append(handle)
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def chat(
        self, messages: Sequence[Mapping[str, str]], adapter: str | None = None, params: SamplingParams | None = None
    ) -> Generated:
        """The answer to a chat."""
        return self.generate([messages], adapter, params)[0]

    def submit(
        self, prompt: Prompt | Sequence[int], adapter: str | None = None, params: SamplingParams | None = None
    ) -> Handle:
        """Begin to answer a prompt: iterate the handle for the tokens, as they are made."""
        return self.begin(self.encode(prompt), adapter, params).handle

    def classify(
        self, texts: Sequence[str | tuple[str, str]], adapters: Adapters = None, *, wait: bool = True
    ) -> "list[Classified]":
        """The class of each text, or pair of texts, by its adapter's head. wait: for adapters that are loading."""
        return self._grouped(texts, adapters, self.engine.classify, wait)

    def embed(self, texts: Sequence[str], adapters: Adapters = None, *, wait: bool = True) -> "list[Embedded]":
        """The embedding of each text by its adapter. wait: for adapters that are loading."""
        return self._grouped(texts, adapters, self.engine.embed, wait)

    # -- the steps of an answer, for the app

    def encode(self, prompt: Prompt | Sequence[int], index: int = 0) -> list[int]:
        """The ids of a prompt. Raises DataError for an empty one, a text that is none, or a chat that the template refuses."""
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], int):
            return list(prompt)  # type: ignore[arg-type]
        _check_texts(_texts_of(prompt), f"prompt {index + 1}")
        return prompt_ids(self.tokenizer, prompt, task="causal-lm", index=index)  # type: ignore[arg-type]

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer may have where nobody says it."""
        limits = self.config.limits
        room = int(limits.cache_tokens * 0.8) - limits.page_tokens  # what the engine allows
        room = room if self._positions is None else min(room, self._positions)
        return max(1, min(DEFAULT_TOKENS, limits.new_tokens, room - prompt_tokens))

    def begin(
        self, ids: Sequence[int], reference: str | None, params: SamplingParams | None = None, *, wait: bool = True
    ) -> Started:
        """Begin to answer a prompt's ids by the adapter that `reference` means now. Raises as `find`, and as the engine."""
        params = params or SamplingParams(max_new_tokens=self.room(len(ids)))
        call = partial(self.engine.generate, ids, params=params)
        name, version, handle = self.with_version(reference, lambda version: call(adapter=version), wait=wait)
        self.count(version)
        return Started(handle, name, None if version is None else version.hash)

    def answer_rows(
        self,
        rows: Sequence[Any],
        reference: str | None,
        call: Callable[[list[Any], Version | None], list[Any]],
        *,
        most: int | None = None,
        wait: bool = True,
    ) -> tuple[str | None, list[Any]]:
        """(the adapter's own name, `call`'s answers to all rows): all of the one version that `reference` means now.

        most: rows of one call; else half of what the queue takes. Where the version is let go of in between, all rows are
        answered anew, by what `reference` means then. Raises DataError, as `find`, and what `call` raises.
        """
        for index, row in enumerate(rows):
            _check_texts(_texts_of(row), f"text {index + 1}")
        piece = most or max(1, self.config.limits.queue // 2)

        def work(version: Version | None) -> list[Any]:
            parts = [call(list(rows[start : start + piece]), version) for start in range(0, len(rows), piece)]
            return [one for part in parts for one in part]

        name, version, answers = self.with_version(reference, work, wait=wait)
        self.count(version, len(rows))
        return name, answers

    # -- the end

    def close(self) -> None:
        """Stop; the model is plain again."""
        self.residents.stop()
        self.engine.close()
        self.bank.close()  # what waits for room in it, to load or to pin, gives up
        super().close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    def _begin_when_free(
        self, ids: Sequence[int], adapter: str | None, params: SamplingParams | None, waiting: deque[Handle]
    ) -> Handle:
        """Begin; where the queue is full, once the oldest request of this call is done."""
        while True:
            try:
                return self.begin(ids, adapter, params).handle
            except QueueFullError:
                if not waiting:  # others fill the queue
                    raise
                waiting.popleft().result()

    def _grouped(self, rows: Sequence[Any], adapters: Adapters, call: Any, wait: bool) -> list[Any]:
        """`call(rows, version)` for each adapter's rows, side by side, so that they share batches; in the rows' order."""
        chosen = self._per_row(len(rows), adapters)
        different = list(dict.fromkeys(chosen))
        found: list[Any] = [None] * len(rows)

        lanes = min(len(different), LANES)
        piece = max(1, self.config.limits.queue // (2 * max(1, lanes)))  # what all lanes ask for at once fits the queue

        def work(adapter: str | None) -> None:
            mine = [row for row, other in enumerate(chosen) if other == adapter]
            _, answers = self.answer_rows([rows[row] for row in mine], adapter, call, most=piece, wait=wait)
            for row, one in zip(mine, answers, strict=True):
                found[row] = one

        if len(different) == 1:
            work(different[0])
        elif different:
            with ThreadPoolExecutor(lanes) as pool:
                list(pool.map(work, different))
        return found

    def _per_row(self, count: int, adapters: Adapters) -> list[str | None]:
        if adapters is None or isinstance(adapters, str):
            return [adapters] * count
        if len(adapters) != count:
            raise UsageError(f"expected an adapter for each of the {count} prompts, came {len(adapters)}.")
        return list(adapters)


def _texts_of(prompt: Any) -> list[Any]:
    """The texts of a prompt: of a text, a pair, or a chat. An example's come from a file, which is read as UTF-8."""
    parts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    return [text for part in parts for text in (part.values() if isinstance(part, Mapping) else [part])]


def _check_texts(texts: Sequence[Any], where: str) -> None:
    """Raise DataError for half a character: a string may hold one (JSON's \\ud800), and no tokenizer takes it."""
    for text in texts:
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} is no text: expected whole characters, came a lone surrogate ({text[error.start]!a}) at "
                f"character {error.start + 1}. Send the character whole, or leave it out."
            ) from error


def _public_name(name: str) -> str:
    """What requests call the base: a folder of this machine by its last part."""
    path = Path(name)
    return path.resolve().stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else str(name)
