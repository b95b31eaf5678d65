"""How much of a GPU's memory a model takes beside its weights; imports no Numba, so that any machine can plan."""

from __future__ import annotations

from ..formats.config import ModelConfig
from .cpu.layout import KV_BLOCK
from .cuda.attention_launch import Heads, part_floats

CONTEXT_BYTES = 640 << 20  # a CUDA context and its kernels take 400 to 600 MB with current drivers
MAX_SEQUENCES = 64  # in one step
STEP_FIELDS = 4  # int32 a token that a step tells its kernels


def kv_bytes(config: ModelConfig, n_ctx: int) -> int:
    """A layer's KV cache for n_ctx tokens, float16, and the block to spare that the engine keeps."""
    blocks = -(-(n_ctx + KV_BLOCK) // KV_BLOCK)
    return blocks * KV_BLOCK * config.n_head_kv * (config.head_dim_k + config.head_dim_v) * 2


def work_bytes(
    config: ModelConfig,
    n_ctx: int,
    max_tokens: int,
    max_outputs: int,
    ranks: tuple[int, ...] = (),
    processors: int = 132,
) -> int:
    """Values between kernels, tables and scratch: what is allocated where something of every kind is on the GPU.

    ranks: of the predictors. processors: of the GPU.
    """
    c = config
    heads = Heads(c.n_head, c.n_head_kv, c.head_dim_k, c.head_dim_v, c.attn_softcap > 0)
    row = 4 * c.n_embd + c.n_ff  # x, a, f, base, h
    row += (c.n_head + c.n_head_kv) * (c.head_dim_k + c.head_dim_v)  # q, k, v, att
    if c.has("post_attention_norm.weight") or c.has("post_ffw_norm.weight"):
        row += c.n_embd  # o
    if ranks:
        row += c.n_ff + sum(set(ranks))  # scores, and r of each width
    row += 2 * c.n_expert  # router, scores
    floats = max_tokens * row + max_outputs * (c.n_vocab + c.n_embd)
    floats += part_floats(heads, max_tokens, n_ctx, processors) + down_floats(c, max_tokens)
    floats += n_ctx * c.rope_dim * (2 if c.local_base else 1) + 2 * c.n_layer + 2
    tables = MAX_SEQUENCES * -(-n_ctx // KV_BLOCK)
    return 4 * (floats + (STEP_FIELDS + 1) * max_tokens + tables)


def down_floats(config: ModelConfig, max_tokens: int) -> int:
    """Elements that the parts of a down projection take: never more than 256 rows, or one a token."""
    return max(256, max_tokens) * config.n_embd
