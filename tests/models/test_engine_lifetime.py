"""Threads and memory of an engine: interrupts, close(), dropping it, the interpreter's end, forked children."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotcold import LLM, Engine

Make = Callable[..., Path]
IDS = [5, 9, 250, 17, 30, 31, 32, 33, 34, 35]


def fresh_logits(engine: Engine, ids: list[int]) -> np.ndarray:
    sequence = engine.new_sequence()
    try:
        return engine.eval(sequence, ids)[-1].copy()
    finally:
        sequence.close()


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hotcold")]


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("where", ["_open_gates", "_walk"])
def test_an_interrupt_in_a_step_leaves_the_engine_right(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C is noticed when a call returns: after the other threads were woken, or after the walk."""
    with Engine(tiny_model(), n_threads=2) as engine:
        wanted = [fresh_logits(engine, IDS), fresh_logits(engine, IDS[::-1])]
        pool: Any = engine._executor._pool
        real = getattr(pool, where)

        def interrupted(*arguments: Any) -> None:
            real(*arguments)
            if threading.current_thread() is threading.main_thread():
                monkeypatch.undo()
                raise KeyboardInterrupt

        for _ in range(3):
            sequence = engine.new_sequence()
            engine.eval(sequence, IDS[:2])
            monkeypatch.setattr(pool, where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.eval(sequence, IDS[2:])
            assert sequence.tokens == IDS[:2]
            again = engine.eval(sequence, IDS[2:])[-1]
            np.testing.assert_allclose(again, wanted[0], atol=1e-3)
            assert np.array_equal(fresh_logits(engine, IDS[::-1]), wanted[1])
            sequence.close()


def test_close_ends_the_threads_and_frees_the_mapping(tiny_model: Make) -> None:
    path = tiny_model()
    for _ in range(10):
        engine = Engine(path, n_threads=3)
        fresh_logits(engine, IDS)
        assert len(own_threads()) == 2
        assert not sys.platform.startswith("linux") or mapped(path)
        engine.close()
        assert own_threads() == []
        assert not sys.platform.startswith("linux") or not mapped(path)


@pytest.mark.parametrize("kind", [Engine, LLM])
def test_a_dropped_model_takes_its_threads_along(tiny_model: Make, kind: type) -> None:
    path = tiny_model()
    model = kind(path, n_threads=3)
    assert len(own_threads()) == 2
    del model
    gc.collect()
    assert own_threads() == []
    assert not sys.platform.startswith("linux") or not mapped(path)


@pytest.mark.parametrize("kept", ["llm", "llm.engine", "llm.stream('a')", "next(s := llm.stream('a', seed=1))"])
def test_the_interpreter_may_end_with_a_model_open(tiny_model: Make, kept: str) -> None:
    code = f"""
import sys
from hotcold import LLM
llm = LLM({str(tiny_model())!r}, n_threads=3)
llm.generate("hello", max_tokens=3)
kept = {kept}
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_the_interpreter_may_end_while_a_daemon_thread_generates(tiny_model: Make) -> None:
    code = f"""
import threading
from hotcold import LLM
llm, begun = LLM({str(tiny_model(n_ctx_train=10**6))!r}, n_threads=3), threading.Event()

def note(ids, scores):
    begun.set()
    scores[:3] = -1e9  # no end of the text
    return scores

work = lambda: llm.generate("hello", max_tokens=10**6, logits_processor=note)
threading.Thread(target=work, daemon=True).start()
begun.wait(60)
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_interpreter_may_end_while_the_background_thread_computes(tiny_model: Make, n_threads: int) -> None:
    code = f"""
import asyncio
from hotcold import LLM
llm = LLM({str(tiny_model(n_ctx_train=10**6))!r}, n_threads={n_threads}, n_ctx=10**5)

async def main():
    answers = [llm.ask([i] * 5, logits_processor=lambda ids, scores: scores) for i in range(5, 8)]
    prompts = [llm.ask([i] * 9000) for i in range(5, 8)]
    for answer in (*answers, *prompts):
        answer.start()
    kept.extend((answers, prompts))
    async for piece in answers[0]:
        break

kept = []
asyncio.run(main())
llm.scheduler.run_in_background()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same(tiny_model: Make) -> None:
    code = f"""
import os, threading, warnings
import numpy as np
from hotcold import LLM, HotcoldError
warnings.simplefilter("ignore")
llm = LLM({str(tiny_model())!r}, n_threads=3)
wanted = llm.logits([5, 9, 250, 17])

def fork(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(llm.logits([5, 9, 250, 17]), wanted)

def computes():
    right = np.array_equal(llm.logits([5, 9, 250, 17]), wanted) and threading.active_count() == 3
    llm.close()
    return right

fork(computes)
wanted_text, begun = llm.generate("a", max_tokens=5, seed=1), llm.stream("a", max_tokens=90, seed=1)
next(begun)

def answers():
    try:
        "".join(begun)
    except HotcoldError as error:
        return "forked" in str(error) and llm.generate("a", max_tokens=5, seed=1) == wanted_text

fork(answers)
"".join(begun)
held, go = threading.Event(), threading.Event()

def hold(ids, scores):
    held.set()
    go.wait(60)
    return scores

def is_refused():
    try:
        llm.generate("a")
    except HotcoldError as error:
        return "fork" in str(error)

other = threading.Thread(target=lambda: llm.generate("a", max_tokens=1, logits_processor=hold))
other.start()
held.wait(60)
child = os.fork()
if child == 0:
    os._exit(0 if is_refused() else 2)
assert os.waitpid(child, 0)[1] == 0
go.set()
other.join()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
