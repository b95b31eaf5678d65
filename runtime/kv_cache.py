"""The paged KV cache: keys and values in blocks of tokens, with a block table per sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ClosedError, ContextLengthError
from .cpu.layout import KV_BLOCK
from .kv_types import PLAIN, KVTypes
from .memory import aligned
from .prefix_cache import PrefixCache


class KVCache:
    """Blocks of KV_BLOCK tokens: keys and values [n_layer][n_blocks][n_kv] of pages (kv_types.py).

    A block may have several holders: sequences, and `prefixes`, which keeps what may be wanted again until its memory
    is. copyable: whether a block can be copied here, so that sequences may share a part of it (not with a GPU, which
    has some layers in its own memory). n_spare: blocks beside the n_blocks, which only guests take, who take no others:
    short uses that must not cost answers their room. Memory is only touched, and so only counted, where tokens have
    been stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        copyable: bool = True,
        n_spare: int = 0,
        types: KVTypes = PLAIN,
    ) -> None:
        self.n_blocks, self.copyable, self.n_spare = n_blocks + n_spare, copyable, n_spare
        self.types = types
        n_pages = self.n_blocks * config.n_head_kv
        self.key_layer_bytes = n_pages * types.keys.page_bytes(config.head_dim_k)
        self.value_layer_bytes = n_pages * types.values.page_bytes(config.head_dim_v)
        self._keys = aligned(config.n_layer * self.key_layer_bytes, zero=True)
        self._values = aligned(config.n_layer * self.value_layer_bytes, zero=True)
        # uint8 [n_layer, n_blocks, bytes]
        self.keys = self._keys.reshape(config.n_layer, self.n_blocks, -1)
        self.values = self._values.reshape(config.n_layer, self.n_blocks, -1)
        self._fresh = 0  # blocks from here on were never taken
        self._free: list[int] = []
        self._guests = 0  # blocks that guests hold
        self.lenders: list[
            Callable[[], None]
        ] = []  # to be called where memory is short: who holds blocks and can do without
        self._holders = [0] * self.n_blocks
        self.prefixes = PrefixCache(self)

    @property
    def nbytes(self) -> int:
        """Bytes when full, but for guests."""
        return (self._keys.nbytes + self._values.nbytes) * (self.n_blocks - self.n_spare) // self.n_blocks

    @property
    def n_used(self) -> int:
        """Blocks that somebody holds."""
        return self._fresh - len(self._free)

    @property
    def n_idle(self) -> int:
        """Blocks that only `prefixes` holds; from any thread."""
        return sum(self._holders[block] == 1 for block in list(self.prefixes.blocks))

    def layer(self, index: int) -> tuple[int, int]:
        """Addresses of a layer's keys and values."""
        return (
            self._keys.ctypes.data + index * self.key_layer_bytes,
            self._values.ctypes.data + index * self.value_layer_bytes,
        )

    def take(self, guest: bool = False) -> int:
        """A block for one holder: a free one, or the one that was wanted least lately."""
        most = self.n_spare if guest else self.n_blocks - self.n_spare
        full = self._guests == most if guest else self.n_used - self._guests == most and not self._make_room()
        if full:
            raise ContextLengthError(f"KV cache is full: all {KV_BLOCK * most} tokens are in use; close a sequence")
        self._guests += guest
        if self._free:
            block = self._free.pop()
        else:
            block = self._fresh
            self._fresh += 1
        self._holders[block] = 1
        return block

    def _make_room(self) -> bool:
        if self.prefixes.evict():
            return True
        for give_back in list(self.lenders):
            give_back()
        return self.prefixes.evict() > 0

    def hold(self, block: int) -> int:
        """One holder more; gives the block."""
        self._holders[block] += 1
        return block

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def give(self, blocks: Seq[int], guest: bool = False) -> None:
        """One holder less of each block."""
        self._guests -= guest * len(blocks)
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class Sequence:
    """The tokens of one conversation and where their keys and values are.

    table: int32, the cache block of every KV_BLOCK tokens; its address is stable. guest: it takes spare blocks, and
    shares none.
    """

    def __init__(self, cache: KVCache, n_ctx: int, guest: bool = False) -> None:
        self._cache: KVCache | None = cache
        self._n_ctx, self._guest = n_ctx, guest
        self._blocks: list[int] = []
        self.tokens: list[int] = []
        self.table = np.zeros(-(-n_ctx // KV_BLOCK), np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def adopt(self, ids: Seq[int]) -> int:
        """Take what the cache has of `ids`, which begin with this sequence's tokens; how many tokens it took.

        The last of the ids never, since its logits are not kept.
        """
        cache = self._open()
        assert not self._guest, "guests neither take nor give what others have computed"
        held = len(self.tokens)
        if held % KV_BLOCK:
            return 0
        self.truncate(held)  # room that an interrupted step reserved
        blocks, count = cache.prefixes.find(ids, len(ids) - 1)
        for block in blocks[held // KV_BLOCK :]:
            self._append(cache.hold(block))
        self.tokens.extend(ids[held:count])
        return max(0, count - held)

    def share(self, tail: bool = False) -> None:
        """Let other sequences have the blocks that are full; tail: and the begun one, so that this is the end."""
        assert not self._guest, "guests neither take nor give what others have computed"
        self._open().prefixes.add(self.tokens, self._blocks, tail)

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens: ContextLengthError if they do not fit."""
        cache = self._open()
        wanted = len(self.tokens) + count
        if wanted > self._n_ctx:
            raise ContextLengthError(
                f"{wanted} tokens do not fit the context of {self._n_ctx}; shorten the text or raise n_ctx"
            )
        begun = len(self.tokens) // KV_BLOCK
        if len(self.tokens) % KV_BLOCK and cache.holders(self._blocks[begun]) > 1:  # others read it: write to a copy
            shared, own = self._blocks[begun], cache.take()
            cache.copy(shared, own)
            self._blocks[begun] = self.table[begun] = own
            cache.give([shared])
        while len(self._blocks) * KV_BLOCK < wanted:
            self._append(cache.take(self._guest))

    def _append(self, block: int) -> None:
        self.table[len(self._blocks)] = block
        self._blocks.append(block)

    def _open(self) -> KVCache:
        if self._cache is None:
            raise ClosedError("this sequence is closed; make another with new_sequence()")
        return self._cache

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
            self._cache.give(blocks, self._guest)

    def close(self) -> None:
        """Give the memory back to the cache."""
        self.truncate(0)
        self._cache = None
