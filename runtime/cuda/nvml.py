"""A GPU's memory as its driver counts it, through NVML: no CUDA context is needed, so looking costs no memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ...formats.errors import GPUError

INSTALL = "pip install 'hotcold[cuda]'"


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU's memory; used_by_us: of this process, its CUDA context included."""

    total: int
    free: int
    used_by_us: int


_BEFORE: dict[str, int] = {}  # by GPU: bytes taken before this process took any


class Monitor:
    """NVML's view of a machine and of one GPU. GPUError says why it cannot be had.

    driver: version of the driver. cuda: the newest CUDA (major, minor) that it supports.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise GPUError(f"no GPU: the package nvidia-ml-py is missing; {INSTALL}") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._open = True
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
            newest = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
            self.cuda = newest // 1000, newest % 1000 // 10
            self.count = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise GPUError(f"no GPU: {_why(pynvml, error)}") from None
        if self.count == 0:
            self.close()
            raise GPUError(f"no GPU: driver {self.driver} finds none in this machine")
        self._handle: Any = None
        self._before = 0

    def select(self, index: int, uuid: str = "") -> None:
        """The GPU that memory() is about: by its UUID, as CUDA may count in another order, else by NVML's index."""
        for find, key in ((self._nvml.nvmlDeviceGetHandleByUUID, uuid), (self._nvml.nvmlDeviceGetHandleByIndex, index)):
            if key == "":
                continue
            try:
                self._handle = find(key)
                break
            except self._nvml.NVMLError as error:
                failed = error
        else:
            raise GPUError(f"GPU {index}: NVML does not know it ({failed})")
        # The first time in this process: a context that a closed device left behind is ours as well.
        self._before = _BEFORE.setdefault(uuid or str(index), self._used())

    @property
    def name(self) -> str:
        """The GPU's product name."""
        return _text(self._nvml.nvmlDeviceGetName(self._handle))

    def memory(self) -> Memory:
        """The GPU's memory now; where its driver does not count by process, all taken since select() is ours."""
        info = self._info()
        ours = self._by_process()
        return Memory(int(info.total), int(info.free), max(0, int(info.used) - self._before) if ours is None else ours)

    def close(self) -> None:
        """Leave NVML; again is no error."""
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                pass

    def _info(self) -> Any:
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            raise GPUError(f"memory of the GPU: NVML says {error}") from None

    def _used(self) -> int:
        return int(self._info().used)

    def _by_process(self) -> int | None:
        """Bytes of this process, or None: not supported here, or counted under another id, as in a container."""
        try:
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        except self._nvml.NVMLError:
            pass
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _why(pynvml: Any, error: Exception) -> str:
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "no NVIDIA driver is installed (its library NVML is not found)"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is installed, but not loaded"
    if isinstance(error, pynvml.NVMLError_LibRmVersionMismatch):
        return "the NVIDIA driver was updated while it ran: reboot, or reload its modules"
    if isinstance(error, pynvml.NVMLError_FunctionNotFound):
        return "the NVIDIA driver is too old for this NVML: update it"
    return f"NVML says {error}"
