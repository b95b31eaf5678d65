"""An engine whose logits are a plain function of the tokens so far, a byte tokenizer, an LLM over both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hotcold.formats.chat_template import CHATML, ChatTemplate
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.llm import LLM
from hotcold.runtime.prefix_cache import common
from hotcold.runtime.usage import Usage

# ids 0-255 are bytes; then words of several bytes, then control tokens
WORDS = [b"Hel", b"lo", b" wor", b"ld", b"STO", b"P!", b"\xe2\x82", b"\xac", b"\xf0\x9f\x98\x80"]
CONTROL = ["<s>", "<|im_start|>", "<|im_end|>"]
BOS, START, END = (256 + len(WORDS) + i for i in range(3))
N_VOCAB = 256 + len(WORDS) + len(CONTROL)
HEL, LO, WOR, LD, STO, P, EU, RO, SMILE = range(256, 256 + len(WORDS))


class FakeTokenizer:
    """Bytes and a few words; encoding uses bytes alone."""

    n_vocab = N_VOCAB
    space_prefix = False
    stop_ids = frozenset({END})

    def __init__(self, bos: int | None = BOS, eos: int | None = END, add_eos: bool = False) -> None:
        self.bos_id, self.eos_id, self.add_bos, self.add_eos = bos, eos, bos is not None, add_eos

    def most_characters(self, n_tokens: int) -> int:
        return 13 * n_tokens

    def encode(self, text: str, add_bos: bool | None = None, special: bool = False) -> list[int]:
        ids: list[int] = []
        while text:
            found = [c for c in CONTROL if special and text.startswith(c)]
            ids += [256 + len(WORDS) + CONTROL.index(found[0])] if found else list(text[0].encode())
            text = text[len(found[0]) if found else 1 :]
        if self.bos_id is not None and add_bos is not False and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return [*ids, self.eos_id] if self.add_eos and add_bos is not False else ids

    def is_control(self, id: int) -> bool:
        return id >= BOS

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else WORDS[id - 256] if id < BOS else CONTROL[id - BOS].encode()

    def token_text(self, id: int) -> str:
        return self.token_bytes(id).decode(errors="replace")

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        return b"".join(self.token_bytes(i) for i in ids if special or not self.is_control(i)).decode(errors="replace")


class FakeSequence:
    """A sequence of an engine that remembers what ended sequences and full blocks held, and forgets nothing."""

    def __init__(self, known: list[list[int]] | None = None) -> None:
        self.tokens: list[int] = []
        self.closed = False
        self._known = [] if known is None else known

    def __len__(self) -> int:
        return len(self.tokens)

    def truncate(self, n: int) -> None:
        del self.tokens[n:]

    def adopt(self, ids: Sequence[int]) -> int:
        if len(self.tokens) % KV_BLOCK:
            return 0
        held, wanted = len(self.tokens), list(ids[:-1])
        most = max((common(known, wanted) for known in self._known), default=0)
        self.tokens.extend(wanted[held:most])
        return max(0, most - held)

    def share(self, tail: bool = False) -> None:
        full = len(self.tokens) if tail else len(self.tokens) // KV_BLOCK * KV_BLOCK
        self._known.append(self.tokens[:full])

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """`next_token(tokens)` names the likeliest next token; None asks for noise seeded by the tokens."""

    def __init__(self, next_token: Callable[[list[int]], int | None], n_ctx: int = 200, **sampling: float) -> None:
        self.next_token, self.n_ctx, self.n_vocab = next_token, n_ctx, N_VOCAB
        self.file = SimpleNamespace(path=Path("fake.gguf"), metadata={})
        self.config = SimpleNamespace(sampling=sampling, n_expert=0)
        self.calls: list[int] = []
        self.busy = threading.Lock()
        self.closed = False
        self.usage, self.plan, self.max_rows = Usage(), None, 32
        self.cache = SimpleNamespace(n_spare=0)
        self.known: list[list[int]] = []

    def new_sequence(self, guest: bool = False) -> FakeSequence:
        return FakeSequence(self.known)

    def row(self, tokens: list[int]) -> np.ndarray:
        logits = np.random.default_rng(tokens).standard_normal(N_VOCAB).astype(np.float32)
        logits[BOS:] -= 100
        chosen = self.next_token(tokens)
        if chosen is not None:
            logits[chosen] = 30
        return logits

    def eval(self, seq: FakeSequence, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        return self.eval_batch([(seq, ids)], [len(ids) if all_logits else 1], by_rows=False)

    def eval_batch(
        self, batch: Sequence[tuple[FakeSequence, Sequence[int]]], outputs: Sequence[int], by_rows: bool
    ) -> np.ndarray:
        assert self.busy.acquire(blocking=False), "two threads in the engine"
        try:
            assert not self.closed and (not by_rows or sum(len(ids) for _, ids in batch) <= self.max_rows)
            rows: list[np.ndarray] = []
            for (seq, ids), wanted in zip(batch, outputs, strict=True):
                assert len(ids) > 0 and len(seq) + len(ids) <= self.n_ctx
                self.calls.append(len(ids))
                own = []
                for token in ids:
                    seq.tokens.append(token)
                    own.append(self.row(seq.tokens))
                rows += own[len(own) - wanted :]
            return np.array(rows)
        finally:
            self.busy.release()

    def close(self) -> None:
        self.closed = True


def make(next_token: Callable[[list[int]], int | None] = lambda tokens: None, **options: Any) -> LLM:
    tokenizer = options.pop("tokenizer", None) or FakeTokenizer()
    template = options.pop("template", ChatTemplate(CHATML, "<s>", "<|im_end|>"))
    seed = options.pop("seed", None)
    serving = {name: options.pop(name) for name in ("n_parallel", "n_queue", "lookup") if name in options}
    engine: Any = FakeEngine(next_token, **options)
    return LLM.from_engine(engine, tokenizer, template, seed, **serving)


def saying(*answer: int) -> Callable[[list[int]], int]:
    """After the byte "?" of a prompt (or the chat's last newline), these tokens and then the end token."""

    def next_token(tokens: list[int]) -> int:
        at = max((i for i, t in enumerate(tokens) if t in (ord("?"), ord("\n"))), default=-1)
        place = len(tokens) - at - 1
        return answer[place] if place < len(answer) else END

    return next_token
