"""What is installed: the package list, the public names, and a cheap import."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import hotcold

CLONE = Path(__file__).parents[2]
NOT_PACKAGES = {"tests", "build", "dist"}


def test_package_list_equals_the_tree() -> None:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = {"hotcold"}
    for init in CLONE.rglob("__init__.py"):
        parts = init.parent.relative_to(CLONE).parts
        if parts and parts[0] not in NOT_PACKAGES and not any(p.startswith((".", "venv")) for p in parts):
            found.add(".".join(["hotcold", *parts]))
    assert sorted(listed) == sorted(found)


def test_every_source_file_is_in_a_listed_package() -> None:
    for layer in ("formats", "runtime", "solver", "tools"):
        for source in (CLONE / layer).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), source


def test_installed_files_equal_the_tree() -> None:
    """The tests run against what was installed; a stale one must not pass for the tree."""
    installed = Path(hotcold.__file__).parent
    assert (installed / "py.typed").exists()
    for layer in ("formats", "runtime", "solver", "tools"):
        wanted = {path.relative_to(CLONE): path.read_bytes() for path in (CLONE / layer).rglob("*.py")}
        got = {path.relative_to(installed): path.read_bytes() for path in (installed / layer).rglob("*.py")}
        assert got == wanted, f"{layer} differs from what is installed; rm -rf build, and install again"


def test_public_names() -> None:
    assert sorted(hotcold.__all__) == [
        "Engine", "GGUFFile", "HotcoldError", "LLM", "SamplingParams", "__version__", "place",
    ]  # fmt: skip
    assert dir(hotcold) == sorted(hotcold.__all__)
    for name in hotcold.__all__:
        assert getattr(hotcold, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        hotcold.no_such_name  # noqa: B018


def test_version_and_command() -> None:
    assert hotcold.__version__ == version("hotcold")
    (command,) = entry_points(group="console_scripts", name="hotcold")
    assert command.value == "hotcold.tools.cli:main"
    assert callable(command.load())


def test_import_is_cheap() -> None:
    code = (
        "import sys, hotcold, hotcold.formats.errors; dir(hotcold);"
        "print(sorted({'numba', 'numpy', 'gguf', 'jinja2', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=CLONE / "tests", check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
