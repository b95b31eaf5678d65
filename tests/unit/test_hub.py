"""Hugging Face references, against a local stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hotcold.formats.errors import ModelNotFoundError, UnsupportedError
from hotcold.runtime import hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs; tells a token's owner from a stranger."""

    files = {"model-Q4_K_M.gguf": b"GGUF four", "sub/model-Q8_0.gguf": b"GGUF eight", "README.md": b"# hi"}
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[str] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repo == "org/gated":
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif repo == "org/private" and self.headers.get("Authorization") != "Bearer secret":
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif repo not in ("org/repo", "org/private"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            data = {"id": repo, "sha": self.commit, "siblings": siblings}
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in self.files.items()
            ]
            self.reply(200, json.dumps(tree if "/tree/" in path else data).encode(), {}, body)
        else:
            content = self.files.get(path.partition("/resolve/")[2].partition("/")[2])
            if content is None:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, body)
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.reply(200, content, {"ETag": etag, "X-Repo-Commit": self.commit}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def pull_in_child(
    url: str, home: Path, names: list[str], no_waits: bool = False, show_progress: bool = False, **env: str
) -> list[str]:
    """Pull each name in one fresh process (HF_ENDPOINT is read on import); the path or the error of each."""
    code = (
        "import sys, time\n"
        f"if {no_waits}: time.sleep = lambda seconds: None\n"
        "from hotcold.formats.errors import HotcoldError\n"
        "from hotcold.runtime import models\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        f"        print(models.resolve(name, print if {show_progress} else None))\n"
        "    except HotcoldError as exc:\n"
        "        print(type(exc).__name__, exc)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": url, "HOTCOLD_HOME": str(home), "HF_HOME": str(home / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**clean, **settings, "HF_HUB_ETAG_TIMEOUT": "2", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_hub_references(hub_url: str, home: Path) -> None:
    names = ["hf:org/repo/sub/model-Q8_0.gguf", "org/repo:q4_k_m", "hf:org/repo:Q4_K_M"]
    paths = [Path(line) for line in pull_in_child(hub_url, home, names)]
    assert [path.read_bytes() for path in paths] == [b"GGUF eight", b"GGUF four", b"GGUF four"]
    assert all(path.is_relative_to(home / "hub") for path in paths)
    # They are found in the cache from then on, without asking anybody.
    assert pull_in_child("http://127.0.0.1:9", home, names) == [str(path) for path in paths]


def test_hub_errors(hub_url: str, home: Path) -> None:
    names = [
        "hf:org/repo/none.gguf",
        "org/repo:Q5_0",
        "hf:org/repo",
        "org/nosuch:Q4_0",
        "hf:org/private/model-Q4_K_M.gguf",
        "hf:org/gated/model-Q4_K_M.gguf",
        "hf:org/repo/x-00001-of-00002.gguf",
    ]
    lines = pull_in_child(hub_url, home, names)
    assert [line.split()[0] for line in lines] == [
        "ModelNotFoundError",
        "ModelNotFoundError",
        "ModelNotFoundError",
        "ModelNotFoundError",
        "ModelNotFoundError",
        "DownloadError",
        "UnsupportedError",
    ]
    assert "no such file" in lines[0]
    assert "out of: model-Q4_K_M.gguf, sub/model-Q8_0.gguf" in lines[1] and "got 0 Q5_0 files" in lines[1]
    assert "got 2 GGUF files" in lines[2]
    assert "HF_TOKEN" in lines[4] and "gated" in lines[5]


def test_hub_token(hub_url: str, home: Path) -> None:
    [line] = pull_in_child(hub_url, home, ["hf:org/private/model-Q4_K_M.gguf"], HF_TOKEN="secret")
    assert Path(line).read_bytes() == b"GGUF four"


def test_hub_out_of_reach(home: Path) -> None:
    # Retries, which the hub's client makes for half a minute, are cut by leaving out its waits.
    lines = pull_in_child("http://127.0.0.1:9", home, ["hf:org/repo/x.gguf", "org/repo:Q4_0"], no_waits=True)
    assert all(line.startswith("DownloadError") and "check the network" in line for line in lines)
    assert len(lines) == 2


def test_hub_progress(hub_url: str, home: Path) -> None:
    lines = pull_in_child(hub_url, home, ["hf:org/repo/sub/model-Q8_0.gguf"], show_progress=True)
    assert lines[0] == "asking the hub for org/repo 0 None"
    assert lines[-2] == "downloading sub/model-Q8_0.gguf 10 10"


@pytest.mark.parametrize(
    ("quant", "found"),
    [
        ("Q4_K", "m.Q4_K.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("IQ4_XS", "m-IQ4_XS.gguf"),
        ("Q8_0", "Q8_0/m.gguf"),
        ("F16", "m_f16.gguf"),
    ],
)
def test_choose(quant: str, found: str) -> None:
    names = ["m.Q4_K.gguf", "m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "Q8_0/m.gguf", "m_f16.gguf"]
    names += ["mmproj-F16.gguf", "hotcold-m.Q4_K.gguf"]
    assert hub.choose([*names, "README.md"], "o/r", quant) == found


def test_choose_says_what_there_is() -> None:
    with pytest.raises(ModelNotFoundError, match="got 2 Q4_0 files.*a-Q4_0.gguf, b-Q4_0.gguf"):
        hub.choose(["b-Q4_0.gguf", "a-Q4_0.gguf", "c-Q8_0.gguf"], "o/r", "Q4_0")
    with pytest.raises(UnsupportedError, match="split"):
        hub.choose(["a-Q4_0-00001-of-00002.gguf", "a-Q4_0-00002-of-00002.gguf"], "o/r", "Q4_0")
    with pytest.raises(ModelNotFoundError, match="out of: none"):
        hub.choose(["README.md"], "o/r", None)
    assert hub.choose(["only.gguf"], "o/r", None) == "only.gguf"
