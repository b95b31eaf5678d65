"""What `--vram-budget` and its kin bring about: a placement for the GPU at hand, and one line on what runs where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..formats.errors import GPUError
from .console import StatusLine, find_model, human_bytes, note, printable, settled

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from ..formats.section import Placement
    from ..runtime.llm import LLM
    from ..runtime.trace import Trace
    from ..solver.placement import Placed


class Model(Protocol):
    """What is opened: an LLM or an Engine."""

    config: ModelConfig


T = TypeVar("T", bound=Model)


@dataclass(frozen=True)
class GPUOptions:
    """budget: of GPU memory, None: no GPU. require: without one, fail. cold: cpu, mapped or auto. trace: a file."""

    budget: str | None = None
    require: bool = False
    cold: str = "auto"
    trace: Path | None = None


@contextmanager
def timeline(gpu: GPUOptions) -> Iterator[Trace | None]:
    """Notes what runs when, and writes it at the end, if a file for it was given."""
    if gpu.trace is None:
        yield None
        return
    from ..runtime.trace import Trace

    trace = Trace()
    try:
        yield trace
    finally:
        trace.write(gpu.trace)
        note(f"the timeline is in {gpu.trace}: open it in chrome://tracing or ui.perfetto.dev")


@contextmanager
def open_llm(
    name: str,
    n_ctx: int | None,
    n_threads: int | None,
    sparsity: str = "auto",
    gpu: GPUOptions | None = None,
    lora: Sequence[tuple[Path, float]] = (),
    prompt_cache: Path | None = None,
    **serving: Any,
) -> Iterator[LLM]:
    """The model `name` (pulled if need be), its loading and first compilation shown on stderr.

    serving: LLM's other arguments.
    """
    path = find_model(name)
    status, gpu = StatusLine(), gpu or GPUOptions()
    try:
        from ..runtime.llm import LLM

        path, lora = settled(path, lora, n_threads, status)
        with timeline(gpu) as trace:
            n_parallel = serving.get("n_parallel", 1)

            def make(placement: Placement | None) -> LLM:
                ctx = placement.n_ctx // n_parallel if placement else n_ctx or None
                return LLM(
                    path,
                    n_ctx=ctx,
                    n_threads=n_threads,
                    sparsity=sparsity,
                    placement=placement,
                    trace=trace,
                    lora=lora,
                    prompt_cache=prompt_cache,
                    progress=status,
                    **serving,
                )

            # the GPU's part of the KV cache is for all answers
            with opened(gpu, path, n_ctx * n_parallel if n_ctx else None, n_threads, sparsity, status, make) as llm:
                status.clear()
                yield llm
    finally:
        status.clear()


def opened(
    gpu: GPUOptions,
    path: Path,
    n_ctx: int | None,
    n_threads: int | None,
    sparsity: str,
    status: StatusLine,
    make: Callable[[Placement | None], T],
) -> T:
    """What `make` makes of a placement for the GPU; of None where none was asked for or it cannot be used.

    The reason is said once; with `require` it is the error.
    """
    if gpu.budget is None and not gpu.require:
        return make(None)
    try:
        placed = _place(gpu, path, n_ctx, n_threads, sparsity, status)
        if placed.placement.empty:
            raise GPUError(f"nothing of the model is put on the GPU: {'; '.join(placed.notes)}")
        result = make(placed.placement)
    except GPUError as error:
        if gpu.require:
            raise
        why = str(error)
    else:
        why = ""
    status.clear()
    if why:  # after the block, as the error would keep the GPU's memory from being freed
        note(printable(f"the GPU is not used: {why}; all runs on the CPU"))
        return make(None)
    for line in placed.notes:
        note(printable(line))
    note(printable(what_runs_where(placed, result.config.n_ff)))
    return result


def _place(
    gpu: GPUOptions, path: Path, n_ctx: int | None, n_threads: int | None, sparsity: str, status: StatusLine
) -> Placed:
    from ..runtime.cuda.device import open_device
    from ..solver.placement import place

    open_device().close()  # the reason why there is none comes first
    return place(
        path,
        gpu.budget or "auto",
        n_ctx=n_ctx,
        n_threads=n_threads,
        sparsity=sparsity,
        cold=gpu.cold,
        reuse=True,
        progress=status,
    )


def what_runs_where(placed: Placed, n_ff: int) -> str:
    """One line: device, bytes of the budget, hot share and its expected part of the activations, and the CPU's part."""
    one = placed.placement
    n_layer, hot = len(one.hot), sum(map(len, one.hot))
    parts = [f"{hot / n_layer / n_ff:.0%} of the neurons ({placed.share:.0%} of the activations expected)"]
    parts.append(f"attention of {sum(one.attention)} of {n_layer} layers")
    if one.head:
        parts.append("the output")
    others = "reads the other neurons from host memory" if one.cold == "mapped" else "the CPU computes the rest"
    total = placed.used + placed.reserve
    return f"{one.hardware}: {human_bytes(total)} of {human_bytes(one.budget)}: {', '.join(parts)}; {others}"
