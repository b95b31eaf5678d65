"""Two executors on one graph: the calling thread runs the CPU's segments, a thread of its own the GPU's."""

from __future__ import annotations

import threading
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..formats.errors import ClosedError
from .cpu.layout import TILE_MIN
from .executor import Batch, CPUExecutor, Observer
from .schedule import Segment
from .usage import HotUsage

if TYPE_CHECKING:
    from .cpu.assemble import Tape
    from .trace import Trace


class GPU(Protocol):
    """What runs the GPU's segments; all calls come from one thread."""

    def begin(self, batch: Batch, n_tok: int, outputs: np.ndarray) -> None:
        """Tell the kernels of a step."""

    def launch(self, index: int) -> None:
        """Enqueue a segment; what it sends has been read from the host's memory when this returns."""

    def reached(self, index: int) -> bool:
        """Whether finish would not have to wait."""

    def finish(self, index: int) -> None:
        """Wait for a segment that ends in a fetch, and put what it fetched where the CPU reads it."""

    @property
    def active(self) -> np.ndarray:
        """Active (token, neuron) pairs of each layer so far, int [n_layer]."""

    def spans(self) -> list[tuple[str, float, float]]:
        """Segments of the last step: names, and seconds on the device since begin; empty unless traced."""

    def close(self) -> None:
        """Free the device's memory; never raises."""


class _Step:
    """One step's progress: which segments are done, and what went wrong."""

    def __init__(self, batch: Batch, n_tok: int, outputs: np.ndarray, n_segments: int) -> None:
        self.batch, self.n_tok, self.outputs = batch, n_tok, outputs
        self.done = [False] * n_segments
        self.failure: BaseException | None = None
        self.idle = False  # the GPU's thread has left this step
        self._change = threading.Condition()

    def mark(self, *indices: int) -> None:
        with self._change:
            for index in indices:
                self.done[index] = True
            self._change.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._change:
            self.failure = self.failure or error
            self._change.notify_all()

    def leave(self) -> None:
        with self._change:
            self.idle = True
            self._change.notify_all()

    def ready(self, segment: Segment) -> bool:
        return all(self.done[index] for index in segment.waits)

    def wait(self, indices: list[int]) -> bool:
        """Wait for segments; False if something failed meanwhile."""
        with self._change:
            self._change.wait_for(lambda: self.failure is not None or all(self.done[index] for index in indices))
            return self.failure is None

    def wait_idle(self) -> None:
        with self._change:
            self._change.wait_for(lambda: self.idle)


class HybridExecutor:
    """Runs steps as CPUExecutor does, with a GPU beside it.

    segments: of the graph that both were lowered from. hot: how many neurons of each layer the GPU has.
    """

    def __init__(
        self, segments: list[Segment], cpu: CPUExecutor, gpu: GPU, hot: tuple[int, ...], trace: Trace | None = None
    ) -> None:
        self._cpu, self._gpu, self._segments, self._trace = cpu, gpu, segments, trace
        self._hot, self._n_tokens = hot, 0
        self._worker = _Worker(gpu, [s for s in segments if s.unit == "gpu"], trace)
        self._end_worker = weakref.finalize(self, self._worker.close)
        # rows of the tape by segment
        home = {id(node): segment.index for segment in segments for node in segment.nodes}
        self._rows: dict[int, tuple[int, int]] = {}
        for row, node in enumerate(cpu.tape.nodes):
            first, _ = self._rows.get(home[id(node)], (row, row))
            self._rows[home[id(node)]] = first, row + 1

    @property
    def tape(self) -> Tape:
        """The CPU's part."""
        return self._cpu.tape

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._cpu.steps

    @property
    def gpu_usage(self) -> HotUsage:
        """What the GPU's neurons did so far."""
        return HotUsage(self._hot, self._n_tokens, self._gpu.active)

    def run(
        self, batch: Batch, outputs: np.ndarray, see: Observer | None = None, tile_min: int = TILE_MIN
    ) -> np.ndarray:
        """One step; as CPUExecutor.run. The first error of either side stops both and is raised here."""
        assert see is None, "only a dense engine on the CPU is observed"
        step = _Step(batch, self._cpu.begin(batch, outputs, tile_min), outputs, len(self._segments))
        try:
            self._worker.start(step)
            for segment in self._segments:
                if segment.unit == "cpu":
                    if not step.wait(segment.waits):
                        break
                    began = perf_counter()
                    first, end = self._rows[segment.index]
                    self._cpu.walk(first, end)
                    if self._trace:
                        self._trace.add("cpu", segment.name, began, perf_counter())
                    step.mark(segment.index)
            step.wait(list(range(len(self._segments))))
        except BaseException as error:
            step.fail(error)
            raise
        finally:
            if self._worker.has(step):  # not if an interrupt came before it was given
                step.wait_idle()
        if step.failure is not None:
            raise step.failure
        self._n_tokens += step.n_tok
        return self._cpu.end(batch, outputs)

    def close(self) -> None:
        """End the threads and free the device's memory."""
        self._end_worker()
        self._cpu.close()


class _Worker:
    """The GPU's thread: parked between steps."""

    def __init__(self, gpu: GPU, segments: list[Segment], trace: Trace | None) -> None:
        self._gpu, self._segments, self._trace = gpu, segments, trace
        self._wake = threading.Condition()
        self._step: _Step | None = None  # waiting to be taken up
        self._given: _Step | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="hotcold-gpu", daemon=True)
        self._thread.start()

    def start(self, step: _Step) -> None:
        with self._wake:
            if self._ended:
                raise ClosedError("this engine is closed; make another")
            self._given = self._step = step
            self._wake.notify()

    def has(self, step: _Step) -> bool:
        """Whether a step was given to the thread, and it has not left it."""
        with self._wake:
            return step is self._given and not step.idle

    def close(self) -> None:
        """End the thread after the step in progress, and free the device's memory."""
        with self._wake:
            self._ended = True
            self._wake.notify()
        try:
            if self._thread is not threading.current_thread():  # the garbage collector may call from any
                self._thread.join()
        finally:
            self._gpu.close()

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._step is not None or self._ended)
                step, self._step = self._step, None
            if step is None:
                return
            try:
                self._run(step)
            except BaseException as error:
                step.fail(error)
            step.leave()

    def _run(self, step: _Step) -> None:
        began = perf_counter()
        self._gpu.begin(step.batch, step.n_tok, step.outputs)
        fetching: list[int] = []  # enqueued, and not yet waited for: the queue is kept filled first
        for segment in self._segments:
            self._finish(step, [index for index in fetching if self._gpu.reached(index)])
            fetching = [index for index in fetching if not step.done[index]]
            if not step.ready(segment):
                self._finish(step, fetching)
                fetching = []
                if not step.wait(segment.waits):
                    return
            self._gpu.launch(segment.index)
            if segment.nodes[-1].op == "fetch":
                fetching.append(segment.index)
            else:
                step.mark(segment.index)
        self._finish(step, fetching)
        if self._trace:
            for name, start, end in self._gpu.spans():
                self._trace.add("gpu", name, began + start, began + end)

    def _finish(self, step: _Step, fetching: list[int]) -> None:
        for index in fetching:
            self._gpu.finish(index)
        step.mark(*fetching)
