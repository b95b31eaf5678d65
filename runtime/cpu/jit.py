"""Kernels by name: compiled once per machine in child processes, kept as object files, loaded by LLVM.

The cache folder's name holds a hash of every kernel source, of the compiler's version and of the CPU, so an edited
kernel or another machine never meets stale code. HOTCOLD_KERNEL_CACHE overrides its place.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...formats.errors import HotcoldError, StorageError
from . import isa

SYMBOL = "hotcold_kernel"
# Families that take longest to compile, the slowest first: begun last, one of them would keep a single core waiting.
SLOW = ("attention", "bands", "experts", "matmul", "matmul_t", "rows", "down", "encode", "activate", "norm")
Progress = Callable[[str], None]
_lock = threading.Lock()
_loaded: dict[tuple[str, str], Any] = {}


def cache_root() -> Path:
    """Folder of compiled kernels."""
    if os.environ.get("HOTCOLD_KERNEL_CACHE"):
        return Path(os.environ["HOTCOLD_KERNEL_CACHE"])
    from platformdirs import user_cache_path

    return user_cache_path("hotcold") / "kernels"


@lru_cache(maxsize=8)
def _fingerprint(level: str) -> str:
    from importlib.metadata import version

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for item in (*isa.target(level), version("numba"), version("llvmlite"), sys.version):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()[:16]


def folder(level: str) -> Path:
    """Folder of this machine's kernels at an instruction-set level."""
    return cache_root() / f"{level}-{_fingerprint(level)}"


def _read(path: Path) -> bytes | None:
    """The object code in a cache file, or None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror}); set HOTCOLD_KERNEL_CACHE to another folder"
        ) from None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


@lru_cache(maxsize=1)
def _linker() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


def _link(level: str, name: str, code: bytes) -> int:
    import llvmlite.binding as llvm

    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol(SYMBOL)
    tracker = library.link(_linker(), f"{level}/{name}")
    _loaded[level, name] = tracker  # the code lives as long as its tracker
    return int(tracker[SYMBOL])


def load(names: Iterable[str], level: str | None = None, progress: Progress | None = None) -> dict[str, int]:
    """Addresses of kernels, compiling those that the cache lacks; `progress` gets one line for each compiled one."""
    level = level or isa.choose()
    with _lock:
        names = list(dict.fromkeys(names))
        missing, found = [], {}
        for name in names:
            if (level, name) in _loaded:
                found[name] = int(_loaded[level, name][SYMBOL])
                continue
            code = _read(_path(level, name))
            if code is None:
                missing.append(name)
            else:
                found[name] = _link(level, name, code)
        if missing:
            _compile(level, missing, progress)
            for name in missing:
                code = _read(_path(level, name))
                if code is None:
                    raise HotcoldError(f"kernel {name}: compiled, but its cache file vanished from {folder(level)}")
                found[name] = _link(level, name, code)
        return found


def _path(level: str, name: str) -> Path:
    return folder(level) / (name.replace(":", "-") + ".o")


def environment(level: str) -> dict[str, str]:
    """Environment of a compiling child."""
    cpu, features = isa.target(level)
    search = os.pathsep.join(p for p in sys.path if p)
    return {
        **os.environ,
        "HOTCOLD_ISA": level,
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": search,
        "PYTHONDONTWRITEBYTECODE": os.environ.get("PYTHONDONTWRITEBYTECODE", ""),
    }


def _slowness(name: str) -> int:
    family = name.partition(":")[0]
    return SLOW.index(family) if family in SLOW else len(SLOW)


def _compile(level: str, names: list[str], progress: Progress | None) -> None:
    target = folder(level)
    try:
        target.mkdir(parents=True, exist_ok=True)
        probe = target / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{target}: kernel cache cannot be written ({error.strerror}); set HOTCOLD_KERNEL_CACHE to another folder"
        ) from None
    count = max(1, min(os.cpu_count() or 1, len(names), 4))
    say = progress or (lambda line: None)
    say(f"compiling kernels 0/{len(names)}")
    waiting = deque(sorted(names, key=_slowness))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compile", str(target)],
            env=environment(level),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=os.name == "posix",  # Ctrl-C reaches us alone, and we end them
        )
        for _ in range(count)
    ]
    done = 0
    tell = threading.Lock()
    errors: list[str] = []

    def give_work(child: subprocess.Popen[str]) -> None:
        assert child.stdin
        with tell:
            name = waiting.popleft() if waiting else None
        with suppress(OSError):  # it has ended, and says why
            if name is None:
                child.stdin.close()
            else:
                child.stdin.write(f"{name}\n")
                child.stdin.flush()

    def follow(child: subprocess.Popen[str]) -> None:
        nonlocal done
        assert child.stdout
        trace = []
        give_work(child)
        for line in child.stdout:
            if line.startswith("done "):
                with tell:
                    done += 1
                    say(f"compiling kernels {done}/{len(names)}")
                give_work(child)
            elif line.strip():
                trace.append(line)
        if child.wait() != 0:
            with tell:
                waiting.clear()
            errors.append(trace[-1].strip() if trace else f"exit status {child.returncode}")
            if os.environ.get("HOTCOLD_DEBUG"):
                sys.stderr.writelines(trace)

    threads = [threading.Thread(target=follow, args=(child,), daemon=True) for child in children]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:  # not the parts of other processes, which may be at work here too
            for part in target.glob(f"*.{child.pid}.part"):
                part.unlink(missing_ok=True)
    if errors:
        raise HotcoldError(f"a kernel did not compile at level {level}: {errors[0]} (HOTCOLD_DEBUG=1 shows all)")
