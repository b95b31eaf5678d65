"""A lock that serves in the order of asking: an ordinary one starves others where a thread takes it in a loop."""

from __future__ import annotations

import os
import threading
from collections import deque

from ..formats.errors import HotcoldError


class Turn:
    """First come, first served; any thread may release it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False
        self._pid = os.getpid()

    def acquire(self, blocking: bool = True) -> bool:
        """Take the turn, and say whether it was taken."""
        if self._held and self._pid != os.getpid():  # whoever would release it is not in this process
            raise HotcoldError("this LLM was answering when the process forked: open the model again in the child")
        ticket = threading.Lock()
        with self._mutex:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            ticket.acquire()
            self._waiting.append(ticket)
        try:
            ticket.acquire()
        except BaseException:
            with self._mutex:
                waits = ticket in self._waiting
                if waits:
                    self._waiting.remove(ticket)
            if not waits:  # it was given to us all the same
                self.release()
            raise
        return True

    def release(self) -> None:
        """Give it to who asked first."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
