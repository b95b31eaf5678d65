"""Imports go one way: tools -> solver -> runtime -> formats, read from the source with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hotcold

LAYERS = ["formats", "runtime", "solver", "tools"]  # each may import itself and those before it
ROOT = Path(hotcold.__file__).parent
SOURCES = sorted(path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
PEERS = {"llama_cpp", "ctransformers", "llamafile"}


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Absolute names of all imports, at any depth of the code; package is that of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from .. import formats` names a module too.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(source: Path) -> set[str]:
    package = ["hotcold", *source.parent.parts]
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"), str(source))
    return set(imported(tree, package))


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "hotcold" and len(parts) > 1 and parts[1] in LAYERS else None


def test_relative_imports_are_understood() -> None:
    lines = ["from ..a.b import c", "from . import d", "from ... import e", "import f.g", "from h import i"]
    names = set(imported(ast.parse("\n".join(lines)), ["hotcold", "runtime", "cpu"]))
    assert names == {"hotcold.runtime.a.b.c", "hotcold.runtime.cpu.d", "hotcold.e", "f.g", "h.i"}


def test_there_is_something_to_check() -> None:
    assert {source.parts[0] for source in SOURCES} == set(LAYERS)
    assert any(layer_of(name) == "formats" for source in SOURCES for name in imports_of(source))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_go_one_way(source: Path) -> None:
    own = LAYERS.index(source.parts[0])
    for name in imports_of(source):
        layer = layer_of(name)
        assert layer is None or LAYERS.index(layer) <= own, f"{source} imports {name}"
        # Public names are reached through the layers that own them; hotcold/__init__ would hide a cycle.
        assert name in ("hotcold.__version__",) or layer is not None or not name.startswith("hotcold"), name


@pytest.mark.parametrize("source", [s for s in SOURCES if s.parts[0] == "formats"], ids=str)
def test_formats_needs_no_compiler(source: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(source)} & {"numba", "llvmlite"}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_no_other_runtime_is_imported(source: Path) -> None:
    """But for the script that `bench --against` starts in the other runtime's own process."""
    allowed = {"llama_cpp"} if source == Path("tools/bench_peer.py") else set()
    assert not {name.split(".")[0] for name in imports_of(source)} & PEERS - allowed
