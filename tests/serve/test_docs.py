"""The recipes in docs/: their code runs, as it stands there, against the real server process or the library.

A page's Python is one program, block by block. Its first `hotcold serve` is the server that is started; what begins
with curl is run by bash, and what begins with llm by that. `console` blocks are for reading. A tiny model stands in for
smollm2; HOTCOLD_DOCS_MODEL names another. With HOTCOLD_TEST_RECIPES set, what is not installed is a failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_process import Served

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "library.md": ["pydantic", "llguidance"],
    "llm.md": ["llm", "llguidance"],
    "server.md": ["openai", "pydantic", "fastapi"],
    "langchain.md": ["langchain_openai", "fastapi"],
    "llamaindex.md": ["llama_index.llms.openai_like", "llama_index.embeddings.openai_like", "fastapi"],
}
PROSE = ("adapters.md", "relufy.md")  # nothing in them to run
# llm with the plugin, also where hotcold is not installed but on the path
PLUGIN = """
import llm, hotcold.tools.llm_plugin as plugin
if not llm.plugins.pm.is_registered(plugin):
    llm.plugins.pm.register(plugin, name="hotcold")
"""
COMMANDS = """
import json, sys
from click.testing import CliRunner
from llm.cli import cli
for command in json.load(sys.stdin):
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, (command, done.output)
"""
ADDRESS = "http://127.0.0.1:8080"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    return os.environ.get("HOTCOLD_DOCS_MODEL") or str(tiny_model(n_ctx_train=2048, seed=6))


def run_python(source: str, folder: Path, input: str = "") -> str:
    """What a program prints."""
    (folder / "page.py").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], capture_output=True, text=True, timeout=300, cwd=folder, errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "LLM_USER_PATH": str(folder)}, input=input,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(page: str, url: str, model: str, folder: Path) -> str:
    """What the page's code prints; the server's address and the library's model are those of the test."""
    source = "\n".join(blocks(page, "python")).replace(ADDRESS, url).replace('LLM("smollm2"', f"LLM({model!r}")
    output = run_python((PLUGIN if page == "llm.md" else "") + source, folder)
    for block in blocks(page, "sh"):
        if block.startswith("curl") and shutil.which("bash") and shutil.which("curl"):
            found = subprocess.run(
                ["bash", "-ec", block.replace(ADDRESS, url)], capture_output=True, text=True, timeout=120
            )
            assert found.returncode == 0 and '"choices"' in found.stdout, found
            assert "data: [DONE]" in found.stdout or '"stream"' not in block
    return output


def test_every_page_is_run() -> None:
    assert {path.name for path in DOCS.glob("*.md")} == {*PAGES, "performance.md", *PROSE}
    assert not any(blocks(page, kind) for page in PROSE for kind in ("python", "sh"))
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh", "console"} and set(fences[1::2]) == {""}
        for block in blocks(page, "sh"):
            assert block.startswith(("curl ", "llm ", "hotcold serve smollm2")), "neither run nor started"


def test_the_script_that_says_where_time_goes(model: str, tmp_path: Path) -> None:
    (script,) = blocks("performance.md", "python")
    output = run_python(f"import sys\nsys.argv.append({model!r})\n{script}", tmp_path)
    shares = [float(line.split("%")[0]) for line in output.splitlines()]
    assert shares == sorted(shares, reverse=True) and 99 < sum(shares) < 101 and "attention" in output


def test_pictures_are_small() -> None:
    for picture in DOCS.glob("*.png"):
        assert picture.stat().st_size < 200_000
        assert any(picture.name in path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, model: str, tmp_path: Path) -> None:
    missing = [module for module in PAGES[page] if not is_there(module)]
    if missing:
        assert "HOTCOLD_TEST_RECIPES" not in os.environ, f"docs/{page} needs {', '.join(missing)}"
        pytest.skip(f"docs/{page} needs {', '.join(missing)}")
    starts = [block for block in blocks(page, "sh") if block.startswith("hotcold serve")]
    if page == "llm.md":
        (tmp_path / "hotcold.json").write_text(json.dumps({"smollm2": model}), encoding="utf-8")
        lines = [shlex.split(line)[1:] for block in blocks(page, "sh") for line in block.splitlines()]
        run_python(PLUGIN + COMMANDS, tmp_path, json.dumps(lines))
    if not starts:
        output = run_page(page, ADDRESS, model, tmp_path)
    else:
        arguments = shlex.split(starts[0])[2:]
        assert arguments[0] == "smollm2"
        with Served(model, *arguments[1:], "--alias", "smollm2", "--threads", "2", key=None) as server:
            output = run_page(page, server.url, model, tmp_path)
    prints = "\n".join(blocks(page, "python")).count("\nprint(")
    assert len(output.splitlines()) >= prints > 0
