"""Hidden states of rows, kept in memory up to a bound, and beyond it in a memory-mapped file up to another."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lorakit.errors import OutputError, UsageError

GIB = 2**30


class StateStore:
    """States (length, width) of rows 0 to n - 1, each put once and then read as often as wanted.

    lengths: tokens of each row. memory, disk: the most bytes of each; rows take memory first, in the order of their
    numbers. folder: where the file lies; it has no name, so it goes with the process however that ends. Neither memory
    nor disk is taken before the first state comes. Raises UsageError where the rows don't fit into both together.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, *, memory: int, disk: int, folder: Path
    ) -> None:
        self.width, self.dtype, self.folder = width, dtype, folder
        self.starts = [0, *accumulate(lengths)]  # first token of each row; the last entry: all tokens
        self.token_bytes = width * dtype.itemsize
        self.in_memory = sum(end * self.token_bytes <= memory for end in self.starts[1:])  # the rows that memory takes
        self.total = self.starts[-1] * self.token_bytes
        beyond = self.total - self.starts[self.in_memory] * self.token_bytes
        if beyond > disk:
            raise UsageError(
                f"the states of {len(lengths):,} rows take {self.total / GIB:.2f} GiB; {memory / GIB:g} GiB of memory and "
                f"{disk / GIB:g} GiB of disk are allowed (train.prefix_memory, train.prefix_disk)."
            )
        self.beyond = beyond
        self.kept = [False] * len(lengths)
        self._memory: Tensor | None = None
        self._file: IO[bytes] | None = None
        self._mapped: Tensor | None = None

    def __contains__(self, row: int) -> bool:
        return self.kept[row]

    def put(self, row: int, states: Tensor) -> None:
        """Keep a row's states: (length, width). Raises OutputError where the disk is full."""
        wanted = (self.starts[row + 1] - self.starts[row], self.width)
        if tuple(states.shape) != wanted or states.dtype != self.dtype:
            raise UsageError(
                f"the states of row {row} must be {wanted} in {self.dtype}, not {tuple(states.shape)} in {states.dtype}."
            )
        states = states.detach().to("cpu").contiguous()
        if row < self.in_memory:
            self._held()[self.starts[row] : self.starts[row + 1]] = states
        else:
            self._write(row, states)
        self.kept[row] = True

    def get(self, row: int) -> Tensor:
        """A row's states: (length, width), on the CPU, not to be written to."""
        if not self.kept[row]:
            raise UsageError(f"the states of row {row} were never kept.")
        place, first = (self._memory, 0) if row < self.in_memory else (self._mapped, self.starts[self.in_memory])
        return place[self.starts[row] - first : self.starts[row + 1] - first]  # type: ignore[index]

    def _held(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty((self.starts[self.in_memory], self.width), dtype=self.dtype)
        return self._memory

    def _write(self, row: int, states: Tensor) -> None:
        """Written by a call, not through the map: a full disk is then an error and not the end of the process."""
        try:
            file = self._opened()
            data = memoryview(states.view(torch.uint8).numpy().data).cast("B")
            place = (self.starts[row] - self.starts[self.in_memory]) * self.token_bytes
            while data:
                done = os.pwrite(file.fileno(), data, place)
                data, place = data[done:], place + done
        except OSError as error:
            raise OutputError(
                f"cannot keep the lower blocks' states in {self.folder}: {error.strerror or error}. Set train.prefix_disk "
                "to what there is, or train.prefix_cache to false."
            ) from error

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - it lives as long as the store
            weakref.finalize(self, self._file.close)
            self._file.truncate(self.beyond)
            mapped = torch.frombuffer(mmap.mmap(self._file.fileno(), self.beyond), dtype=self.dtype)
            self._mapped = mapped.view(-1, self.width)
        return self._file
