"""A lock that serves in the order of asking: an ordinary one starves others where a thread takes it in a loop."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

from ..formats.errors import HotcoldError

_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


class Turn:
    """First come, first served; the thread that took it releases it."""

    def __init__(self) -> None:
        self._forked = False
        self._reset()
        _turns.add(self)

    def _reset(self) -> None:
        # re-entrant: the garbage collector or a signal's handler may ask for a turn in the midst of these methods
        self._mutex = threading.RLock()
        self._waiting: deque[tuple[threading.Lock, int]] = deque()  # their tickets and threads
        self._holder: int | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """Take the turn, and say whether it was taken; HotcoldError where it would never come."""
        if self._forked and blocking:
            raise HotcoldError("this LLM was answering when the process forked: open the model again in the child")
        me, ticket = threading.get_ident(), threading.Lock()
        if self._holder == me or self._forked:
            if blocking:
                raise HotcoldError(
                    "this LLM is in the midst of a step of this thread's: a logits_processor cannot ask it for more"
                )
            return False
        ticket.acquire()
        try:
            with self._mutex:
                if self._holder is None:
                    self._holder = me
                    return True
                if not blocking:
                    return False
                self._waiting.append((ticket, me))
            ticket.acquire()
            return True
        except BaseException:  # Ctrl-C
            with self._mutex:
                if (ticket, me) in self._waiting:
                    self._waiting.remove((ticket, me))
                elif self._holder == me:  # it was given to us all the same
                    self.release()
            raise

    def release(self) -> None:
        """Give it to who asked first."""
        with self._mutex:
            if self._waiting:
                # Ctrl-C strikes after calls: none between these lines, or the ticket would be lost
                ticket, self._holder = self._waiting[0]
                del self._waiting[0]
                ticket.release()
            else:
                self._holder = None

    def after_fork(self) -> None:
        """In a forked child: nobody who waited is here, nor who would release it."""
        if self._holder is not None:
            self._forked = True
        else:
            self._reset()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _after_fork() -> None:
    for turn in list(_turns):
        turn.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
