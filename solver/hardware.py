"""What a placement must know of a machine: how fast each side reads, and what passing data between them costs.

Measured once (hardware_speed.py) and kept under the user's cache folder; free memory is asked for every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import FormatError, GPUError, ModelNotFoundError
from ..runtime import models

if TYPE_CHECKING:
    from ..runtime.cuda.device import Device

_FORMAT = 1  # of what is kept; a new one is measured again
_LARGEST = 2**20  # bytes of a JSON file
_COUNT = re.compile(r"[1-9][0-9]{0,5}")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Hardware:
    """A CPU and a GPU. Bandwidths in bytes a second, times in seconds.

    cpu_read: by number of threads. link_latency, link_bandwidth: from the host's memory to the GPU's. sync: for one
    side to notice that the other has sent something. launch: of a kernel, in a queue of kernels. gpu_free: bytes that
    are free now, None where nobody knows.
    """

    name: str
    cpu_read: Mapping[int, float]
    gpu_read: float
    link_latency: float
    link_bandwidth: float
    sync: float
    launch: float
    gpu_free: int | None
    gpu_total: int
    processors: int

    def cpu_bandwidth(self, threads: int) -> float:
        """With that many threads, or the most that were measured below."""
        fewer = [count for count in self.cpu_read if count <= threads]
        return self.cpu_read[max(fewer) if fewer else min(self.cpu_read)]

    def handover(self, nbytes: int) -> float:
        """Seconds until the other side goes on with nbytes of this one's."""
        return self.sync + self.link_latency + nbytes / self.link_bandwidth

    def save(self, path: Path) -> None:
        """Write the JSON form, under a temporary name first."""
        text = json.dumps({**asdict(self), "cpu_read": {str(n): speed for n, speed in self.cpu_read.items()}}, indent=1)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """From the JSON form; launch, gpu_free and processors may be missing. ModelNotFoundError, FormatError."""
        try:
            with open(path, "rb") as file:
                raw = file.read(_LARGEST + 1)
        except OSError as error:
            raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            data = json.loads(raw) if len(raw) <= _LARGEST else None
        except (ValueError, RecursionError) as error:
            raise FormatError(path, "JSON", " ".join(str(error).split()), "an object") from None
        if not isinstance(data, dict):
            raise FormatError(path, "JSON", type(data).__name__, "an object")
        return _checked(path, data)


# On a machine without a GPU, a budget given in bytes is planned for this one, and the user told so.
NOMINAL = Hardware("no GPU, planned for one of 500 GB/s", {1: 2e10}, 5e11, 1e-5, 2e10, 2e-5, 3e-6, None, 24 << 30, 80)
_OPTIONAL = {"launch": NOMINAL.launch, "gpu_free": None, "processors": NOMINAL.processors}


def _checked(path: Path, data: dict[str, Any]) -> Hardware:
    fields = list(Hardware.__dataclass_fields__)
    for key in data:
        if key not in fields:
            raise FormatError(path, "key", ascii(key)[:60], f"one of {', '.join(fields)}")
    data = _OPTIONAL | data
    for key in fields:
        if key not in data:
            raise FormatError(path, f"key '{key}'", "none", "one")

    def number(key: str, value: object, whole: bool = False, zero: bool = False) -> Any:
        kinds = (int,) if whole else (int, float)
        if not (type(value) in kinds and 0 <= value < 2**62 and (value or zero)):  # type: ignore[operator]
            wanted = f"a {'whole ' if whole else ''}number {'of at least 0' if zero else 'above 0'}"
            raise FormatError(path, f"key '{key}'", ascii(value)[:60], wanted)
        return value if whole else float(value)  # type: ignore[arg-type]

    if not isinstance(data["name"], str) or not data["name"].strip():
        raise FormatError(path, "key 'name'", ascii(data["name"])[:60], "a text")
    threads = data["cpu_read"]
    if not isinstance(threads, dict) or not threads or not all(map(_COUNT.fullmatch, threads)):
        wanted = 'bandwidths by number of threads, such as {"1": 2e10, "8": 6e10}'
        raise FormatError(path, "key 'cpu_read'", ascii(threads)[:60], wanted)
    return Hardware(
        name=data["name"].strip(),
        cpu_read={int(n): number(f"cpu_read.{n}", threads[n]) for n in sorted(threads, key=int)},
        gpu_read=number("gpu_read", data["gpu_read"]),
        link_latency=number("link_latency", data["link_latency"], zero=True),
        link_bandwidth=number("link_bandwidth", data["link_bandwidth"]),
        sync=number("sync", data["sync"], zero=True),
        launch=number("launch", data["launch"], zero=True),
        gpu_free=None if data["gpu_free"] is None else number("gpu_free", data["gpu_free"], whole=True, zero=True),
        gpu_total=number("gpu_total", data["gpu_total"], whole=True),
        processors=number("processors", data["processors"], whole=True),
    )


def this_machine(threads: int, progress: Progress | None = None) -> tuple[Hardware, str | None]:
    """This machine, measured where it is not known yet; without a usable GPU, NOMINAL's figures and the reason."""
    from . import hardware_speed

    say = progress or (lambda line: None)
    cpu = cpu_name()

    def measure_cpu() -> Hardware:
        say("measuring how fast the CPU reads memory")
        return replace(NOMINAL, name=cpu, cpu_read=hardware_speed.cpu_read(threads))

    known = _kept(f"cpu {cpu} {threads}", measure_cpu)
    device: Device | None = None
    try:
        from ..runtime.cuda.device import open_device

        device = open_device()
        opened = device

        def measure_gpu() -> Hardware:
            say(f"measuring {opened.name}")
            return hardware_speed.gpu(opened, NOMINAL)

        speeds = _kept(f"gpu {device.name} {device.driver} {device.capability} {cpu}", measure_gpu)
        memory = device.memory()
    except GPUError as error:
        return replace(NOMINAL, name=f"{cpu}; {NOMINAL.name}", cpu_read=known.cpu_read), str(error)
    except ImportError as error:
        reason = f"no GPU: {error}; pip install 'hotcold[cuda]'"
        return replace(NOMINAL, name=f"{cpu}; {NOMINAL.name}", cpu_read=known.cpu_read), reason
    finally:
        if device is not None:
            device.close()
    # what this process has of it already, the context above all, is in the budget too
    free = memory.free + (memory.used_by_us or 0)
    name = f"{cpu}; {device.name}"
    return replace(speeds, name=name, cpu_read=known.cpu_read, gpu_free=free, gpu_total=memory.total), None


def cpu_name() -> str:
    """The CPU as it calls itself."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())[:80]
    return (platform.processor() or platform.machine() or "CPU")[:80]


def _kept(what: str, measure: Callable[[], Hardware]) -> Hardware:
    """What was measured before under this name, else measured now and kept if the folder can be written."""
    digest = hashlib.sha256(f"{_FORMAT} {what}".encode()).hexdigest()[:16]
    path = models.home() / "hardware" / f"{what.split()[0]}-{digest}.json"
    with suppress(FormatError, ModelNotFoundError):
        return Hardware.load(path)
    found = measure()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found
