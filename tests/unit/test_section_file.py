"""Writing sections: merging, and whatever cuts it short: faults at each step, full disks, kills, locks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import section_crash
import sections
from filelock import FileLock
from typer.testing import CliRunner

from hotcold.formats import file_lock, section_file, section_image
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import HotcoldError, ParameterError, SectionError, StorageError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, SectionTensor, attach_section, detach_section, update_section
from hotcold.formats.section_layout import sidecar_path
from hotcold.tools.cli import app

NOTHING = Contents({}, [])


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model(), tmp_path / "model.gguf"))


def holds(model: Path, wanted: Contents | None) -> bool:
    """Whether the model's section is exactly that (None: there is none), and nothing was warned of."""
    with GGUFFile(model) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig.from_gguf(file)
        section = find_section(file)
        if section is None or wanted is None:
            if section is not None:
                section.close()
            return section is wanted
        with section:
            if set(section.image.tensors) != {one.name for one in wanted.tensors}:
                return False
            if any((section.image.data(one.name) != one.data().reshape(-1)).any() for one in wanted.tensors):
                return False
            sections.assert_holds(section, wanted)
    return True


def files(model: Path) -> set[str]:
    return {path.name for path in model.parent.iterdir()}


# merging


def test_a_part_replaces_only_itself(model: Path) -> None:
    part = sections.contents
    update_section(model, part("profile"))
    update_section(model, part("predictors"))
    assert holds(model, sections.joined(part("profile"), part("predictors")))
    update_section(model, part("profile", seed=1))
    assert holds(model, sections.joined(part("predictors"), part("profile", seed=1)))
    update_section(model, part("down_t", "thresholds"))
    update_section(model, Contents({"hotcold.profile.dataset": "d"}, part("profile", seed=2).tensors))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.parts() == list(sections.PARTS)
        assert "hotcold.profile.tokens" not in section.image.metadata  # an old profile's keys go with it
    update_section(model, NOTHING, drop=["profile", "thresholds", "down_t"])
    assert holds(model, part("predictors"))


def test_other_tensors_are_kept(model: Path) -> None:
    other = Contents({"hotcold.other": 1.5}, [sections.tensor("blk.0.ffn_other", 0, 7)])
    update_section(model, other)
    update_section(model, sections.contents("profile"))
    assert holds(model, sections.joined(other, sections.contents("profile")))


def test_dropping_all_is_detaching(model: Path) -> None:
    before = model.read_bytes()
    update_section(model, NOTHING, drop=["profile"])
    assert model.read_bytes() == before and holds(model, None)
    update_section(model, sections.contents("profile"))
    assert update_section(model, NOTHING, drop=["profile"]) == model
    assert model.read_bytes() == before and files(model) == {"model.gguf", ".hotcold-model.gguf.lock"}
    with pytest.raises(ParameterError, match="drop: got 'hot', wanted one of profile"):
        update_section(model, NOTHING, drop=["hot"])


def test_bytes_of_the_wrong_number(model: Path) -> None:
    bad = sections.contents("profile").tensors
    bad[1] = SectionTensor(bad[1].name, bad[1].shape, bad[1].type, lambda: bad[0].data()[:4])
    with pytest.raises(ParameterError, match="blk.1.ffn_act_freq: got 4 bytes, wanted 384"):
        update_section(model, Contents({}, bad))
    assert holds(model, None) and files(model) == {"model.gguf", ".hotcold-model.gguf.lock"}


def test_a_sidecar_goes_before_what_is_attached(model: Path) -> None:
    before = model.read_bytes()
    update_section(model, sections.contents("profile"))
    attached = model.read_bytes()
    side = update_section(model, sections.contents("thresholds"), sidecar=True)
    assert model.read_bytes() == attached
    assert holds(model, sections.contents("profile", "thresholds"))
    update_section(model, sections.contents("down_t"))
    assert not side.exists() and holds(model, sections.contents("profile", "thresholds", "down_t"))
    detach_section(model, keep_sidecar=True)
    assert model.read_bytes() == before and holds(model, sections.contents("profile", "thresholds", "down_t"))
    detach_section(model)
    assert not side.exists() and holds(model, None)


@pytest.mark.parametrize("trailing", [b"", b"\0" * 40, b"another program's notes" * 7000])
def test_detaching_gives_the_model_back_as_it_was(model: Path, trailing: bytes) -> None:
    with open(model, "ab") as file:
        file.write(trailing)
    before = model.read_bytes()
    for seed in range(3):
        update_section(model, sections.contents(*sections.PARTS[seed:], seed=seed), drop=sections.PARTS)
        assert holds(model, sections.contents(*sections.PARTS[seed:], seed=seed))
    detach_section(model)
    assert model.read_bytes() == before
    with pytest.raises(SectionError, match="no section is attached to it, and no hotcold-model.gguf is beside it"):
        detach_section(model)


def test_moving_a_section(model: Path, tmp_path: Path) -> None:
    update_section(model, sections.contents())
    for target in (model, tmp_path / "." / "model.gguf"):
        with pytest.raises(ParameterError, match="is the model itself"):
            detach_section(model, to=target)
    with pytest.raises(StorageError, match="nowhere/x.gguf: No such file or directory; name a file"):
        detach_section(model, to=tmp_path / "nowhere" / "x.gguf")
    assert holds(model, sections.contents())
    detach_section(model, to=tmp_path / "x.gguf")
    assert holds(model, None)
    attach_section(model, tmp_path / "x.gguf", sidecar=True)
    assert sidecar_path(model).exists() and holds(model, sections.contents())
    attach_section(model, sidecar_path(model))
    assert not sidecar_path(model).exists() and holds(model, sections.contents())


# faults


class Crash(BaseException):
    """The process is gone: not even a handler may do anything from here on."""


class Disk:
    """Stands between section writing and the disk; counts what changes something, and fails at one of them.

    at: the operation, from 0, before which (for a write: in the middle of which) `fault` happens. A Crash goes on for
    ever; an OSError happens at each write from there on, and removing and cutting still work, as on a full disk.
    """

    def __init__(self, at: int, fault: BaseException) -> None:
        self.at, self.fault, self.count = at, fault, 0
        self.real_open, self.real_replace, self.real_unlink, self.real_fsync = open, os.replace, Path.unlink, os.fsync

    def step(self, grows: bool = False) -> bool:
        """Count an operation; raises the fault unless this is a write, which then must fail half-way (True)."""
        self.count += 1
        if self.count <= self.at or (isinstance(self.fault, OSError) and not grows):
            return False
        if grows and self.count == self.at + 1:
            return True
        raise self.fault

    def open(self, path: Any, mode: str) -> Any:
        if mode == "rb":
            return self.real_open(path, mode)
        return File(self, self.real_open(path, mode, buffering=0))

    def replace(self, source: Any, target: Any) -> None:
        self.step()
        self.real_replace(source, target)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        self.step()
        self.real_unlink(path, missing_ok=missing_ok)

    def fsync(self, descriptor: int) -> None:
        self.step()
        self.real_fsync(descriptor)

    @contextmanager
    def between(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (section_image, section_file):
                patch.setattr(module, "open", self.open, raising=False)
            patch.setattr(os, "replace", self.replace)
            patch.setattr(os, "fsync", self.fsync)
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok))
            yield


class File:
    most = 10**12

    def __init__(self, disk: Disk, raw: Any) -> None:
        self.disk, self.raw = disk, raw

    def write(self, data: Any) -> int:
        half = self.disk.step(grows=True)
        with memoryview(data) as view:
            if self.raw.tell() + len(view) > self.most:
                self.raw.write(view[: self.most - self.raw.tell()])
                raise OSError(errno.ENOSPC, "full")
            done: int = self.raw.write(view[: len(view) // 2] if half else view)
        if half:
            raise self.disk.fault
        return done

    def truncate(self, size: int) -> None:
        self.disk.step()
        self.raw.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


SMALL, LARGE = sections.contents("profile", seed=3), sections.contents(seed=4)
SAME = sections.contents("profile", seed=5)
ALL_PARTS = list(sections.PARTS)
Change = Callable[[Path], object]
# name -> (the section before, what is done, the section after)
CHANGES: dict[str, tuple[Contents | None, Change, Contents | None]] = {
    "attach": (None, lambda model: update_section(model, LARGE), LARGE),
    "enlarge": (SMALL, lambda model: update_section(model, LARGE, drop=ALL_PARTS), LARGE),
    "shrink": (LARGE, lambda model: update_section(model, SMALL, drop=ALL_PARTS), SMALL),
    "same size": (SMALL, lambda model: update_section(model, SAME), SAME),
    "sidecar": (SMALL, lambda model: update_section(model, SAME, sidecar=True), SAME),
    "detach": (SMALL, lambda model: detach_section(model), None),
    "keep": (SMALL, lambda model: detach_section(model, keep_sidecar=True), SMALL),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_crash_at_any_step(model: Path, name: str) -> None:
    old, change, new = CHANGES[name]
    base = model.read_bytes()
    for at in range(500):
        if old is not None:
            update_section(model, old)
        try:
            with Disk(at, Crash()).between():
                change(model)
            break
        except Crash:
            pass
        assert model.read_bytes()[: len(base)] == base
        assert holds(model, old) or holds(model, new), at
        if at % 3 == 0:  # what is left is in nobody's way
            update_section(model, SAME)
            assert {one for one in files(model) if "part" in one} == set()
        if not holds(model, None):
            detach_section(model)
        elif model.stat().st_size != len(base):
            update_section(model, SAME)
            detach_section(model)
        assert model.read_bytes() == base and not sidecar_path(model).exists(), at
    assert at >= {"detach": 2, "keep": 2, "sidecar": 8}.get(name, 20) and holds(model, new)


@pytest.mark.parametrize("name", CHANGES)
def test_a_full_disk_at_any_step(model: Path, name: str) -> None:
    old, change, new = CHANGES[name]
    base = model.read_bytes()
    if old is not None:
        update_section(model, old)
    before, failed = model.read_bytes(), 0
    for at in range(500):
        try:
            with Disk(at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).between():
                change(model)
        except StorageError as error:
            failed += 1
            assert "No space left on device; " in str(error) and "\n" not in str(error)
            assert not {one for one in files(model) if "part" in one}
            if sidecar_path(model).exists():  # it was written, only the model was not
                assert f"the section is beside it, in {sidecar_path(model).name}" in str(error) and holds(model, new)
                sidecar_path(model).unlink()
            else:
                assert holds(model, old)
            after = model.read_bytes()
            assert after == before or (after == base and name in ("shrink", "same size", "enlarge"))
            if after != before:
                update_section(model, old or NOTHING)
            continue
        if holds(model, new):  # so many writes it does not have
            break
    assert holds(model, new) and failed >= {"detach": 0, "keep": 3, "sidecar": 3}.get(name, 6)


class Short(Disk):
    """A disk on which the model file may not become longer than `most` bytes."""

    def __init__(self, model: Path, most: int) -> None:
        super().__init__(10**6, Crash())
        self.model, self.most = model, most

    def open(self, path: Any, mode: str) -> Any:
        file = super().open(path, mode)
        if path == self.model and mode != "rb":
            file.most = self.most
        return file


def test_growing_into_a_full_disk_changes_nothing(model: Path) -> None:
    """The old section is lost only when there is room for all of the new one."""
    update_section(model, SMALL)
    before = model.read_bytes()
    shutil.copy(model, model.with_name("copy.gguf"))
    size = update_section(model.with_name("copy.gguf"), LARGE, drop=ALL_PARTS).stat().st_size
    for most in [*range(len(before), size, 4001), size - 60, size - 1]:
        with pytest.raises(StorageError, match="model.gguf: full; the section is beside it"):
            with Short(model, most).between():
                update_section(model, LARGE, drop=ALL_PARTS)
        assert model.read_bytes() == before and holds(model, LARGE)
        sidecar_path(model).unlink()
    with Short(model, size).between():
        update_section(model, LARGE, drop=ALL_PARTS)
    assert holds(model, LARGE) and model.stat().st_size == size


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there; kill -9 is POSIX")
def test_kills_at_random_moments(tmp_path: Path) -> None:
    script = Path(section_crash.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", "40", "--folder", str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(script.parent)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("40 kills: ") and ", 0 torn," in done.stdout
    assert ", 0 mid-change" not in done.stdout


# locks and permissions


def test_two_processes(model: Path) -> None:
    with FileLock(file_lock.lock_path(model)):
        for change in (
            lambda: update_section(model, SMALL),
            lambda: update_section(model, SMALL, sidecar=True),
            lambda: attach_section(model, model),
            lambda: detach_section(model),
        ):
            with pytest.raises(StorageError, match="model.gguf: another process is attaching to it or detaching"):
                change()
    update_section(model, SMALL)
    with FileLock(file_lock.lock_path(model)):
        assert holds(model, SMALL)  # readers need no lock


def test_two_processes_at_once(model: Path) -> None:
    """Both change the section again and again: each change succeeds or is refused, and the last one is whole."""
    code = (
        "import sys, time, sections; from hotcold.formats.errors import StorageError\n"
        "from hotcold.formats.section_file import update_section\n"
        "model, seed, done = sys.argv[1], int(sys.argv[2]), 0\n"
        "while done < 20:\n"
        "    try: update_section(model, sections.contents('profile', 'down_t', seed=seed)); done += 1\n"
        "    except StorageError as error:\n"
        "        assert 'another process is attaching' in str(error), error\n"
        "        time.sleep(0.001)\n"
        "print(done)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(sections.__file__).parent)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(model), seed], stdout=subprocess.PIPE, env=env, text=True)
        for seed in ("1", "2")
    ]
    counts = [int(one.communicate(timeout=120)[0]) for one in both]
    assert sum(counts) >= 40 and min(counts) >= 0
    assert any(holds(model, sections.contents("profile", "down_t", seed=seed)) for seed in (1, 2))


@pytest.mark.skipif(not file_lock.HAS_FLOCK, reason="Windows itself refuses to cut a mapped file")
def test_a_section_in_use_is_not_pulled_away(model: Path) -> None:
    update_section(model, SMALL)
    before = model.read_bytes()
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        with pytest.raises(StorageError, match="its section is in use by a running model; end that first"):
            detach_section(model)
        with pytest.warns(UserWarning, match="in use by a running model; the new one is beside it, in .*hotcold-model"):
            assert update_section(model, LARGE, drop=ALL_PARTS) == sidecar_path(model)
        assert model.read_bytes() == before and holds(model, LARGE)
        sections.assert_holds(section, SMALL)
        freq = section.image.data("blk.0.ffn_act_freq")
    with pytest.raises(StorageError, match="in use"):  # a view keeps the mapping
        detach_section(model)
    del freq
    update_section(model, SMALL, drop=ALL_PARTS)
    assert not sidecar_path(model).exists() and holds(model, SMALL)


@pytest.mark.skipif(not file_lock.HAS_FLOCK, reason="needs flock")
def test_a_reader_meets_a_writer(model: Path) -> None:
    update_section(model, SMALL)
    with open(model, "r+b") as raw:
        assert file_lock.claim(raw.fileno())
        with GGUFFile(model) as file, pytest.warns(UserWarning, match="another process is changing it"):
            assert find_section(file) is None
    assert holds(model, SMALL)


def test_a_read_only_model(model: Path) -> None:
    update_section(model, SMALL)
    model.chmod(0o444)
    before = model.read_bytes()
    with pytest.raises(StorageError, match="model.gguf: a read-only file; use --sidecar to put the section beside it"):
        update_section(model, LARGE)
    with pytest.raises(StorageError, match="model.gguf: a read-only file; its section stays in it"):
        detach_section(model)
    assert not sidecar_path(model).exists()
    assert update_section(model, sections.contents("thresholds"), sidecar=True) == sidecar_path(model)
    assert holds(model, sections.joined(SMALL, sections.contents("thresholds"))) and model.read_bytes() == before
    model.chmod(0o644)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder(model: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StorageError, match="model.gguf: its folder cannot be written: (Permission denied|Read-only)"):
        update_section(model, SMALL)


def test_a_file_system_without_locks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "HAS_FLOCK", False)
    monkeypatch.setattr(section_file, "HAS_FLOCK", False)
    for wanted in (SMALL, LARGE, SMALL):
        update_section(model, wanted, drop=ALL_PARTS)
        assert holds(model, wanted)
    before = model.read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # Windows: a mapped range cannot be cut off

        def refuse(file: Any, size: int) -> None:
            raise section_file._InUseError

        patch.setattr(section_file, "_cut_unmapped", refuse)
        with pytest.warns(UserWarning, match="in use"):
            update_section(model, LARGE, drop=ALL_PARTS)
    assert model.read_bytes() == before and holds(model, LARGE)


# commands


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    result = invoke("section", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"hotcold: error: {model}: it has no section; `hotcold profile` makes one\n"
    assert "Section:" not in invoke("inspect", model).stdout
    update_section(model, sections.contents())
    shown = invoke("section", model, "--verify").stdout
    for line in (
        "attached to",
        "text of 0, exact",
        "relu on ffn_norm",
        "rank    64",
        "Q8_0",
        "density 0.75",
        "is right",
    ):
        assert line in shown
    assert "Section: profile, thresholds, predictors, down_t; " in invoke("inspect", model).stdout
    import json

    report = json.loads(invoke("section", model, "--json").stdout)
    assert [layer["rank"] for layer in report["predictors"]["layers"]] == [32, 64]
    assert report["profile"]["tokens"] == 2**40 and len(report["profile"]["active_share"]) == 2
    assert report["down_t"] == {"types": ["Q8_0"], "bytes": 2 * 64 * 96 // 32 * 34} and report["attached"]
    assert invoke("detach", model, "--to", tmp_path / "x", "--keep-sidecar").exit_code == 1
    assert invoke("detach", model, "--to", tmp_path / "x").exit_code == 0
    assert model.read_bytes() == before
    assert invoke("attach", model, tmp_path / "x", "--sidecar").stdout == f"{sidecar_path(model)}\n"
    assert "in hotcold-model.gguf" in invoke("inspect", model).stdout
    assert invoke("attach", model, sidecar_path(model)).stdout == f"{model}\n"
    assert invoke("detach", model, "--keep-sidecar").exit_code == 0 and sidecar_path(model).exists()
    assert invoke("detach", model).exit_code == 0 and model.read_bytes() == before
    result = invoke("attach", model, tmp_path / "absent")
    assert result.exit_code == 1 and "absent cannot be opened: No such file" in result.stderr


def test_verify_says_what_is_damaged(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotcold.formats.section.SMALL", 0)
    update_section(model, sections.contents("profile"))
    with open(model, "r+b") as raw:
        raw.seek(-200, os.SEEK_END)
        raw.write(b"!!!!")
    assert invoke("section", model).exit_code == 0
    result = invoke("section", model, "--verify")
    assert result.exit_code == 1 and "the checksum of 1 tensors is wrong, blk.1.ffn_act_freq among" in result.stderr


def test_inspect_of_what_cannot_be_used(model: Path, tiny_model: Callable[..., Path]) -> None:
    other = Path(shutil.copy(tiny_model(tied=True), model.parent / "other.gguf"))
    shutil.copy(update_section(other, SMALL, sidecar=True), sidecar_path(model))
    result = invoke("inspect", model)
    assert result.exit_code == 0 and "Section: not usable: " in result.stdout and "another model" in result.stdout
    with pytest.raises(HotcoldError):
        holds(model, None)
