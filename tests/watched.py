"""An engine that shows FFNs whose values are plain functions of the tokens: for what watches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import fakes
import numpy as np


class WatchedEngine:
    """observe() shows seeded normal values, the same for the same token and layer; scale: of the gates, by layer."""

    def __init__(self, n_layer: int = 3, n_embd: int = 8, n_ff: int = 40, activation: str = "silu") -> None:
        sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_ff": n_ff, "activation_floors": (0.0,) * n_layer}
        self.config = SimpleNamespace(**sizes, activation=activation)
        self.config.has = lambda tensor: False
        self.file = None
        self.n_ctx = 64
        self.open = 0

    def new_sequence(self) -> fakes.FakeSequence:
        return fakes.FakeSequence()

    def values(self, token: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(x, f [n_embd], gate, up [n_ff]) of a token, float32."""
        c, rng = self.config, np.random.default_rng([token, layer])
        offset = np.linspace(-1, 1, c.n_ff)  # so that some neurons are busier than others
        x, gate, up = rng.normal(0, 1, c.n_embd), rng.normal(offset, 1 + layer), rng.normal(0, 1, c.n_ff)
        draws = x, 3 * x[::-1], gate, up
        return tuple(d.astype(np.float32) for d in draws)  # type: ignore[return-value]

    def observe(self, sequence: fakes.FakeSequence, ids: Sequence[int], see: Callable[..., None]) -> None:
        assert 0 < len(ids) <= self.n_ctx and not sequence.closed
        for layer in range(self.config.n_layer):
            shown = [self.values(int(token), layer) for token in ids]
            see(layer, *(np.array(column) for column in zip(*shown, strict=True)))
