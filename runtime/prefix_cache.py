"""Beginnings that were computed before: a tree of KV blocks by their tokens, shared by all sequences.

As in vLLM's and SGLang's caches (Kwon et al. 2023, arXiv:2309.06180; Zheng et al. 2024, arXiv:2312.07104): what is
wanted least lately goes first, leaves before what they go on from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .cpu.layout import KV_BLOCK

if TYPE_CHECKING:
    from .kv_cache import KVCache


class Node:
    """A block and the tokens in it (fewer than KV_BLOCK: a leaf that a sequence ended in)."""

    __slots__ = ("parent", "tokens", "block", "children", "used")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], block: int) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.children: dict[tuple[int, ...], Node] = {}
        self.used = 0


class PrefixCache:
    """A holder of blocks of a KVCache, by the tokens that lead to them."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.root = Node(None, (), -1)
        self._clock = 0
        self.blocks: set[int] = set()

    def find(self, ids: Sequence[int], limit: int) -> tuple[list[int], int]:
        """The blocks of the longest beginning of ids[:limit] that is known, and its tokens.

        The last block may be known in part: who appends to it has to copy it first.
        """
        self._clock += 1
        node, blocks, at = self.root, [], 0
        while at + KV_BLOCK <= limit:
            child = node.children.get(tuple(ids[at : at + KV_BLOCK]))
            if child is None:
                break
            child.used = self._clock
            blocks.append(child.block)
            node, at = child, at + KV_BLOCK
        if self._cache.copyable:
            rest = ids[at : min(at + KV_BLOCK, limit)]
            best = max(node.children.values(), key=lambda child: common(child.tokens, rest), default=None)
            if best is not None and (n := common(best.tokens, rest)):
                best.used = self._clock
                blocks.append(best.block)
                at += n
        return blocks, at

    def add(self, tokens: Sequence[int], blocks: Sequence[int], tail: bool) -> None:
        """Learn a sequence's full blocks; tail: and its begun one, to which nobody may append any more."""
        self._clock += 1
        node = self.root
        for i, block in enumerate(blocks):
            own = tuple(tokens[i * KV_BLOCK : (i + 1) * KV_BLOCK])
            if len(own) < KV_BLOCK and not (tail and own and self._cache.copyable):
                return
            child = node.children.get(own)
            if child is None:
                if len(own) < KV_BLOCK and any(key[: len(own)] == own for key in node.children):
                    return
                for key in [key for key in node.children if key == own[: len(key)]]:  # begun ones, now full
                    self._drop(node.children[key])
                child = node.children[own] = Node(node, own, self._cache.hold(block))
                self.blocks.add(block)
            child.used = self._clock
            node = child

    def evict(self) -> int:
        """Let go the blocks wanted least lately, a quarter of those that nobody else needs; how many."""
        leaves = [n for n in self.nodes() if not n.children and self._cache.holders(n.block) == 1]
        leaves.sort(key=lambda node: node.used)
        gone = leaves[: (len(leaves) + 3) // 4]
        for node in gone:
            self._drop(node)
        return len(gone)

    def clear(self) -> None:
        """Forget everything."""
        for node in self.nodes():
            self._cache.give([node.block])
        self.root.children.clear()
        self.blocks.clear()

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            yield node

    def _drop(self, node: Node) -> None:
        assert not node.children and node.parent is not None
        del node.parent.children[node.tokens]
        self.blocks.discard(node.block)
        self._cache.give([node.block])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
