"""Continuous batching: answers join and leave the running batch at every step of one engine (batch.py).

An answer is the same alone and among others. Who wants one drives the steps for all, or a background thread does.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..formats.errors import BusyError, ClosedError, HotcoldError
from .batch import Batch, Job, Live
from .turn import Turn

if TYPE_CHECKING:
    from .answer import Answer
    from .engine import Engine

IDLE_SECONDS = 5.0  # until the background thread ends

_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Unit:
    """Answers that are queued together: all of them or none, and as one in the bound of the queue."""

    admitted = False


class Scheduler:
    """Answers' turns on one engine.

    n_parallel: answers that run at once; n_queue: that may wait for that (None: any number), those of one reply
    counting as one. lookup: as of Batch.
    Whoever wants an answer drives the steps (`advance`), or the background thread does (`run_in_background`). `steps`
    is the turn on the engine, for other uses of it (`exclusive`).
    """

    def __init__(self, engine: Engine, n_parallel: int, n_queue: int | None = None, lookup: int = 0) -> None:
        self.engine, self.n_parallel, self.n_queue = engine, n_parallel, n_queue
        self.steps = Turn()
        self.closed = False
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self._batch = Batch(engine, lookup)
        self._alone()
        _schedulers.add(self)

    def _alone(self) -> None:
        # guards `running`, `waiting`, `closed` and `_thread`; re-entrant, since a signal's handler may cancel an answer
        self._state = threading.RLock()
        self._work = threading.Event()  # there may be some for the background thread
        self._thread: threading.Thread | None = None

    def submit(self, answer: Answer, unit: Unit | None = None) -> Job:
        """Queue an answer, alone or with others; BusyError where too many wait, but not for the rest of a unit."""
        unit = unit or Unit()
        job = Job(answer, unit)
        with self._state:
            if self.closed:
                raise ClosedError("LLM: used after close(); open the model again")
            if self.n_queue is not None and not unit.admitted:
                self._check_room(self.n_parallel + self.n_queue)
            unit.admitted = True
            self.waiting.append(job)
        return job

    def _check_room(self, most: int) -> None:
        """BusyError where so many units are here."""
        if len(self.running) + len(self.waiting) < most:
            return
        running, waiting = ([job.unit for job in jobs if not job.over] for jobs in (self.running, self.waiting))
        if len({*running, *waiting}) >= most:
            raise BusyError(
                f"{len(running)} answers are running and {len(waiting)} waiting, which is the most; ask again later"
            )

    def cancel(self, job: Job) -> None:
        """End a job and free its place: at once, or after the step in progress."""
        job.cancelled = True
        if self.steps.acquire(blocking=False):  # or else who has the turn sees to it
            try:
                self._sweep()
            finally:
                self.steps.release()

    def advance(self, answer: Answer) -> None:
        """Take steps until an answer has something to read or has ended."""
        while not answer.readable:
            try:
                with self.steps:
                    if not answer.readable:
                        self.step()
            finally:
                self._after()

    def step(self) -> bool:
        """One step for all who can go on; False if nobody can. The caller has the turn."""
        self._sweep()
        self._admit()
        answers = [(job, answer) for job in self.running if (answer := job.answer) is not None]
        ready = [Live(job, answer) for job, answer in answers if answer.room]
        try:
            self._batch.step(ready)
        finally:
            wake(answer for _, answer in answers)
        self._sweep()
        return bool(ready)

    # --- places ---

    def _sweep(self) -> None:
        """Take out what has ended."""
        with self._state:
            gone = [job for job in (*self.running, *self.waiting) if job.over]
            for job in gone:
                self._leave(job)
                for jobs in (self.running, self.waiting):
                    if job in jobs:
                        jobs.remove(job)
        for job in gone:
            if (answer := job.answer) is not None:
                answer.close()

    def _leave(self, job: Job) -> None:
        if job.sequence is not None:
            sequence, job.sequence = job.sequence, None
            sequence.share(tail=True)
            sequence.close()

    def _admit(self) -> None:
        """Give free places to who waits; if there are too few, those of answers that nobody reads."""
        with self._state:  # in an order in which Ctrl-C may strike anywhere
            unread = [job for job in self.running if not _has_room(job)]
            if not self.waiting or (len(self.running) >= self.n_parallel and not unread):
                return
            able = [job for job in self.waiting if _has_room(job)]
            short = len(able) - (self.n_parallel - len(self.running))
            for job in unread[: max(0, short)]:
                if job not in self.waiting:
                    self.waiting.append(job)
                self.running.remove(job)
                self._leave(job)
            for job in able[: self.n_parallel - len(self.running)]:
                if job.sequence is None:
                    job.sequence = self.engine.new_sequence()
                if job not in self.running:
                    self.running.append(job)
                self.waiting.remove(job)

    # --- who steps ---

    def run_in_background(self) -> None:
        """Have a thread take the steps while anybody can go on; it ends when nobody could for a while."""
        with self._state:
            self._work.set()
            if (self._thread is None or not self._thread.is_alive()) and not self.closed:
                arguments = weakref.ref(self), self._work
                self._thread = threading.Thread(target=_serve, args=arguments, name="hotcold-steps", daemon=True)
                self._thread.start()

    def step_for_all(self) -> bool:
        """A step of the background thread; whether anybody could go on."""
        try:
            with self.steps:
                return not self.closed and self.step()
        except Exception as error:  # nobody else would tell those who wait
            self._fail_all(error)
            return True
        finally:
            self._after()

    def retire(self) -> bool:
        """End the background thread, which asks, unless there is work for it again."""
        with self._state:
            if self._work.is_set() and not self.closed:
                return False
            self._thread = None
            return True

    def _after(self) -> None:
        """After giving the turn back: see to what was cancelled meanwhile."""
        with self._state:
            cancelled = [job for job in (*self.running, *self.waiting) if job.cancelled]
        for job in cancelled:
            self.cancel(job)

    def _fail_all(self, error: BaseException) -> None:
        with self._state:
            answers = [answer for job in (*self.running, *self.waiting) if (answer := job.answer) is not None]
        for answer in answers:
            answer.fail(error)
        wake(answers)

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """The engine for another use, between steps; ClosedError after close()."""
        try:
            with self.steps:
                if self.closed:
                    raise ClosedError("LLM: used after close(); open the model again")
                yield self.engine
        finally:
            self._after()

    def close(self) -> None:
        """After the step in progress, end all answers and close the engine."""
        with self.steps:
            with self._state:
                self.closed = True
            self._fail_all(ClosedError("LLM: used after close(); open the model again"))
            self._sweep()
            self._work.set()
            self.engine.close()

    def __del__(self) -> None:
        # here and not in LLM: a stream keeps its scheduler alive, and the LLM may be dropped before it
        with suppress(Exception):
            self._work.set()
            if not self.closed:
                self.closed = True
                self.engine.close()

    def after_fork(self) -> None:
        """In a forked child: no other thread is here, and what they asked for stays with the parent."""
        self._alone()
        with suppress(HotcoldError):  # in the midst of a step: of no use here
            with self.steps:
                for job in (*self.running, *self.waiting):
                    if (answer := job.answer) is not None:
                        answer.fail(HotcoldError("this answer was asked for before the process forked: ask again"))
                self._sweep()


def _has_room(job: Job) -> bool:
    answer = job.answer
    return answer is not None and answer.room


def _serve(ref: weakref.ref[Scheduler], work: threading.Event) -> None:
    """The background thread, which keeps nobody alive while it has nothing to do."""
    while True:
        work.clear()
        scheduler = ref()
        if scheduler is None:
            return
        if scheduler.step_for_all():
            continue
        idle = not scheduler.closed
        del scheduler
        if idle and work.wait(IDLE_SECONDS):
            continue
        scheduler = ref()
        if scheduler is None or scheduler.retire():
            return
        del scheduler


def wake(answers: Iterable[Answer]) -> None:
    """Tell the event loops in which these answers are awaited that there is something to read, each loop once."""
    calls: dict[Any, list[Callable[[], None]]] = {}
    for answer in answers:
        if (waker := answer.waker()) is not None:
            calls.setdefault(waker[0], []).append(waker[1])
    for loop, own in calls.items():
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(_call, own)


def _call(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _after_fork() -> None:
    for scheduler in list(_schedulers):
        scheduler.after_fork()


if hasattr(os, "register_at_fork"):  # after turn.py's
    os.register_at_fork(after_in_child=_after_fork)
