"""Beginnings that were computed before: a tree of KV blocks by their tokens, shared by all sequences.

As in vLLM's and SGLang's caches (Kwon et al. 2023, arXiv:2309.06180; Zheng et al. 2024, arXiv:2312.07104): what is
wanted least lately goes first, leaves before what they go on from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .cpu.layout import KV_BLOCK

if TYPE_CHECKING:
    from .kv_cache import KVCache

SHARE = 16  # of the blocks that nobody needs, one in so many goes at once: finding them costs a walk over all


class Node:
    """A block and the tokens in it (fewer than KV_BLOCK: a leaf that a sequence ended in).

    children: by their tokens, none of which begin others'. keys: those, in order.
    """

    __slots__ = ("parent", "tokens", "block", "children", "keys", "used")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], block: int) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.children: dict[tuple[int, ...], Node] = {}
        self.keys: list[tuple[int, ...]] = []
        self.used = 0

    def near(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The children's tokens right before and after these: nobody's have more in common with them."""
        at = bisect_left(self.keys, tokens)
        return self.keys[max(0, at - 1) : at + 1]


class PrefixCache:
    """A holder of blocks of a KVCache, by the tokens that lead to them; `blocks` are those."""

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
            rest = tuple(ids[at : min(at + KV_BLOCK, limit)])
            best = max(node.near(rest), key=lambda tokens: common(tokens, rest), default=())
            if n := common(best, rest):
                node.children[best].used = self._clock
                blocks.append(node.children[best].block)
                at += n
        return blocks, at

    def add(self, tokens: Sequence[int], blocks: Sequence[int], tail: bool) -> None:
        """Learn a sequence's full blocks; tail: and its begun one, to which nobody may append any more."""
        self._clock += 1
        node = self.root
        for i, block in enumerate(blocks[: -(-len(tokens) // KV_BLOCK)]):
            own = tuple(tokens[i * KV_BLOCK : (i + 1) * KV_BLOCK])
            if len(own) < KV_BLOCK and not (tail and self._cache.copyable):
                return
            child = node.children.get(own)
            if child is None:
                near = node.near(own)
                if any(key[: len(own)] == own for key in near):  # begun, and known with more
                    return
                for key in near:
                    if key == own[: len(key)]:  # begun, now with more
                        self._drop(node.children[key])
                child = node.children[own] = Node(node, own, self._cache.hold(block))
                node.keys.insert(bisect_left(node.keys, own), own)
                self.blocks.add(block)
            child.used = self._clock
            node = child

    def evict(self) -> int:
        """Let go what was wanted least lately, a share of the blocks that nobody else holds; how many."""
        idle = [node for node in self.nodes() if self._cache.holders(node.block) == 1]
        # nobody is used later than who it goes on from: so, the last of a path first
        idle.reverse()
        idle.sort(key=lambda node: node.used)
        wanted, gone = -(-len(idle) // SHARE), 0
        for node in idle:
            if gone < wanted and not node.children:
                self._drop(node)
                gone += 1
        if not gone and idle:  # what goes on from them is held by others, who computed the beginning themselves
            for node in [*self.nodes(idle[0])][::-1]:
                gone += self._cache.holders(node.block) == 1
                self._drop(node)
            gone += 1
            self._drop(idle[0])
        return gone

    def clear(self) -> None:
        """Forget everything."""
        for node in [*self.nodes()][::-1]:
            self._drop(node)

    def nodes(self, under: Node | None = None) -> Iterator[Node]:
        """All nodes, or those under one; parents first."""
        waiting = list((under or self.root).children.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            yield node

    def _drop(self, node: Node) -> None:
        assert not node.children and node.parent is not None
        del node.parent.children[node.tokens]
        del node.parent.keys[bisect_left(node.parent.keys, node.tokens)]
        self.blocks.discard(node.block)
        self._cache.give([node.block])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
