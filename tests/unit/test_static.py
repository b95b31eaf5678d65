"""The linter and the type checker, as a person runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CLONE = Path(__file__).parents[2]
CHECKED = ("__init__.py", "py.typed", "formats", "runtime", "solver", "tools")


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run("ruff", "check", "--no-cache", "--output-format", "concise", ".", cwd=CLONE)


def test_mypy(tmp_path: Path) -> None:
    """On a copy in a folder named hotcold: mypy knows files by path, and a clone may have any name."""
    package = tmp_path / "hotcold"
    package.mkdir()
    for name in CHECKED:
        source = CLONE / name
        if source.is_dir():
            shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, package / name)
    config = ("--config-file", str(CLONE / "pyproject.toml"))
    run("mypy", *config, "--cache-dir", str(CLONE / ".mypy_cache"), "-p", "hotcold", cwd=tmp_path)
