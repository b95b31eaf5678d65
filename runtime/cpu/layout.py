"""Sizes and argument records that kernels and the Python side share; imports no Numba.

Activations reach a product with bands (band_vectors.py) *packed* in blocks (xb), whatever the number of tokens: for
each BAND_TILE of them [k / 32][tokens]; a block has 32 int8 quants, their float32 scale, float32 scaled sum, and int32
negated sums of the first and the last 16 quants. They reach other matmuls in one of two ways, rows in steps of fewer
than Step.tile_min tokens:

rows   for each token: int8 quants [k] (xq), float32 scales [k / 32] (xd), scaled quant sums by 16 weights [k / 16] (xn)
       and by 32 [k / 32] (xs); and for kernels of single rows, for every 4 weights one lane of float32 scale (ld), of
       int32 negated quant sum (ln) and of float32 scaled quant sum (ls).
panels for each TOKENS tokens: quants [k / 4][TOKENS][4], scales [k / 32][TOKENS], sums [k / 16][TOKENS] and
       [k / 32][TOKENS].

Float weights take float32 activations (xf): [k] a token, or [k][TOKENS] a panel.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any


def record(name: str, fields: str) -> Any:
    """A named tuple of byte offsets of int64 slots: `record("Step", "n_tok ids")` is (n_tok=0, ids=8)."""
    names = fields.split()
    return namedtuple(name, names)(*range(0, 8 * len(names), 8))


def arguments(name: str, fields: str) -> Any:
    """An op's argument record: its chunk counter, the address of its segment's count of finished chunks, its fields."""
    return record(name, f"counter done {fields}")


# What a step tells the kernels: token counts, and addresses of int32 arrays with one entry a token.
# tiles: int32 rows (first token, tokens, sequence) for attention; tables: int64 addresses of block tables.
# tile_min: a step of fewer tokens (or outputs) is computed by rows: TILE_MIN, or what makes it so for all or for none.
Step = record("Step", "n_tok n_out ids positions tiles n_tiles tables out_rows slots tile_min")
# A row of the tape. It is skipped unless the int64 at address `when` (if not 0) is `want`; ticks: time spent so far.
Row = record("Row", "kernel args barrier when want ticks")
# What a layer's selection says: whether the step is sparse (1) or dense (0), and how many neurons are in its list; then
# sums over all steps so far: active (token, neuron) pairs, tokens, sparse steps, neurons in their lists, dense steps.
Choice = record("Choice", "sparse count active tokens sparse_steps listed dense_steps unused")

# The same of a layer's routing: experts with pairs of a token and one of them, and positions of those pairs, a whole
# number of panels for each expert where tokens are many; then sums over all steps: tokens, pairs, experts with pairs.
Routing = record("Routing", "experts positions tokens pairs read unused1 unused2 unused3")
Item = record("Item", "expert first count")  # an expert with pairs, and their positions

TILE_MIN = 8  # tokens from which on a step is tiled, if nobody says; also the bound of lists of neurons
ROWS_MAX = 32  # most tokens of a step by rows
PANEL_TOKENS = 8  # capacity of buffers is a multiple of this
PANEL_ROWS = 16  # most weight rows in a register tile
PEAK_TILE = {64: 12, 32: 8}  # by vector width, accumulators of the measurement of the dot-product unit
PEAK_BYTES = 4096  # that it multiplies, over and over
KV_BLOCK = 32  # tokens in a block of the KV cache
BAND_TILE = 32  # tokens that share a reading of a band
BLOCK_BYTES = 48  # of 32 activations, packed in blocks
REGION_CHUNKS = 65535  # most chunks of a thread's region
KV_SPAN = 8  # blocks whose positions share one softmax; those of spans are merged, in order
KV_PART = 4  # spans that are merged with each other first, and that a thread takes at a time
SPLIT_TILES = 64  # most tiles of a step whose parts are computed apart
QUERY_ROWS = 48  # most queries, of tokens and heads, that share one pass over a span

ARRAYS = tuple("xq xd xn xs ld ln ls xf".split())  # of a value packed in rows or panels
_ARRAYS = " ".join(ARRAYS)
_PACKED = f"{_ARRAYS} xb quantised floats"
MatMul = arguments(
    "MatMul",
    f"w out bias k n row_bytes out_stride count add {_ARRAYS} chunk panels scratch scratch_bytes routing items pairs",
)
Bands = arguments(
    "Bands", "w out bias k n band_bytes out_stride count add xb chunk large regions claims scratch scratch_bytes"
)
Weave = arguments("Weave", "w out k n scratch scratch_bytes")
Pack = arguments("Pack", f"src second k stride count segment threshold scores cut choice routing pairs {_PACKED}")
Route = arguments("Route", "src n n_used weights_norm here heat routing items pairs slots weights spare")
Combine = arguments("Combine", "src out n n_used segment add slots weights")
Select = arguments("Select", "src n low high top cut list picked choice limit")
Rows = arguments("Rows", f"w out bias k row_bytes out_stride list choice parts ahead gates threshold {_ARRAYS}")
Down = arguments("Down", "w out h h_stride n row_bytes list choice parts ahead scratch scratch_bytes")
AddParts = arguments("AddParts", "sums out bias add n parts")
Norm = arguments(
    "Norm", f"src weight bias n_weight k group eps gain rows count out add scratch scratch_bytes {_PACKED}"
)
Embed = arguments("Embed", "w out k row_bytes gain at add scratch scratch_bytes")
Rope = arguments(
    "Rope", "q k v n_head n_kv dim_k dim_v rope_dim table keys values key_type value_type key_bytes value_bytes"
)
Read = arguments("Read", "src size parts sums")
Transpose = arguments("Transpose", "w out k n row_bytes scratch scratch_bytes")
Attention = arguments(
    "Attention",
    "q out n_head n_kv dim_k dim_v keys values key_bytes value_bytes scale softcap window parts n_parts counts "
    "regions claims scratch scratch_bytes",
)


def packed_bytes(k: int, tokens: int, quantised: bool, rows: int = ROWS_MAX) -> dict[str, int]:
    """Bytes of each array but xb, for up to `tokens` tokens of k activations (k a multiple of 32 if quantised).

    rows: the most tokens that are packed as rows.
    """
    tokens = -(-tokens // PANEL_TOKENS) * PANEL_TOKENS
    if not quantised:
        return {"xf": tokens * k * 4}
    lanes = min(tokens, rows) * k
    return {
        "xq": tokens * k,
        "xd": tokens * k // 8,
        "xn": tokens * k // 4,
        "xs": tokens * k // 8,
        "ld": lanes,
        "ln": lanes,
        "ls": lanes,
    }


def panel_bytes(k: int, group: int) -> int:
    """Scratch bytes of one unpacked panel of PANEL_ROWS weight rows; group 0 means float weights."""
    if group == 0:
        return PANEL_ROWS * k * 4
    return PANEL_ROWS * (k + 8 * (k // group))


def query_tile(group: int) -> int:
    """Query tokens that share one pass over the KV cache, where `group` heads share its keys and values."""
    return max(1, QUERY_ROWS // group)


def part_bytes(dim_v: int) -> int:
    """Bytes of what attention knows of one query over one span: its output, in whole vectors, maximum and sum."""
    return (-(-dim_v // 32) * 32 + 16) * 4


def attention_bytes(dim_k: int, dim_v: int) -> int:
    """Scratch bytes of a thread in attention; attention.py says what for."""
    panels = -(-dim_k // 16) * 64 + -(-dim_k // 32) * 8
    each = 8 + panels + KV_SPAN * KV_BLOCK * 4 + 3 * part_bytes(dim_v)
    return QUERY_ROWS * each + KV_BLOCK * max(dim_k, dim_v) * 4 + 2048
