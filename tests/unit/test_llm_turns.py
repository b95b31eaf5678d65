"""Who may call when: streams, threads, interrupts, close()."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing
from contextvars import copy_context

import numpy as np
import pytest
from fakes import (
    HEL,
    LO,
    N_VOCAB,
    WOR,
    make,
    saying,
)

from hotcold.formats.errors import ClosedError
from hotcold.runtime.llm import LLM


def test_an_abandoned_stream_gives_its_turn_back() -> None:
    llm = make()
    for _ in llm.stream("a"):
        break
    gc.collect()
    assert llm.generate("b", max_tokens=3, seed=1) == make().generate("b", max_tokens=3, seed=1)
    held = llm.stream("a")
    next(held)
    held.close()
    assert llm.stats().decode_tokens >= 1
    assert llm.generate("b", max_tokens=3, seed=1) == make().generate("b", max_tokens=3, seed=1)


def test_an_unstarted_stream_takes_no_turn() -> None:
    llm = make(saying(HEL, LO))
    waiting = llm.stream("a?")
    chunks = llm.create_completion("a?", stream=True)
    assert llm.generate("b?") == "Hello"
    assert "".join(waiting) == "Hello"
    assert len(list(chunks)) == 3


def test_streams_of_one_thread_interleave() -> None:
    llm = make(saying(*b"streams of one thread, longer than what is kept for a reader who does not come"))
    wanted = llm.generate("a?")
    first, second = llm.stream("a?"), llm.stream("b?")
    pairs = list(zip(first, second, strict=True))
    assert "".join(a for a, _ in pairs) == "".join(b for _, b in pairs) == wanted
    held = llm.stream("a?")
    begun = next(held)
    for _ in range(3):
        assert llm.generate("c?") == wanted, "a stream that nobody reads gives its place away"
    assert llm.logits([1]).shape == (1, N_VOCAB)
    assert begun + "".join(held) == wanted


def test_a_stream_may_move_between_threads() -> None:
    """A thread that resumed a stream which another thread goes on with must queue, not fail."""
    llm = make(saying(HEL, LO, WOR))
    stream = llm.stream("a?")
    copy_context().run(next, stream)  # as a web server's worker does it
    done: list[str] = []
    first = threading.Thread(target=lambda: done.append(llm.generate("b?")))
    first.start()
    rest: list[str] = []
    second = threading.Thread(target=lambda: rest.extend(stream))
    second.start()
    second.join(20)
    assert rest == ["lo", " wor"]
    first.join(20)
    assert done == ["Hello wor"]
    assert llm.generate("c?") == "Hello wor"


def test_eight_threads_get_what_one_would() -> None:
    prompts = [f"prompt {i % 5}" for i in range(8)]
    alone = [make().generate(p, max_tokens=15, seed=i) for i, p in enumerate(prompts)]
    llm, found = make(), {}

    def work(i: int) -> None:
        for turn in range(3):
            text = (
                llm.generate(prompts[i], max_tokens=15, seed=i)
                if turn % 2
                else "".join(llm.stream(prompts[i], max_tokens=15, seed=i))
            )
            found[i, turn] = text
            assert llm.logits([i]).shape == (1, N_VOCAB)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {(i, turn): alone[i] for i in range(8) for turn in range(3)}


def test_an_interrupt_leaves_the_model_usable() -> None:
    llm = make()
    wanted = make().generate("abc", max_tokens=6, seed=1)
    strike = [3]

    def interrupt(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        strike[0] -= 1
        if strike[0] == 0:
            raise KeyboardInterrupt
        return scores

    try:
        llm.generate("abc", max_tokens=6, seed=1, logits_processor=interrupt)
    except KeyboardInterrupt:
        # the traceback is alive here, and with it every frame that the interrupt went through
        assert llm.generate("abc", max_tokens=6, seed=1) == wanted
    else:
        pytest.fail("no interrupt")

    def interrupted_consumer() -> Iterator[str]:
        with closing(llm.stream("abc", seed=1)) as stream:
            for _ in stream:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_consumer()
    assert llm.generate("abc", max_tokens=6, seed=1) == wanted


def test_close_is_final_and_may_be_repeated() -> None:
    with make() as llm:
        engine = llm.engine
        stream = llm.stream("a")
        next(stream)
    assert llm.closed and engine.closed
    with pytest.raises(ClosedError):
        next(stream)
    llm.close()
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.chat("a"),
        lambda: llm.logits([1]),
        lambda: llm.tokenize("a"),
        lambda: llm.__enter__(),
    ):
        with pytest.raises(ClosedError, match="close"):
            call()
    unstarted = make()
    pending = unstarted.stream("a")
    unstarted.close()
    with pytest.raises(ClosedError):
        next(pending)


def test_close_waits_for_the_step_of_another_thread_and_ends_its_call() -> None:
    started, go = threading.Event(), threading.Event()
    llm = make(saying(HEL, LO))
    engine = llm.engine

    def slow(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        started.set()
        go.wait(20)
        return scores

    errors: list[BaseException] = []

    def call() -> None:
        try:
            llm.generate("a?", logits_processor=slow)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=call)
    worker.start()
    assert started.wait(20)
    closer = threading.Thread(target=llm.close)
    closer.start()
    assert not engine.closed
    go.set()
    worker.join(20)
    closer.join(20)
    assert engine.closed and [type(error) for error in errors] == [ClosedError]


def test_dropping_the_model_frees_it_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = make(saying(HEL, LO))
        engine, stream = llm.engine, llm.stream("a?")
        del llm
        assert "".join(stream) == "Hello", "a stream keeps its model alive"
        del stream
        gc.collect()
        assert engine.closed
        LLM.__new__(LLM)  # a half-made one is dropped as quietly
        gc.collect()
    assert capfd.readouterr() == ("", "")
