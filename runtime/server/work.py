"""Work beside the event loop, and for as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ...formats.errors import BusyError
from .failures import shutting_down

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[[], Any]]
IDLE_END_S = 1.0  # for threads that have nothing to do to end


class Workers:
    """At most n threads, begun as needed; the process may end while they work, which an executor's would hold up.

    most: calls that may wait or be at work (None: any number). `count` of them do.
    """

    def __init__(self, n: int, name: str, most: int | None = None) -> None:
        self.n, self.name, self.most, self.count = n, name, most, 0
        self.threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._lock = threading.Lock()

    async def run(self, call: Callable[[], T], most: int | None = None) -> T:
        """What `call` returns; BusyError past `most`. One that is cancelled in the queue is never called."""
        most = self.most if most is None else most
        with self._lock:
            if most is not None and self.count >= most:
                raise BusyError(f"{self.count} requests are being prepared, which is the most; ask again later")
            self.count += 1
        future: Future[T] = Future()
        future.add_done_callback(self._count_down)
        self._tasks.put((future, call))
        if len(self.threads) < min(self.n, self.count):
            name = f"{self.name}_{len(self.threads)}"
            thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
            self.threads.append(thread)
            thread.start()
        return await asyncio.wrap_future(future)

    def _count_down(self, future: Future[Any]) -> None:
        with self._lock:
            self.count -= 1

    @property
    def busy(self) -> bool:
        """Whether a thread is still there."""
        return any(thread.is_alive() for thread in self.threads)

    def close(self) -> None:
        """Cancel what waits; threads end, those at work when they are done, for which nobody waits."""
        with suppress(Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task[0].cancel()
        for _ in self.threads:
            self._tasks.put(None)
        if not self.count:
            end = time.monotonic() + IDLE_END_S
            for thread in self.threads:
                thread.join(max(0.0, end - time.monotonic()))


def _work(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                found = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(found)
                del found
        del task, future, call  # nothing is kept for the next one


async def while_wanted(work: Awaitable[T], ended: asyncio.Event, receive: Receive | None = None) -> T:
    """What `work` returns; APIError 503 once `ended` is set, ClientDisconnect once the client (by receive) has left."""
    waiters: list[asyncio.Future[Any]] = [asyncio.ensure_future(ended.wait())]
    if receive is not None:
        waiters.append(asyncio.ensure_future(_gone(receive)))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, *waiters), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise shutting_down() if waiters[0].done() else ClientDisconnect
    finally:
        for one in (task, *waiters):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
