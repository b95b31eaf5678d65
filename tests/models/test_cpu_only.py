"""A run on the CPU needs and imports nothing of the `cuda` extra."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CODE = """
import sys
from hotcold.tools.cli import app
from typer.testing import CliRunner

done = CliRunner().invoke(app, ["run", sys.argv[1], "-p", "he", "-n", "2", "-c", "64"])
assert done.exit_code == 0, done.output
foreign = {"numba_cuda", "numba.cuda", "cuda", "pynvml", "mip", "highspy", "hotcold.solver.placement"}
print(sorted(foreign & set(sys.modules)))
"""


def test_nothing_of_the_gpu_is_imported(tiny_model: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny_model())], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
