"""A decoder's forward pass in plain PyTorch, for training: the pieces of a block, and the whole on windows of text."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from ..runtime.rope_table import RopeTable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        took[dtype] = min(_seconds(a, b) for _ in range(5))
    return min(took, key=lambda dtype: took[dtype])


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


class TorchModel:
    """The weights of a model and its forward pass on windows of equal length.

    Residuals and norms are float32; matrices are `dtype`, and so is what meets them. Weights are frozen; a
    caller that trains gives its own FFN matrices. Source of the formulas: as runtime.decoder's graph.
    """

    def __init__(
        self, file: GGUFFile, config: ModelConfig, n_ctx: int, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.weights: dict[str, Tensor] = {}
        for name, info in file.tensors.items():
            value = torch.from_numpy(file.dequantized(name))
            self.weights[name] = value.to(device, dtype if len(info.shape) == 2 else None)
        factors = file.dequantized("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
        rope = RopeTable(config, n_ctx, factors)
        rope.upto(n_ctx)
        table = torch.from_numpy(rope.table).to(device, dtype)
        self.cos, self.sin = table.chunk(2, dim=1)
        self.masks = {window: _mask(n_ctx, window, dtype).to(device) for window in set(config.windows)}

    def embed(self, ids: Tensor) -> Tensor:
        """Residual float32 [..., n_embd] of token ids int64 [...]."""
        return F.embedding(ids, self.weights["token_embd.weight"]).float()

    def attention(self, layer: int, x: Tensor) -> Tensor:
        """What the layer's attention adds to the residual x [n_windows, n_tokens, n_embd]."""
        c = self.config
        n_windows, n_tokens, _ = x.shape
        q, k, v = self._heads(layer, x, 0)
        k, v = (t.repeat_interleave(c.n_head // c.n_head_kv, dim=1) for t in (k, v))
        # On CPUs, bfloat16 products and a softmax are three times as fast, both ways, as PyTorch's fused attention.
        mask = self.masks[c.windows[layer]][:n_tokens, :n_tokens].expand(n_windows * c.n_head, -1, -1)
        scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=c.attn_scale)
        out = torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(n_windows, c.n_head, n_tokens, -1)
        return self._linear(f"blk.{layer}.attn_output", out.transpose(1, 2).flatten(2)).float()

    def attention_step(self, layer: int, x: Tensor, keys: Tensor, values: Tensor, at: int) -> Tensor:
        """As attention, for the one token at position `at`; keys and values [n_windows, n_head_kv, n_ctx, dim] grow."""
        c = self.config
        q, k, v = self._heads(layer, x, at)
        keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
        seen = slice(max(0, at + 1 - (c.windows[layer] or at + 1)), at + 1)
        grouped = q.view(len(x), c.n_head_kv, c.n_head // c.n_head_kv, -1)
        scores = grouped @ keys[:, :, seen].transpose(2, 3) * c.attn_scale
        out = scores.softmax(-1) @ values[:, :, seen]
        return self._linear(f"blk.{layer}.attn_output", out.reshape(len(x), 1, -1)).float()

    def ffn(self, layer: int, x: Tensor) -> Tensor:
        """What the layer's FFN adds to the residual x, with the model's own weights and activation."""
        gate, up, down = (self.weights[f"blk.{layer}.ffn_{part}.weight"] for part in ("gate", "up", "down"))
        f = self.norm(f"blk.{layer}.ffn_norm", x)
        act = ACTIVATIONS[self.config.activation]
        return F.linear(act(F.linear(f, gate)) * F.linear(f, up), down).float()

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm of x by the named weight, as `dtype`."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return (x * scale * self.weights[f"{name}.weight"]).to(self.dtype)

    def head(self) -> Tensor:
        """The output matrix [n_vocab, n_embd]."""
        return self.weights["token_embd.weight" if self.config.tied_output else "output.weight"]

    def forward(self, ids: Tensor) -> Tensor:
        """Normed final residual `dtype` [n_windows, n_tokens, n_embd] of ids int64 [n_windows, n_tokens]."""
        x = self.embed(ids)
        for layer in range(self.config.n_layer):
            x = x + self.attention(layer, x)
            x = x + self.ffn(layer, x)
        return self.norm("output_norm", x)

    def nll(self, normed: Tensor, ids: Tensor) -> np.ndarray:
        """Negative log-likelihoods (nats, float64) of the second half of each window, as `hotcold perplexity`."""
        first = ids.shape[1] // 2
        rows = [
            F.cross_entropy(F.linear(y[first:-1], self.head()).float(), window[first + 1 :], reduction="none")
            for y, window in zip(normed, ids, strict=True)
        ]
        return torch.cat(rows).double().cpu().numpy()

    def _heads(self, layer: int, x: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n_windows, n_heads, n_tokens, dim] of positions from `at` on."""
        c = self.config
        a = self.norm(f"blk.{layer}.attn_norm", x)
        q, k, v = (
            self._linear(f"blk.{layer}.attn_{part}", a).view(*x.shape[:2], n, -1).transpose(1, 2)
            for part, n in (("q", c.n_head), ("k", c.n_head_kv), ("v", c.n_head_kv))
        )
        q, k = (self._head_norm(f"blk.{layer}.attn_{part}_norm", x) for part, x in (("q", q), ("k", k)))
        return self._rope(q, at), self._rope(k, at), v

    def _head_norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm of each head, where the model has one."""
        return self.norm(name, x.float()) if f"{name}.weight" in self.weights else x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return F.linear(x, self.weights[f"{name}.weight"], None if bias is None else bias.to(x.dtype))

    def _rope(self, x: Tensor, at: int) -> Tensor:
        """Rotate the first rope_dim values of each head; x [n_windows, n_heads, n_tokens, head_dim]."""
        n, half = self.config.rope_dim, self.config.rope_dim // 2
        cos, sin = self.cos[at : at + x.shape[2]], self.sin[at : at + x.shape[2]]
        if self.config.rope_style == "neox":
            a, b = x[..., :half], x[..., half:n]
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        else:
            a, b = x[..., 0:n:2], x[..., 1:n:2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return turned if n == x.shape[-1] else torch.cat([turned, x[..., n:]], dim=-1)


def _mask(n_ctx: int, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a query (row) and a key: 0, or -inf where it does not see it; [n_ctx, n_ctx]."""
    distance = torch.arange(n_ctx)[:, None] - torch.arange(n_ctx)[None, :]
    hidden = (distance < 0) | (distance >= (window or n_ctx))
    return torch.zeros(n_ctx, n_ctx, dtype=dtype).masked_fill(hidden, float("-inf"))
