"""schemathesis over the OpenAPI document, a short seeded edition of tests/serve_fuzz.py.

On are its phases "examples", "fuzzing" and "stateful"; "coverage" is some 1500 requests, which take too long here:
it is on in tests/serve_fuzz.py itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import serve_fuzz
from serve_process import Served


def test_openapi_document(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """All default checks, with the data that schemathesis makes from one seed; every path has 2xx replies, too."""
    with Served(tiny_model(), "--ctx", "128", "--parallel", "4", "--threads", "1") as server:
        problems, printed = serve_fuzz.fuzz(server, tmp_path, 8, 1, 1, "--phases", "examples,fuzzing,stateful")
    assert not problems, "\n".join(problems) + "\n" + printed[-6000:]
