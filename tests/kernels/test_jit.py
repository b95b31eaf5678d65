"""The kernel cache: damage, places that cannot be written, levels, and what a kernel's folder is named after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotcold.formats.errors import HotcoldError, ParameterError, StorageError
from hotcold.runtime.cpu import isa, jit
from hotcold.runtime.cpu.compile import FAMILIES

KERNEL = "walk"  # the quickest to compile
LOAD = f"""
from hotcold.runtime.cpu import jit
print(hex(jit.load(["{KERNEL}"], progress=print)["{KERNEL}"]))
"""


def load_in_a_child(cache: Path, **environment: str) -> list[str]:
    """Lines of a new process that loads one kernel: what is compiled, then its address."""
    search = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, "HOTCOLD_KERNEL_CACHE": str(cache), "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def compiled(lines: list[str]) -> bool:
    assert int(lines[-1], 16) > 0
    assert lines[:-1] in ([], ["compiling kernels 0/1", "compiling kernels 1/1"])
    return len(lines) > 1


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is loaded, and no folder's name is remembered."""
    monkeypatch.setattr(jit, "_loaded", {})
    jit._fingerprint.cache_clear()
    yield monkeypatch
    jit._fingerprint.cache_clear()


def test_compiled_once_and_again_when_damaged(tmp_path: Path) -> None:
    assert compiled(load_in_a_child(tmp_path))
    (file,) = tmp_path.glob(f"*/{KERNEL}.o")
    others = file.with_name("pack.1.part")  # of another process, at work in the same folder
    others.touch()
    good = file.read_bytes()
    assert not compiled(load_in_a_child(tmp_path))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (bytes(flipped), good[:-1]):
        file.write_bytes(damaged)
        assert compiled(load_in_a_child(tmp_path))
        assert jit._read(file) is not None
    assert set(file.parent.iterdir()) == {file, others}


@pytest.mark.parametrize("content", [b"", b"x", bytes(32), bytes(100)])
def test_damage_of_any_length_is_noticed(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "kernel.o"
    file.write_bytes(content)
    assert jit._read(file) is None
    assert jit._read(tmp_path / "missing.o") is None


def test_a_file_in_the_folders_place(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache"
    place.write_text("")
    fresh.setenv("HOTCOLD_KERNEL_CACHE", str(place))
    with pytest.raises(StorageError, match="HOTCOLD_KERNEL_CACHE") as caught:
        jit.load([KERNEL])
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    fresh.setenv("HOTCOLD_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(StorageError, match="HOTCOLD_KERNEL_CACHE"):
        jit.load([KERNEL])


def test_several_children_share_the_work(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("HOTCOLD_KERNEL_CACHE", str(tmp_path))
    fresh.setattr(jit.os, "cpu_count", lambda: 3)
    fresh.setattr(jit, "_link", lambda level, name, code: len(code))  # some may be linked in this process already
    said: list[str] = []
    names = ["walk", "read", "pack", "add_parts", "rope:neox"]
    found = jit.load(names, "generic", said.append)
    assert list(found) == names and all(found.values())
    assert said == [f"compiling kernels {n}/5" for n in range(6)]
    assert len(list(tmp_path.glob("*/*.o"))) == 5


def test_the_slowest_kernels_are_begun_first() -> None:
    names = ["walk", "norm:rms", "bands:Q4_0", "attention:f16-f16", "matmul:Q4_0", "pack"]
    wanted = ["attention:f16-f16", "bands:Q4_0", "matmul:Q4_0", "norm:rms", "walk", "pack"]
    assert sorted(names, key=jit._slowness) == wanted
    assert set(jit.SLOW) <= set(FAMILIES)  # a name that no kernel has would be no use


def test_a_kernel_that_does_not_compile(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("HOTCOLD_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(HotcoldError, match="did not compile at level"):
        jit.load(["embed:Q9_9"])
    assert not list(tmp_path.glob("*/*"))


def test_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTCOLD_KERNEL_CACHE", str(tmp_path))
    assert jit.cache_root() == tmp_path
    monkeypatch.delenv("HOTCOLD_KERNEL_CACHE")
    assert jit.cache_root().name == "kernels" and "hotcold" in jit.cache_root().parts


def test_folder_is_named_after_sources_and_cpu(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    for source in Path(jit.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    names = {jit.folder("generic").name}
    fresh.setattr(jit, "__file__", str(tmp_path / "jit.py"))

    def name() -> str:
        jit._fingerprint.cache_clear()
        return jit.folder("generic").name

    assert name() in names  # the same sources elsewhere
    for source in sorted(tmp_path.glob("*.py")):
        source.write_text(source.read_text() + "# edited\n")
        assert name() not in names, source.name
        names.add(name())
    fresh.setattr(isa, "target", lambda level: ("another-cpu", ""))
    assert name() not in names
    fresh.undo()
    assert all(each.startswith("generic-") for each in names)
    assert jit.folder("generic") != jit.folder("avx2")


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = isa.available()
    assert levels[-1] == "generic"
    monkeypatch.delenv("HOTCOLD_ISA", raising=False)
    assert isa.choose() == levels[0]
    for level in levels:
        monkeypatch.setenv("HOTCOLD_ISA", level)
        assert isa.choose() == level


@pytest.mark.parametrize("wanted", ["avx1024", "AVX2", "generic "])
def test_unknown_level(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("HOTCOLD_ISA", wanted)
    with pytest.raises(ParameterError, match="HOTCOLD_ISA.*generic"):
        isa.choose()
    with pytest.raises(ParameterError):
        jit.load([KERNEL])


@pytest.mark.parametrize(
    ("machine", "levels"),
    [
        (("x86_64", "znver4", isa.LEVELS["avx512vnni"].needs), ["avx512vnni", "avx2", "generic"]),
        (("x86_64", "skylake-avx512", isa.LEVELS["avx512vnni"].needs - {"avx512vnni"}), ["avx2", "generic"]),
        (("x86_64", "haswell", isa.LEVELS["avx2"].needs), ["avx2", "generic"]),
        (("x86_64", "nehalem", frozenset({"sse4.2"})), ["generic"]),
        (("aarch64", "cortex-a76", frozenset({"neon", "dotprod"})), ["generic"]),
    ],
)
def test_machines(monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str, frozenset[str]], levels: list[str]) -> None:
    monkeypatch.setattr(isa, "_host", lambda: machine)
    monkeypatch.delenv("HOTCOLD_ISA", raising=False)
    assert isa.available() == levels
    assert isa.choose() == levels[0]
    monkeypatch.setenv("HOTCOLD_ISA", "avx512vnni")
    if "avx512vnni" not in levels:
        with pytest.raises(ParameterError, match="this machine has"):
            isa.choose()
