"""The paged KV cache: float16 keys and values in blocks of tokens, with a block table per sequence."""

from __future__ import annotations

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ClosedError, ContextLengthError
from .cpu.layout import KV_BLOCK
from .memory import aligned


class KVCache:
    """Blocks of KV_BLOCK tokens. keys [n_layer][n_blocks][n_kv][dim_k][KV_BLOCK], values [..][n_kv][KV_BLOCK][dim_v].

    Memory is only touched, and so only counted, where tokens have been stored.
    """

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        self.n_blocks = -(-n_tokens // KV_BLOCK)
        per_block = config.n_head_kv * KV_BLOCK * 2
        self.key_layer_bytes = self.n_blocks * per_block * config.head_dim_k
        self.value_layer_bytes = self.n_blocks * per_block * config.head_dim_v
        self._keys = aligned(config.n_layer * self.key_layer_bytes, zero=True)
        self._values = aligned(config.n_layer * self.value_layer_bytes, zero=True)
        self._fresh = 0  # blocks from here on were never taken
        self._free: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes when full."""
        return self._keys.nbytes + self._values.nbytes

    def layer(self, index: int) -> tuple[int, int]:
        """Addresses of a layer's keys and values."""
        return (
            self._keys.ctypes.data + index * self.key_layer_bytes,
            self._values.ctypes.data + index * self.value_layer_bytes,
        )

    def take(self) -> int:
        """A free block."""
        if self._free:
            return self._free.pop()
        if self._fresh == self.n_blocks:
            raise ContextLengthError(
                f"KV cache is full: all {self.n_blocks * KV_BLOCK} tokens are in use; close a sequence"
            )
        self._fresh += 1
        return self._fresh - 1

    def give(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(blocks))


class Sequence:
    """The tokens of one conversation and where their keys and values are.

    table: int32, the cache block of every KV_BLOCK tokens; its address is stable.
    """

    def __init__(self, cache: KVCache, n_ctx: int) -> None:
        self._cache: KVCache | None = cache
        self._n_ctx = n_ctx
        self._blocks: list[int] = []
        self.tokens: list[int] = []
        self.table = np.zeros(-(-n_ctx // KV_BLOCK), np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens: ContextLengthError if they do not fit."""
        if self._cache is None:
            raise ClosedError("this sequence is closed; make another with new_sequence()")
        wanted = len(self.tokens) + count
        if wanted > self._n_ctx:
            raise ContextLengthError(
                f"{wanted} tokens do not fit the context of {self._n_ctx}; shorten the text or raise n_ctx"
            )
        while len(self._blocks) * KV_BLOCK < wanted:
            block = self._cache.take()
            self.table[len(self._blocks)] = block
            self._blocks.append(block)

    def slots(self, first: int, count: int) -> np.ndarray:
        """Cache slots (block * KV_BLOCK + lane, int32) of positions first..first+count-1."""
        positions = np.arange(first, first + count)
        return self.table[positions // KV_BLOCK] * KV_BLOCK + (positions % KV_BLOCK).astype(np.int32)

    def truncate(self, n: int) -> None:
        """Forget all tokens after the first n."""
        del self.tokens[n:]
        keep = -(-len(self.tokens) // KV_BLOCK)
        blocks = self._blocks[keep:]
        del self._blocks[keep:]  # first: an interrupt may lose a block, but never give one to two sequences
        if self._cache is not None:
            self._cache.give(blocks)

    def close(self) -> None:
        """Give the memory back to the cache."""
        self.truncate(0)
        self._cache = None
