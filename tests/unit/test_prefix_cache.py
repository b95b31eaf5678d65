"""KV blocks, sequences and the tree of beginnings against a plain model: whose bytes are where, who may write.

A token's keys are made of all tokens up to it: so a block that holds another beginning's bytes is seen at once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hotcold.formats.errors import ClosedError, ContextLengthError
from hotcold.runtime import prefix_cache
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.kv_cache import KVCache, Sequence
from hotcold.runtime.prefix_cache import common

CONFIG: Any = SimpleNamespace(n_head_kv=1, head_dim_k=2, head_dim_v=2, n_layer=2)
N_CTX, N_SEQUENCES, N_SPARE = 5 * KV_BLOCK + 7, 3, 3
WHICH = st.integers(0, N_SEQUENCES - 1)
PER_SEQUENCE = -(-N_CTX // KV_BLOCK) + 1


def mark(tokens: list[int]) -> int:
    """Four bytes that tell a token with all that came before it from others."""
    return hash(tuple(tokens)) & 0x7FFFFFFF


def keys(cache: KVCache) -> np.ndarray:
    """int32 [n_layer, n_blocks, KV_BLOCK]: a token has four bytes in each layer."""
    return cache.keys.view(np.int32)


def write(cache: KVCache, sequence: Sequence, ids: list[int]) -> None:
    """What the engine does: reserve, store, note."""
    sequence.reserve(len(ids))
    for slot, token in zip(sequence.slots(len(sequence), len(ids)), ids, strict=True):
        assert cache.holders(slot // KV_BLOCK) == 1, "written while somebody else holds it"
        sequence.tokens.append(token)
        keys(cache)[:, slot // KV_BLOCK, slot % KV_BLOCK] = mark(sequence.tokens)
        cache.values.view(np.int32)[:, slot // KV_BLOCK, slot % KV_BLOCK] = mark(sequence.tokens)


def check_bytes(cache: KVCache, tokens: list[int], blocks: list[int]) -> None:
    for i in range(len(tokens)):
        block = blocks[i // KV_BLOCK]
        for array in (keys(cache), cache.values.view(np.int32)):
            assert (array[:, block, i % KV_BLOCK] == mark(tokens[: i + 1])).all()


# Texts that part company in the first, the second and at the end of the third block
BOOKS = [[1] * 20 + [2] * 300, [1] * 45 + [3] * 300, [1] * 96 + [4] * 300, [1] * 320]
LENGTHS = st.sampled_from([1, 3, 19, 20, 21, 31, 32, 33, 45, 46, 64, 70, 96, 97, 128, N_CTX, N_CTX + 1])


class Machine(RuleBasedStateMachine):
    """Any order of what the scheduler, the engine and guests do."""

    copyable = True

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(CONFIG, N_SEQUENCES * PER_SEQUENCE, copyable=self.copyable, n_spare=N_SPARE)
        self.open = [Sequence(self.cache, N_CTX) for _ in range(N_SEQUENCES)]
        self.held: list[list[int]] = [[] for _ in range(N_SEQUENCES)]  # what each sequence must hold
        self.guests: list[Sequence] = []
        self.shared: list[list[int]] = []  # what was ever shared

    def reopen(self, i: int) -> None:
        self.open[i], self.held[i] = Sequence(self.cache, N_CTX), []

    @rule(i=WHICH, book=st.sampled_from(BOOKS), n=LENGTHS)
    def adopt(self, i: int, book: list[int], n: int) -> None:
        sequence, held = self.open[i], self.held[i]
        wanted = (book[:n] if book[: len(held)] == held else held + book)[:N_CTX]
        if len(wanted) < len(held):
            return
        took = sequence.adopt(wanted)
        assert sequence.tokens == wanted[: len(held) + took] and took >= 0
        assert len(sequence) <= max(len(held), len(wanted) - 1)
        if took:
            known = max(common(shared, wanted) for shared in self.shared)
            assert len(sequence) <= known and (self.copyable or len(sequence) % KV_BLOCK == 0)
        self.held[i] = list(sequence.tokens)

    @rule(i=WHICH, book=st.sampled_from(BOOKS), n=LENGTHS)
    def compute(self, i: int, book: list[int], n: int) -> None:
        ids = book[len(self.held[i]) :][:n]
        if not ids:
            return
        if len(self.held[i]) + len(ids) > N_CTX:
            with pytest.raises(ContextLengthError):
                self.open[i].reserve(len(ids))
            return
        write(self.cache, self.open[i], ids)  # there is room for N_SEQUENCES, whatever was shared
        self.held[i] += ids

    @rule(i=WHICH, book=st.sampled_from(BOOKS), n=LENGTHS, more=LENGTHS, tail=st.booleans())
    def ask(self, i: int, book: list[int], n: int, more: int, tail: bool) -> None:
        """What the scheduler does with a question."""
        self.end(i, tail)
        self.adopt(i, book, n)
        self.compute(i, book, max(0, min(n, N_CTX) - len(self.held[i])))
        self.share(i)
        self.compute(i, book[::-1], more)

    @rule(i=WHICH, n=LENGTHS)
    def reserve_for_nothing(self, i: int, n: int) -> None:
        """Ctrl-C before the step."""
        self.open[i].reserve(min(n, N_CTX - len(self.held[i])))

    @rule(i=WHICH, n=LENGTHS)
    def truncate(self, i: int, n: int) -> None:
        n = n if self.copyable else n // KV_BLOCK * KV_BLOCK  # as the scheduler does
        self.open[i].truncate(n)
        del self.held[i][n:]

    @rule(i=WHICH)
    def share(self, i: int) -> None:
        self.open[i].share()
        self.shared.append(self.held[i][: len(self.held[i]) // KV_BLOCK * KV_BLOCK])

    @rule(i=WHICH, tail=st.booleans())
    def end(self, i: int, tail: bool) -> None:
        self.open[i].share(tail=tail)
        self.shared.append(self.held[i])
        self.open[i].close()
        self.reopen(i)

    @rule(n=st.integers(1, N_SPARE * KV_BLOCK))
    def guest(self, n: int) -> None:
        self.guests.append(Sequence(self.cache, N_CTX, guest=True))
        used = sum(len(guest._blocks) for guest in self.guests)
        if used + -(-n // KV_BLOCK) > N_SPARE:
            with pytest.raises(ContextLengthError, match="full"):
                self.guests[-1].reserve(n)
            self.guests.pop().close()
        else:
            write(self.cache, self.guests[-1], [n] * n)

    @rule()
    def guests_leave(self) -> None:
        for guest in self.guests:
            check_bytes(self.cache, guest.tokens, guest._blocks)
            guest.close()
        self.guests.clear()

    @rule(forget=st.sampled_from([False] * 4 + [True]))
    def evict(self, forget: bool) -> None:
        if forget:
            self.cache.prefixes.clear()
            assert not self.cache.prefixes.blocks
            return
        before = {node.block: len(node.children) for node in self.cache.prefixes.nodes()}
        holders = {block: self.cache.holders(block) for block in before}
        idle = [block for block, n in holders.items() if n == 1]
        leaves = [block for block in idle if not before[block]]
        gone = self.cache.prefixes.evict()
        left = self.cache.prefixes.blocks
        assert (gone > 0) == bool(idle)
        if leaves:
            assert all(holders[block] == 1 for block in before.keys() - left), "only what nobody else needs"
            assert gone == len(before) - len(left) <= -(-len(idle) // prefix_cache.SHARE)

    @invariant()
    def everybody_has_their_own_bytes(self) -> None:
        for sequence, held in zip(self.open, self.held, strict=True):
            assert sequence.tokens == held
            check_bytes(self.cache, held, sequence._blocks)
            assert sequence.table[: len(sequence._blocks)].tolist() == sequence._blocks

    @invariant()
    def the_tree_is_right(self) -> None:
        nodes = list(self.cache.prefixes.nodes())
        assert {node.block for node in nodes} == self.cache.prefixes.blocks and len(nodes) == len(
            self.cache.prefixes.blocks
        )
        for node in nodes:
            path, up = [], node
            while up.parent is not None:
                path.insert(0, up)
                up = up.parent
            tokens = [token for one in path for token in one.tokens]
            assert all(len(one.tokens) == KV_BLOCK for one in path[:-1])
            assert self.copyable or len(node.tokens) == KV_BLOCK
            check_bytes(self.cache, tokens, [one.block for one in path])
            assert node.parent is not None and node.used <= (node.parent.used or node.used)
            assert node.keys == sorted(node.children)
            for a, b in zip(node.keys, node.keys[1:], strict=False):
                assert b[: len(a)] != a, "one begins another"

    @invariant()
    def holders_add_up(self) -> None:
        wanted = [0] * self.cache.n_blocks
        for sequence in (*self.open, *self.guests):
            for block in sequence._blocks:
                wanted[block] += 1
        for block in self.cache.prefixes.blocks:
            wanted[block] += 1
        assert [self.cache.holders(block) for block in range(self.cache.n_blocks)] == wanted
        assert self.cache.n_used == sum(n > 0 for n in wanted)
        alone = sum(self.cache.holders(block) == 1 for block in self.cache.prefixes.blocks)
        assert self.cache.n_idle == alone

    def teardown(self) -> None:
        for sequence in (*self.open, *self.guests):
            sequence.close()
            with pytest.raises(ClosedError):
                sequence.reserve(1)
        self.open, self.held, self.guests = [], [], []
        self.holders_add_up()
        self.cache.prefixes.clear()
        assert self.cache.n_used == 0


class WithGPU(Machine):
    """Blocks cannot be copied, so none is shared in part."""

    copyable = False


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
WithGPU.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestCopyable = Machine.TestCase
TestWithGPU = WithGPU.TestCase


def filled(cache: KVCache, ids: list[int]) -> Sequence:
    sequence = Sequence(cache, N_CTX)
    write(cache, sequence, ids)
    return sequence


def test_an_answers_end_is_found_by_the_next_turn() -> None:
    cache = KVCache(CONFIG, 20)
    first = filled(cache, list(range(50)))
    first.share(tail=True)
    first.close()
    second = Sequence(cache, N_CTX)
    assert second.adopt([*range(50), 7, 7]) == 50
    blocks = list(second._blocks)
    write(cache, second, [7, 7])
    assert second._blocks[0] == blocks[0] and second._blocks[1] != blocks[1], "the begun one was copied"
    check_bytes(cache, [*range(50), 7, 7], second._blocks)
    other = Sequence(cache, N_CTX)
    assert other.adopt([*range(45), 9]) == 45 and other.adopt([*range(45), 9, 9]) == 0
    assert Sequence(cache, N_CTX).adopt(list(range(50))) == 49, "never the last: its logits are not kept"


def test_what_a_step_reserved_for_nothing_is_not_in_the_way() -> None:
    """An interrupted step leaves room reserved, and meanwhile somebody else computes the same."""
    cache = KVCache(CONFIG, 20)
    stopped = Sequence(cache, N_CTX)
    stopped.reserve(70)
    other = filled(cache, list(range(80)))
    other.share()
    assert stopped.adopt(list(range(100))) == 64
    check_bytes(cache, list(range(64)), stopped._blocks)
    write(cache, stopped, list(range(64, 100)))
    check_bytes(cache, list(range(100)), stopped._blocks)


def test_wanted_least_lately_goes_first() -> None:
    cache = KVCache(CONFIG, 8)
    for i in range(8):
        one = filled(cache, [i] * KV_BLOCK)
        one.share()
        one.close()
    assert Sequence(cache, N_CTX).adopt([0] * 40) == KV_BLOCK
    kept = set(cache.prefixes.blocks)
    last = filled(cache, [9] * KV_BLOCK)
    assert kept - cache.prefixes.blocks == {1} == set(last._blocks)


def test_beginnings_that_others_computed_too_do_not_hold_memory() -> None:
    """Who runs has computed a beginning itself, and its blocks go on from another's in the tree."""
    cache = KVCache(CONFIG, 6)
    first, second = filled(cache, [1] * 64), filled(cache, [1] * 64)
    first.share()
    first.close()
    write(cache, second, [2] * KV_BLOCK)
    second.share()
    assert cache.n_used == 5
    third = filled(cache, [3] * 96)  # more than what is free: the first's two blocks are wanted
    check_bytes(cache, [3] * 96, third._blocks)
    check_bytes(cache, [1] * 64 + [2] * KV_BLOCK, second._blocks)
    second.close()
    third.close()
    assert cache.n_used == len(cache.prefixes.blocks) == 0


def test_finding_in_part_takes_the_longest_agreement() -> None:
    cache = KVCache(CONFIG, 40)
    rng = np.random.default_rng(1)
    told = [[7, *rng.integers(0, 3, KV_BLOCK - 1).tolist()] for _ in range(30)]
    for ids in told:
        one = filled(cache, ids)
        one.share()
        one.close()
    for _ in range(200):
        ids = [7, *rng.integers(0, 3, KV_BLOCK - 1).tolist(), 1]
        assert cache.prefixes.find(ids, KV_BLOCK)[1] == max(common(ids, other) for other in told)
