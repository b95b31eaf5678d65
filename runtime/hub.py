"""Hugging Face references: which file of a repository is meant, and fetching it through huggingface_hub."""

from __future__ import annotations

import errno
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..formats.errors import DownloadError, HotcoldError, ModelNotFoundError, UnsupportedError
from ..formats.pages import forget

Progress = Callable[[str, int, "int | None"], None]
"""Called with (what is going on, bytes done, bytes in all or None when nobody knows)."""

STORAGE = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def cached(cache: Path, repo: str, file: str | None, quant: str | None) -> Path | None:
    """The file in the hub cache folder `cache`, or None; reads the folder only, so it works offline."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        snapshot = folder / "snapshots" / commit
        if file is None:
            names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
            file = choose(names, repo, quant)
    except (OSError, ValueError, HotcoldError):
        return None
    path = snapshot / file
    return path if path.is_file() else None


def references(cache: Path) -> list[str]:
    """hf: references of all model files in the hub cache folder `cache`; reads the folder only."""
    found = []
    for folder in cache.glob("models--*--*"):
        try:
            snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="ascii").strip()
            names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file()]
        except (OSError, ValueError):
            continue
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        found += [f"hf:{repo}/{name}" for name in names if _is_model(name) and not SPLIT_FILE.search(name)]
    return sorted(found)


def choose(names: list[str], repo: str, quant: str | None) -> str:
    """The one name of a model in that quantisation (any case; None = the only model there is).

    Raises ModelNotFoundError that lists the candidates when there are several or none.
    """
    models = [name for name in names if _is_model(name)]
    found = models
    if quant is not None:
        # Q4_K must not find Q4_K_M, nor Q4_XS find IQ4_XS.
        token = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [name for name in models if token.search(name.rpartition("/")[2])]
        if not found:  # some repositories name only the folder after the quantisation
            found = [name for name in models if token.search(name)]
    if found and all(SPLIT_FILE.search(name) for name in found):
        check_not_split(found[0])
    if len(found) != 1:
        wanted = f"{quant} files" if quant else "GGUF files"
        listed = ", ".join(sorted(found or models)) or "none"
        raise ModelNotFoundError(
            f"{repo}: got {len(found)} {wanted}, wanted one; name it as hf:{repo}/FILE.gguf, out of: {listed}"
        )
    return found[0]


def check_not_split(name: str) -> None:
    """Raise UnsupportedError for one part of a model that was split over several files."""
    if SPLIT_FILE.search(name):
        raise UnsupportedError(
            f"{name}: is one part of a split model, which is not supported; merge it with gguf-split first"
        )


def fetch(cache: Path, repo: str, file: str | None, quant: str | None, progress: Progress) -> Path:
    """Fetch the file into `cache` and return it.

    Honours HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub.
    Raises ModelNotFoundError, DownloadError, UnsupportedError; OSError where the folder cannot be written.
    """
    from huggingface_hub import HfApi, hf_hub_download

    if file is not None:
        check_not_split(file)
    progress(f"asking the hub for {repo}", 0, None)
    with _quiet_hub():
        try:
            if file is None:
                file = choose(HfApi().list_repo_files(repo), repo, quant)
            options: dict[str, Any] = {}
            if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # not in its older versions
                options["tqdm_class"] = partial(_Bar, progress, f"downloading {file}")
            path = Path(hf_hub_download(repo, file, cache_dir=cache, **options))
            forget(path)
            return path
        except HotcoldError:
            raise
        except Exception as exc:  # which transport library it uses differs between versions
            raise _translated(exc, repo, file) from exc


class _Bar:
    """What the hub takes for its progress bar, telling our callback."""

    def __init__(self, progress: Progress, what: str, **options: Any) -> None:
        self.progress, self.what = progress, what
        self.n, self.total = options.get("initial") or 0, options.get("total")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Count n more bytes."""
        self.n += int(n or 0)
        self.progress(self.what, self.n, self.total)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's own bars and its notes on retries off stderr: an error of ours says what matters."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


def _is_model(name: str) -> bool:
    base = name.rpartition("/")[2].lower()
    return base.endswith(".gguf") and not base.startswith(("mmproj", "imatrix", "hotcold-"))


def _translated(exc: Exception, repo: str, file: str | None) -> Exception:
    from huggingface_hub import errors

    what = f"hf:{repo}/{file}" if file else f"hf:{repo}"
    if isinstance(exc, errors.GatedRepoError):
        return DownloadError(f"{what}: a gated repository; accept its terms on its page, then set HF_TOKEN")
    if isinstance(exc, errors.RepositoryNotFoundError):
        return ModelNotFoundError(f"{what}: no such repository, or a private one (then set HF_TOKEN)")
    if isinstance(exc, errors.EntryNotFoundError) and not isinstance(exc, errors.LocalEntryNotFoundError):
        return ModelNotFoundError(f"{what}: no such file in the repository")
    if isinstance(exc, errors.HFValidationError):
        return ModelNotFoundError(f"{what}: not a repository name: {_first_line(exc)}")
    if isinstance(exc, OSError) and type(exc).__module__ == "builtins" and exc.errno in STORAGE:
        return exc
    cause: BaseException = exc
    while cause.__cause__ is not None:  # the hub wraps what the network said in advice about its cache
        cause = cause.__cause__
    said = _first_line(cause)
    return DownloadError(f"{what}: could not be fetched: {said}; check the network and HF_ENDPOINT")


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
