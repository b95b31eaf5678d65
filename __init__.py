"""hotcold: run GGUF language models from Python alone, every hot loop compiled by Numba.

The public names load on first use, so that `import hotcold` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats.errors import HotcoldError as HotcoldError
    from .formats.gguf import GGUFFile as GGUFFile
    from .runtime.engine import Engine as Engine
    from .runtime.llm import LLM as LLM
    from .runtime.sampler import SamplingParams as SamplingParams
    from .solver.placement import place as place

__version__ = "0.1.0"

_HOMES = {
    "LLM": ".runtime.llm",
    "Engine": ".runtime.engine",
    "SamplingParams": ".runtime.sampler",
    "GGUFFile": ".formats.gguf",
    "HotcoldError": ".formats.errors",
    "place": ".solver.placement",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
