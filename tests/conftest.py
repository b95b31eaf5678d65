"""Shared fixtures: tiny models by their arguments, and families, each made once in a run; where kernels are cached.

CUDA kernels run in Numba's simulator, unless HOTCOLD_TEST_GPU is set: then on the GPU of this machine.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny import make_tiny_model


def pytest_configure(config: pytest.Config) -> None:
    """Kernels that tests compile stay in pytest's cache folder: compiled once, and not among the user's own.

    Numba asks for its simulator when it is first imported, which is later. Hypothesis makes the same examples in each
    run, and a slow one is no failure.
    """
    settings.register_profile("hotcold", derandomize=True, deadline=None)
    settings.load_profile("hotcold")
    if not os.environ.get("HOTCOLD_TEST_GPU"):
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    # A run in the background of a shell begins with Ctrl-C ignored, and some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = getattr(config, "cache", None)  # -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("HOTCOLD_KERNEL_CACHE", str(cache.mkdir("hotcold-kernels")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(**arguments of make_tiny_model) -> path of a file that tests must not change."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = make_tiny_model(folder / f"{len(made)}.gguf", **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def family_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family_file(name) -> path of a family's checkpoint as a GGUF file in F32, that tests must not change."""
    from families import BY_NAME

    from hotcold.solver.convert import convert

    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = convert(BY_NAME[name].folder, folder / f"{name}.gguf", "f32", n_threads=1).path
        return made[name]

    return get
