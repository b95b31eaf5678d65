"""Child process of `hotcold bench --against`: llama-cpp-python behind JSON lines on stdin and stdout.

Runs as a file under an interpreter that has llama_cpp, and need not have hotcold. Requests are
`{"op": "load", "model", "n_ctx", "n_threads", "ids"}`, `{"op": "prompt", "ids"}` and
`{"op": "decode", "first", "n"}`; a reply holds the seconds taken, or `{"error"}`. It drives the C API: logits
for the last token only, an empty KV cache before each measurement, greedy decoding.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any, TextIO

import numpy as np

N_BATCH = 512


class Peer:
    """One loaded model; `llama_cpp` is that module."""

    def __init__(self, llama_cpp: Any, model: str, n_ctx: int, n_threads: int) -> None:
        self.library = llama_cpp
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, N_BATCH, N_BATCH
        context.n_threads = context.n_threads_batch = n_threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Empty the KV cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def eval(self, ids: list[int]) -> int:
        """Append ids; the greedy next token."""
        llama_cpp = self.library
        for start in range(0, len(ids), N_BATCH):
            part = ids[start : start + N_BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(part)))
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
        # Reading the logits also waits for the computation.
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.n_vocab,))))

    def prompt(self, ids: list[int]) -> float:
        """Seconds to evaluate ids from an empty cache."""
        self.clear()
        start = time.perf_counter()
        self.eval(ids)
        return time.perf_counter() - start

    def decode(self, first: int, n: int) -> float:
        """Seconds for n one-token steps from an empty cache, greedy after `first`."""
        self.clear()
        start, token = time.perf_counter(), first
        for _ in range(n):
            token = self.eval([token])
        return time.perf_counter() - start


def peak_rss() -> int | None:
    """Peak resident bytes of this process, or None where the system does not tell."""
    try:
        # Unlike getrusage, this does not count what the parent held when it started us.
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def serve(llama_cpp: Any, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the input ends."""
    peer: Peer | None = None
    for line in requests:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {}
            if request["op"] == "load":
                start = time.perf_counter()
                peer = Peer(llama_cpp, request["model"], request["n_ctx"], request["n_threads"])
                reply["load_s"] = time.perf_counter() - start
                peer.eval(request["ids"])
                reply["first_token_s"] = time.perf_counter() - start
                reply["version"] = llama_cpp.__version__
            elif peer is None:
                raise RuntimeError("no model is loaded")
            elif request["op"] == "prompt":
                reply["s"] = peer.prompt(request["ids"])
            elif request["op"] == "decode":
                reply["s"] = peer.decode(request["first"], request["n"])
            reply["peak_rss_bytes"] = peak_rss()
        except Exception as exc:  # the parent turns it into its own error
            reply = {"error": f"{type(exc).__name__}: {exc}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Keep stdout for replies alone, whatever the C library prints."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import llama_cpp  # type: ignore[import-not-found]

    silence = llama_cpp.llama_log_callback(_silent)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    serve(llama_cpp, sys.stdin, replies)


def _silent(level: int, text: bytes, user_data: Any) -> None:
    pass


if __name__ == "__main__":
    main()
