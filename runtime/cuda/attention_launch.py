"""How attention is launched: which kernel, its grid, and into how many splits of the context; imports no Numba.

Nothing here depends on positions, so the launches of a step of n_tok tokens are always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...formats.errors import UnsupportedError
from ..cpu.layout import KV_BLOCK

# Head size up to which a kernel is used -> queries that share its pass over the cache; more would spill registers.
SIZES = {64: (1, 4, 8), 128: (1, 4, 8), 256: (1, 4)}
WARPS = 4  # of a block; each takes every fourth cache block of a split
MAX_SPLITS = 256
_BLOCKS = 4  # of a processor: what hides the latency of memory


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer; capped: its scores are."""

    n_head: int
    n_kv: int
    dim_k: int
    dim_v: int
    capped: bool = False


@dataclass(frozen=True)
class AttentionLaunch:
    """A launch of `name` on `grid`; if splits > 1, then of `attention_merge` on `merge_grid`.

    floats: elements that `parts` then needs.
    """

    name: str
    grid: tuple[int, int, int]
    splits: int
    merge_grid: tuple[int, int]
    floats: int


def attention_launch(heads: Heads, n_tok: int, n_ctx: int, processors: int, n_seq: int = 1) -> AttentionLaunch:
    """The launch for n_tok tokens of n_seq sequences whose positions are below n_ctx, on a GPU of so many processors.

    Grid: (n_kv x tiles of a token's heads, tiles of tokens, splits). A split is an equal share of the cache blocks that
    a query sees, whatever its position: with fewer blocks than splits, some are empty and leave a neutral part.
    """
    group = heads.n_head // heads.n_kv
    size, queries = _variant(heads, group if n_tok <= n_seq else 1 << 30)
    x = heads.n_kv * -(-group // queries)
    y = -(-n_tok // max(1, queries // group))
    longest = -(-n_ctx // (KV_BLOCK * WARPS))  # below that, some of a block's warps are idle at any position
    splits = max(1, min(-(-processors * _BLOCKS // (x * y)), longest, MAX_SPLITS))
    floats = n_tok * splits * heads.n_head * (heads.dim_v + 2) if splits > 1 else 0
    name = f"attention:{size}x{queries}" + (":softcap" if heads.capped else "")
    return AttentionLaunch(name, (x, y, splits), splits, (heads.n_head, n_tok), floats)


def part_floats(heads: Heads, max_tokens: int, n_ctx: int, processors: int) -> int:
    """Elements of a `parts` buffer that serves every launch of up to max_tokens tokens, at least 1."""
    launches = (
        attention_launch(heads, n, n_ctx, processors, n_seq) for n in range(1, max_tokens + 1) for n_seq in (1, n)
    )
    return max(1, *(launch.floats for launch in launches))


def _variant(heads: Heads, wanted: int) -> tuple[int, int]:
    """Head size of the kernel, and the fewest queries that are as many as wanted."""
    largest = max(heads.dim_k, heads.dim_v)
    for size, choices in SIZES.items():
        if largest <= size:
            return size, next((queries for queries in choices if queries >= wanted), choices[-1])
    raise UnsupportedError(f"attention on the GPU: got heads of size {largest}, wanted at most {max(SIZES)}")
