"""Text that a model writes itself: conversations and documents, from what begins them on.

A student that sees only prose in training forgets how to answer, and one that sees one kind of text forgets the others.
Source of the idea: Magpie (Xu et al. 2024), where a chat model is given the opening of its own template.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from ..formats.chat_template import load_template
from ..formats.errors import TemplateError
from ..formats.gguf import GGUFFile
from ..formats.tokenizer import load_tokenizer
from ..runtime.memory import available_bytes
from .conversations import MIN_P

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .torch_model import TorchModel

BATCH = 64  # windows that a thread writes side by side
DOCUMENT_STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")


def opening(file: GGUFFile, n_ctx: int) -> list[int] | None:
    """The ids before a user's first message, or None if the model has no template, or one that opens too long."""
    if not file.metadata.get("tokenizer.chat_template"):
        return None
    mark = "hotcold"
    try:
        text = load_template(file).render([{"role": "user", "content": mark}], add_generation_prompt=False)
    except TemplateError:
        return None
    before, found, _ = text.partition(mark)
    ids = load_tokenizer(file).encode(before, special=True)
    return ids if found and 0 < len(ids) <= n_ctx // 2 else None


def document_start(file: GGUFFile) -> list[int] | None:
    """The id that stands before a document, or None if the model has none.

    A chat model's BOS may be the mark of a turn, so the usual names come first.
    """
    tokenizer = load_tokenizer(file)
    for name in DOCUMENT_STARTS:
        if len(ids := tokenizer.encode(name, add_bos=False, special=True)) == 1:
            return ids
    return next(([id] for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None), None)


def writers(model: TorchModel) -> int:
    """How many batches are written at once: one on a GPU, else one a thread, if their keys and values have room."""
    import torch

    c, n_threads, room = model.config, torch.get_num_threads(), available_bytes()
    if model.device.type != "cpu":
        return 1
    cache = BATCH * len(model.cos) * c.n_layer * c.n_head_kv * (c.head_dim_k + c.head_dim_v) * model.dtype.itemsize
    return n_threads if room is None else max(1, min(n_threads, room // 2 // cache))


def write(
    model: TorchModel,
    start: list[int],
    n_windows: int,
    n_ctx: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Windows that begin with `start` and go on as the model has it: int64 [n_windows, n_ctx]; by seed."""
    import torch

    sizes = [min(BATCH, n_windows - begin) for begin in range(0, n_windows, BATCH)]
    done, stop, n_threads = [0] * len(sizes), threading.Event(), torch.get_num_threads()
    n_writers = writers(model)

    def work(i: int) -> Tensor:
        written = torch.tensor(start, device=model.device).repeat(sizes[i], 1)
        for longer in _steps(model, written, n_ctx, temperature, torch.Generator().manual_seed(seed + i)):
            if stop.is_set():
                break
            written, done[i] = longer, longer.shape[1]
        return written

    # A step's many small products would spend their time waiting for one another's threads: one thread a batch.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_writers) as pool:
            try:
                batches = [pool.submit(work, i) for i in range(len(sizes))]
                while wait(batches, timeout=0.5).not_done:
                    progress(sum(done), len(sizes) * n_ctx)
            finally:
                stop.set()
            return torch.cat([batch.result() for batch in batches]).cpu()
    finally:
        torch.set_num_threads(n_threads)


def _steps(model: TorchModel, ids: Tensor, n_ctx: int, temperature: float, generator: Generator) -> Iterator[Tensor]:
    """The windows so far, longer by a token each time."""
    import torch

    c, n = model.config, len(ids)
    caches = [
        [
            torch.zeros(n, c.n_head_kv, n_ctx, dim, dtype=model.dtype, device=model.device)
            for dim in (c.head_dim_k, c.head_dim_v)
        ]
        for _ in range(c.n_layer)
    ]
    for at in range(n_ctx - 1):
        with torch.no_grad():
            x = model.embed(ids[:, at : at + 1])
            for layer, (keys, values) in enumerate(caches):
                x = x + model.attention_step(layer, x, keys, values, at)
                x = x + model.ffn(layer, x)
            if at + 1 == ids.shape[1]:
                logits = (model.norm("output_norm", x[:, 0]) @ model.head().T).float()
                likely = (logits / temperature).softmax(-1)
                likely[likely < MIN_P * likely.amax(-1, keepdim=True)] = 0
                shares = likely.cumsum(-1)
                drawn = torch.rand(n, 1, generator=generator).to(shares.device) * shares[:, -1:]
                chosen = torch.searchsorted(shares, drawn).clamp(max=c.n_vocab - 1)
                ids = torch.cat([ids, chosen], dim=1)
        yield ids
