"""The turn on an engine: first come, first served, whoever is interrupted."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.formats.errors import HotcoldError
from hotcold.runtime.turn import Turn


def waits(turn: Turn, n: int) -> None:
    """Until n threads are in the queue."""
    while len(turn._waiting) < n:
        time.sleep(0.0005)


def taker(turn: Turn, note: Callable[[], None]) -> threading.Thread:
    def work() -> None:
        with turn:
            note()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_first_come_first_served() -> None:
    turn, order = Turn(), []
    threads = []
    with turn:
        for i in range(8):
            threads.append(taker(turn, lambda i=i: order.append(i)))
            waits(turn, i + 1)
    for thread in threads:
        thread.join(30)
    assert order == list(range(8))
    assert turn.acquire(blocking=False)


def test_it_is_handed_over_and_not_up_for_grabs() -> None:
    """Who releases it and asks again at once comes after who waited."""
    turn, order = Turn(), []
    turn.acquire()
    other = taker(turn, lambda: order.append("other"))
    waits(turn, 1)
    turn.release()
    with turn:
        order.append("again")
    other.join(30)
    assert order == ["other", "again"]


def test_asking_without_waiting() -> None:
    turn, found = Turn(), []
    assert turn.acquire(blocking=False)
    thread = threading.Thread(target=lambda: found.append(turn.acquire(blocking=False)))
    thread.start()
    thread.join(30)
    assert found == [False] and not turn.acquire(blocking=False), "not even for who has it"
    turn.release()
    assert turn.acquire(blocking=False)


def test_waiting_for_oneself_is_an_error() -> None:
    turn = Turn()
    with turn:
        with pytest.raises(HotcoldError, match="in the midst of a step"):
            turn.acquire()
    with turn:  # which left it as it was
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no signals between threads")
@pytest.mark.parametrize("too_late", [False, True])
def test_ctrl_c_while_waiting_leaves_the_queue(too_late: bool) -> None:
    """A waiter that is interrupted goes; if it was just given the turn, it passes it on."""
    turn, order = Turn(), []
    go = threading.Event()

    def hold() -> None:
        with turn:
            held.set()
            go.wait(30)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    later: list[threading.Thread] = []

    def interrupt() -> None:
        waits(turn, 1)
        later.append(taker(turn, lambda: order.append("later")))
        waits(turn, 2)
        if too_late:  # the ticket is given, and the interrupt comes before anybody noticed
            ticket, me = turn._waiting[0]
            turn._waiting[0] = Late(ticket), me  # type: ignore[assignment]
            go.set()
        else:
            os.kill(os.getpid(), 2)

    class Late:
        def __init__(self, ticket: threading.Lock) -> None:
            self.ticket = ticket

        def release(self) -> None:
            os.kill(os.getpid(), 2)
            self.ticket.release()

    striker = threading.Thread(target=interrupt)
    striker.start()
    taken = False
    with pytest.raises(KeyboardInterrupt):
        turn.acquire()
        taken = True
        time.sleep(5)  # it may strike after the call
    striker.join(30)
    go.set()
    if taken:
        turn.release()
    holder.join(30)
    later[0].join(30)
    assert order == ["later"] and turn._holder is None and not turn._waiting


def test_the_garbage_collector_may_ask_in_the_midst() -> None:
    """What it finalises may be an answer, whose end asks for the turn."""
    turn, asked = Turn(), list[bool]()

    class Cyclic:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            asked.append(turn.acquire(blocking=False))
            if asked[-1]:
                turn.release()

    def work() -> None:
        for _ in range(3):
            Cyclic()
            with turn._mutex:
                gc.collect()
            with turn:
                Cyclic()
                gc.collect()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert asked == [True, False] * 3
    assert turn.acquire(blocking=False)


@settings(max_examples=15)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=8), min_size=2, max_size=6))
def test_nobody_is_forgotten_and_nobody_alone_is_two(plans: list[list[tuple[bool, int]]]) -> None:
    """Threads that take it, waiting or not, and give way in between: a count that only the turn guards is right."""
    turn, inside, entered = Turn(), [0], [0]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(plan: list[tuple[bool, int]]) -> None:
        for blocking, pauses in plan * 3:
            if turn.acquire(blocking):
                inside[0] += 1
                for _ in range(pauses):
                    time.sleep(0)
                    assert inside[0] == 1
                entered[0] += 1
                inside[0] -= 1
                turn.release()

    try:
        threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(before)
    sure = sum(3 * blocking for plan in plans for blocking, _ in plan)
    most = sum(3 * len(plan) for plan in plans)
    assert sure <= entered[0] <= most and turn._holder is None and not turn._waiting
