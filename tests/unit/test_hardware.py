"""What is known of a machine: measured on the simulator, kept, written and read as JSON, and bad files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hotcold.formats.errors import FormatError, GPUError, ModelNotFoundError
from hotcold.runtime.cuda import device
from hotcold.solver import hardware, hardware_speed
from hotcold.solver.hardware import NOMINAL, Hardware, this_machine

MACHINE = Hardware("a; b", {1: 1e10, 4: 3e10}, 5e11, 1e-6, 2e10, 5e-6, 2e-6, 2**33, 2**34, 80)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Little to measure, and a cache of one's own."""
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hardware_speed, "ROUNDS", 2)
    monkeypatch.setattr(hardware_speed, "REPEATS", 3)
    monkeypatch.setattr(hardware_speed, "GPU_BYTES", 1 << 16)
    monkeypatch.setattr(hardware_speed, "CPU_BYTES", 1 << 20)
    return tmp_path / "home"


def plausible(machine: Hardware) -> bool:
    speeds = [*machine.cpu_read.values(), machine.gpu_read, machine.link_bandwidth]
    times = [machine.link_latency, machine.sync, machine.launch]
    return all(1e3 < speed < 1e15 for speed in speeds) and all(0 <= time < 1 for time in times)


def test_measured_once_and_kept(small: Path) -> None:
    said: list[str] = []
    first, missing = this_machine(2, said.append)
    assert missing is None and plausible(first)
    opened = device.open_device()
    try:
        assert first.name.endswith(f"; {opened.name}") and said[-1] == f"measuring {opened.name}"
        assert (first.processors, first.gpu_total) == (opened.processors, opened.memory().total)
        assert first.gpu_free is not None and 0 < first.gpu_free <= first.gpu_total
    finally:
        opened.close()
    assert list(first.cpu_read) == [1, 2] and len(list((small / "hardware").iterdir())) == 2
    said.clear()
    again, _ = this_machine(2, said.append)
    assert said == [] and replace(again, gpu_free=first.gpu_free) == first
    this_machine(3, said.append)
    assert said == ["measuring how fast the CPU reads memory"]


def test_a_damaged_or_unwritable_cache_is_measured_again(small: Path) -> None:
    this_machine(1)
    for file in (small / "hardware").iterdir():
        file.write_text("{")
    said: list[str] = []
    this_machine(1, said.append)
    assert len(said) == 2
    for file in (small / "hardware").iterdir():
        file.unlink()
    (small / "hardware").rmdir()
    (small / "hardware").write_text("in the way")
    assert plausible(this_machine(1)[0])


def test_without_a_gpu_the_reason_and_made_up_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int | None = None) -> Any:
        raise GPUError("no GPU: no NVIDIA driver is installed")

    monkeypatch.setattr(device, "open_device", fail)
    machine, missing = this_machine(1)
    assert missing == "no GPU: no NVIDIA driver is installed"
    assert machine.gpu_free is None and machine.gpu_read == NOMINAL.gpu_read and "no GPU" in machine.name
    assert machine.cpu_read != NOMINAL.cpu_read and machine.name.startswith(hardware.cpu_name())


def test_cpu_bandwidth_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def read_rate(*arguments: int) -> float:
        asked.append(arguments)
        return float(arguments[0])

    monkeypatch.setattr(hardware_speed, "read_rate", read_rate)
    assert hardware_speed.cpu_read(3, 1 << 20) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert asked == [(count, 1 << 20, hardware_speed.ROUNDS) for count in (1, 2, 3)]


def test_bandwidth_by_threads_and_hand_overs() -> None:
    assert [MACHINE.cpu_bandwidth(n) for n in (1, 3, 4, 99)] == [1e10, 1e10, 3e10, 3e10]
    assert replace(MACHINE, cpu_read={8: 5.0}).cpu_bandwidth(2) == 5.0
    assert MACHINE.handover(20_000) == pytest.approx(5e-6 + 1e-6 + 1e-6)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for machine in (MACHINE, replace(MACHINE, gpu_free=None)):
        machine.save(path)
        assert Hardware.load(path) == machine
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["machine.json"]
    short = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("launch", "gpu_free")}
    path.write_text(json.dumps(short))
    assert Hardware.load(path) == replace(MACHINE, gpu_free=None, launch=NOMINAL.launch)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "key 'name': got '', wanted a text"),
        ({"name": 3}, "key 'name': got 3, wanted a text"),
        ({"gpu_read": 0}, "key 'gpu_read': got 0, wanted a number above 0"),
        ({"gpu_read": "fast"}, "key 'gpu_read': got 'fast'"),
        ({"gpu_read": None}, "key 'gpu_read': got None"),
        ({"gpu_read": True}, "key 'gpu_read': got True"),
        ({"gpu_read": float("nan")}, "key 'gpu_read': got nan"),
        ({"link_bandwidth": float("inf")}, "key 'link_bandwidth': got inf"),
        ({"sync": -1}, "key 'sync': got -1, wanted a number of at least 0"),
        ({"gpu_total": 1.5}, "key 'gpu_total': got 1.5, wanted a whole number above 0"),
        ({"gpu_free": 2**70}, "key 'gpu_free'"),
        ({"cpu_read": {}}, "key 'cpu_read': got {}, wanted bandwidths by number of threads"),
        ({"cpu_read": 5e10}, "key 'cpu_read'"),
        ({"cpu_read": {"0": 1}}, "key 'cpu_read'"),
        ({"cpu_read": {"two": 1}}, "key 'cpu_read'"),
        ({"cpu_read": {"2": -1}}, "key 'cpu_read.2': got -1"),
        ({"speed": 1}, "key: got 'speed', wanted one of name, cpu_read"),
    ],
)
def test_bad_files(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(asdict(MACHINE) | change))
    with pytest.raises(FormatError) as error:
        Hardware.load(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 5000, b" " * 2**21])
def test_files_that_are_no_objects(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="JSON") as error:
        Hardware.load(path)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Hardware.load(tmp_path / "none.json")
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Hardware.load(tmp_path)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(FormatError, match="key 'cpu_read': got none, wanted one"):
        Hardware.load(path)
