"""Instruction-set levels: what the kernels may use on this machine.

Each level is a row: the LLVM CPU and features that kernels are compiled for, and the machine features it needs.
`avx512vnni` and `avx2` are x86-64; `generic` is plain LLVM vector code (SSE2 on x86-64, NEON on arm64).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from ...formats.errors import ParameterError


@dataclass(frozen=True)
class Level:
    """One instruction-set level; `vector_bytes` is the width that kernels are written for."""

    name: str
    vector_bytes: int
    needs: frozenset[str]
    x86_only: bool = True

    @property
    def lanes(self) -> int:
        """32-bit numbers in a vector, which is also the number of rows in a band of weights."""
        return self.vector_bytes // 4


_AVX2 = frozenset({"avx2", "fma", "f16c"})
LEVELS = {
    level.name: level
    for level in (
        Level("avx512vnni", 64, _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}),
        Level("avx2", 32, _AVX2),
        Level("generic", 32, frozenset(), x86_only=False),
    )
}


@lru_cache(maxsize=1)
def _host() -> tuple[str, str, frozenset[str]]:
    """Architecture, CPU name and features of this machine, as LLVM names them."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return (
        llvm.get_process_triple().split("-")[0],
        llvm.get_host_cpu_name(),
        frozenset(name for name, on in features.items() if on),
    )


def available() -> list[str]:
    """Names of the levels that this machine can run, the fastest first."""
    arch, _, features = _host()
    x86 = arch in ("x86_64", "amd64")
    return [n for n, level in LEVELS.items() if level.needs <= features and (x86 or not level.x86_only)]


def choose() -> str:
    """The level to use: HOTCOLD_ISA if set, else the fastest that the machine has; ParameterError if it has not."""
    levels = available()
    wanted = os.environ.get("HOTCOLD_ISA")
    if not wanted:
        return levels[0]
    if wanted not in levels:
        raise ParameterError(f"HOTCOLD_ISA: got {wanted!r}, wanted one that this machine has: {', '.join(levels)}")
    return wanted


def target(level: str) -> tuple[str, str]:
    """LLVM CPU name and feature string that kernels of `level` are compiled for."""
    arch, cpu, features = _host()
    x86 = arch in ("x86_64", "amd64")
    if level == "avx512vnni" or not x86:
        return cpu, ",".join(sorted(f"+{f}" for f in features))
    if level == "avx2":
        return "haswell", ""
    return "x86-64", ""
