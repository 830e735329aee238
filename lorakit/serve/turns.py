"""Whose turn it is on the model: threads that run forwards pass it on in the order in which they asked."""

import threading
from collections import deque


class Turns:
    """A lock that is fair: a thread that gives it up and asks again comes behind those that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # stays taken: it is handed over
            else:
                self._taken = False

    def pass_on(self) -> None:
        """Let the others have one turn each, and take it again."""
        self.__exit__()
        self.__enter__()
