"""Answers in event loops, on a fake engine: the background thread, wake-ups, cancelled tasks, loops that are closed."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, make

from hotcold.formats.errors import BusyError, ClosedError
from hotcold.runtime import scheduler
from hotcold.runtime.answer import UNREAD, Answer
from hotcold.runtime.llm import LLM


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads change places wherever they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def steppers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hotcold-steps"]


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 60)

    return asyncio.run(bounded())


async def atext(answer: Answer) -> str:
    return "".join([piece.text async for piece in answer])


def alone(prompt: str, n: int = 12) -> str:
    return make().generate(prompt, max_tokens=n, seed=5)


def at_rest(llm: LLM) -> bool:
    deadline = time.monotonic() + 30
    while (llm.scheduler.running or llm.scheduler.waiting) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not llm.scheduler.running and not llm.scheduler.waiting


def test_many_tasks_get_what_one_would() -> None:
    llm = make(n_parallel=5)

    async def main() -> list[str]:
        return await asyncio.gather(*(atext(llm.ask(f"prompt {i % 7}", 12, seed=5)) for i in range(40)))

    assert run(main) == [alone(f"prompt {i % 7}") for i in range(40)]
    assert at_rest(llm)


def test_astream_and_its_end() -> None:
    llm = make()

    async def main() -> None:
        assert "".join([piece async for piece in llm.astream("a", 12, seed=5)]) == alone("a")
        stream = llm.astream("a", 100, seed=5)
        async for _ in stream:
            break
        await stream.aclose()
        assert not llm.scheduler.waiting
        async for _ in llm.astream("a", 100, seed=5):
            break  # and nobody closes it
        gc.collect()
        await asyncio.sleep(0)
        assert "".join([piece async for piece in llm.astream("b", 12, seed=5)]) == alone("b")

    run(main)
    assert at_rest(llm)


def test_a_slow_reader_is_waited_for_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It pauses when nobody reads, the thread ends meanwhile, and starts again with the reader."""
    monkeypatch.setattr(scheduler, "IDLE_SECONDS", 0.01)
    llm, wanted = make(n_parallel=2), alone("slow", 150)

    async def main(rest: int) -> str:
        answer, found = llm.ask("slow", 150, seed=5), []
        async for piece in answer:
            found.append(piece.text)
            if len(found) == rest:
                while steppers():
                    await asyncio.sleep(0.001)
                assert len(answer.tokens) < UNREAD + rest + 40
        return "".join(found)

    for rest in (1, 2, UNREAD):
        assert run(lambda rest=rest: main(rest)) == wanted


def test_the_background_thread_ends_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "IDLE_SECONDS", 0.01)
    llm = make()

    async def main() -> None:
        for i in range(20):
            assert await atext(llm.ask(f"{i % 3}", 12, seed=5)) == alone(f"{i % 3}")
            if i % 2:
                await asyncio.sleep(0.01)  # about when it ends
        while steppers():
            await asyncio.sleep(0.001)
        assert await atext(llm.ask("last", 12, seed=5)) == alone("last")

    run(main)


def test_a_cancelled_task_frees_its_place() -> None:
    llm = make(n_parallel=1)

    async def main() -> None:
        for started in (False, True):
            first = asyncio.create_task(atext(llm.ask("first", 10**6 if started else 12)))
            tasks = [asyncio.create_task(atext(llm.ask(f"{i}", 12, seed=5))) for i in range(3)]
            if started:
                while not llm.scheduler.running:
                    await asyncio.sleep(0)
            first.cancel()
            tasks[1].cancel()
            found = await asyncio.gather(first, *tasks, return_exceptions=True)
            assert isinstance(found[0], asyncio.CancelledError) and isinstance(found[2], asyncio.CancelledError)
            assert (found[1], found[3]) == (alone("0"), alone("2"))

    engine: Any = llm.engine
    engine.n_ctx = 10**7
    run(main)
    assert at_rest(llm)


def test_a_full_queue_and_close_in_a_loop() -> None:
    llm = make(n_parallel=1, n_queue=1)

    async def main() -> None:
        answers = [llm.ask(f"{i}", 12, seed=5) for i in range(3)]
        answers[0].start()
        answers[1].start()
        with pytest.raises(BusyError):
            await atext(answers[2])
        reading = [asyncio.create_task(atext(answer)) for answer in answers[:2]]
        await asyncio.sleep(0)
        await asyncio.to_thread(llm.close)
        for found in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(found, ClosedError) or found in (alone("0"), alone("1"))

    run(main)


def test_two_loops_in_two_threads_and_a_plain_reader() -> None:
    llm, found = make(n_parallel=3), {}

    def work(which: int) -> None:
        async def main() -> list[str]:
            return await asyncio.gather(*(atext(llm.ask(f"{which} {i}", 12, seed=5)) for i in range(8)))

        found[which] = run(main)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    plain = [llm.generate(f"plain {i}", 12, seed=5) for i in range(8)]
    for thread in threads:
        thread.join(60)
    assert found == {which: [alone(f"{which} {i}") for i in range(8)] for which in range(2)}
    assert plain == [alone(f"plain {i}") for i in range(8)]


def test_a_loop_that_was_closed_holds_nothing_up() -> None:
    llm = make(n_parallel=1, n_queue=0)
    kept: list[AsyncGenerator[Any, None]] = []
    for step_of_reader in (0, 1):
        loop = asyncio.new_event_loop()
        answer = llm.ask("left", 150, seed=5)
        kept.append(answer.__aiter__())
        task = kept[-1].__anext__()
        if step_of_reader:
            loop.run_until_complete(task)  # it stops in the midst of reading
        else:
            pending = loop.create_task(task)
            loop.run_until_complete(asyncio.sleep(0))  # it stops waiting
            assert not answer.ended
            pending._log_destroy_pending = False
        loop.close()
        assert llm.generate("next", 12, seed=5) == alone("next")
        assert answer.ended and at_rest(llm)


def test_a_failing_step_is_told_to_those_who_wait() -> None:
    """One that nobody expects, in the background thread."""
    llm = make(n_parallel=1)
    engine: Any = llm.engine

    async def main() -> None:
        real, engine.new_sequence = engine.new_sequence, lambda guest=False: 1 / 0
        for found in await asyncio.gather(*(atext(llm.ask("a", 3)) for _ in range(3)), return_exceptions=True):
            assert isinstance(found, ZeroDivisionError)
        engine.new_sequence = real
        assert await atext(llm.ask("a", 12, seed=5)) == alone("a")

    run(main)


def test_dropping_the_model_ends_its_thread_and_frees_it() -> None:
    llm = make()
    engine: FakeEngine = llm.engine  # type: ignore[assignment]

    async def main(llm: LLM) -> None:
        await atext(llm.ask("a", 3))

    asyncio.run(main(llm))
    held = weakref.ref(llm.scheduler)
    del llm
    deadline = time.monotonic() + 4  # less than the thread would stay
    while (held() is not None or steppers()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert held() is None and engine.closed and not steppers()


def test_close_ends_the_thread() -> None:
    llm = make()
    asyncio.run(_one(llm))
    assert len(steppers()) == 1
    llm.close()
    deadline = time.monotonic() + 4
    while steppers() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not steppers()


async def _one(llm: LLM) -> None:
    await atext(llm.ask("a", 3))


def test_processors_run_in_the_background_thread() -> None:
    llm, seen = make(), set()

    def note(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.add(threading.current_thread().name)
        return scores

    async def main() -> str:
        return "".join([piece async for piece in llm.astream("a", 12, seed=5, logits_processor=note)])

    assert run(main) == alone("a") and seen == {"hotcold-steps"}
