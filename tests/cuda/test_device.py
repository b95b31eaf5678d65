"""Opening a GPU, its memory and its failures: NVML and numba.cuda are faked, as is the memory of the simulator."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hotcold.formats.errors import GPUError, HotcoldError
from hotcold.runtime.cuda import device as module
from hotcold.runtime.cuda import jit
from hotcold.runtime.cuda.device import Device, open_device
from hotcold.runtime.cuda.nvml import Memory

GIB = 1 << 30


class NVMLError(Exception):
    pass


class FakeNVML(types.ModuleType):
    """The few functions of pynvml that are used; `fails` names one that raises, and with what."""

    NVMLError = NVMLError
    NVMLError_LibraryNotFound = type("NVMLError_LibraryNotFound", (NVMLError,), {})
    NVMLError_DriverNotLoaded = type("NVMLError_DriverNotLoaded", (NVMLError,), {})
    NVMLError_LibRmVersionMismatch = type("NVMLError_LibRmVersionMismatch", (NVMLError,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (NVMLError,), {})
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NVMLError,), {})

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.fails: dict[str, NVMLError] = {}
        self.count, self.cuda, self.used, self.sessions = 1, 13000, 2 * GIB, 0
        self.processes: list[SimpleNamespace] = []

    def _call(self, name: str, value: Any) -> Any:
        if name in self.fails:
            raise self.fails[name]
        return value

    def nvmlInit(self) -> None:
        self._call("nvmlInit", None)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return str(self._call("uuid", uuid))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return str(self._call("index", index))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB, free=80 * GIB - self.used, used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return list(self._call("processes", self.processes))


class CudaAPIError(Exception):
    """As numba.cuda's: known by its module."""

    __module__ = "numba.cuda.cudadrv.driver"


class FakeGPU:
    """A GPU as numba.cuda.gpus holds it."""

    name, uuid, MULTIPROCESSOR_COUNT = b"Fake 100", "GPU-1", 100

    def __init__(self) -> None:
        self.compute_capability, self.depth, self.resets = (9, 0), 0, 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1

    def reset(self) -> None:
        self.resets += 1
        raise CudaAPIError("reset fails too")


class FakeCUDA(SimpleNamespace):
    """numba.cuda with one or more GPUs."""

    def __init__(self, gpus: list[FakeGPU]) -> None:
        cleared: list[bool] = []
        super().__init__(
            gpus=gpus,
            toolkit=(13, 0),
            runtime=SimpleNamespace(get_version=lambda: self.toolkit),
            stream=lambda: "stream",
            event=lambda: 1.0,
            event_elapsed_time=lambda a, b: 2500.0,
            synchronize=lambda: None,
            to_device=lambda array: array.copy(),
            device_array=np.empty,
            pinned_array=np.empty,
            mapped_array=np.empty,
            cleared=cleared,
            current_context=lambda: SimpleNamespace(
                deallocations=SimpleNamespace(clear=lambda: cleared.append(True)),
                memory_manager=SimpleNamespace(deallocations=SimpleNamespace(clear=lambda: None)),
            ),
        )


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, nvml: FakeNVML) -> FakeCUDA:
    """A machine whose GPUs are fakes, and not the simulator's."""
    import numba

    fake = FakeCUDA([FakeGPU(), FakeGPU()])
    monkeypatch.setattr(numba, "cuda", fake, raising=False)
    monkeypatch.setattr(jit, "simulated", lambda: False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "_OPEN", {})
    monkeypatch.delenv("HOTCOLD_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def refused(*words: str) -> str:
    """open_device() raises a GPUError of one line with these words."""
    with pytest.raises(GPUError) as caught:
        open_device()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: object) -> Any:
        raise error

    return fail


def test_what_a_device_knows(cuda: FakeCUDA, nvml: FakeNVML) -> None:
    nvml.processes = [SimpleNamespace(pid=os.getpid() + i, usedGpuMemory=n) for i, n in ((1, 7), (0, 5))]
    device = open_device()
    assert (device.index, device.name, device.capability) == (0, "Fake 100", (9, 0))
    assert (device.driver, device.processors, device.stream) == ("580.65.06", 100, "stream")
    assert device.memory() == Memory(80 * GIB, 78 * GIB, 5)
    assert device.seconds_between(device.event(), device.event()) == 2.5
    assert str(device) == "GPU 0 (Fake 100)"
    device.close()
    assert nvml.sessions == 0 and cuda.gpus[0].depth == 0 and cuda.cleared == [True] and cuda.gpus[0].resets == 0


@pytest.mark.parametrize("hidden", ["other pid", "no number", "not supported"])
def test_memory_where_processes_are_not_counted(cuda: FakeCUDA, nvml: FakeNVML, hidden: str) -> None:
    """What was taken on the whole GPU since it was opened is ours."""
    if hidden == "not supported":
        nvml.fails["processes"] = nvml.NVMLError_NotSupported()
    else:
        pid = os.getpid() + (hidden == "other pid")
        nvml.processes = [SimpleNamespace(pid=pid, usedGpuMemory=None if hidden == "no number" else 1)]
    device = open_device()
    nvml.used += 300
    assert device.memory() == Memory(80 * GIB, 78 * GIB - 300, 300)
    device.check_budget(300)
    with pytest.raises(GPUError, match="300 bytes are in use, more than the budget of 299"):
        device.check_budget(299)
    device.close()


def test_a_gpu_that_nvml_knows_by_number_only(cuda: FakeCUDA, nvml: FakeNVML) -> None:
    nvml.fails["uuid"] = NVMLError("Not Found")
    open_device().close()
    nvml.fails["index"] = NVMLError("Invalid Argument")
    refused("GPU 0", "Invalid Argument")
    assert nvml.sessions == 0


def test_missing_packages(cuda: FakeCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    refused("nvidia-ml-py", "pip install 'hotcold[cuda]'")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused("numba-cuda", "pip install 'hotcold[cuda]'")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("LibraryNotFound", "no NVIDIA driver is installed"),
        ("DriverNotLoaded", "not loaded"),
        ("LibRmVersionMismatch", "reboot"),
        ("FunctionNotFound", "too old"),
        ("NotSupported", "strange"),
    ],
)
def test_drivers_that_do_not_answer(cuda: FakeCUDA, nvml: FakeNVML, error: str, words: str) -> None:
    nvml.fails["nvmlInit"] = getattr(nvml, f"NVMLError_{error}")("strange")
    refused("no GPU", words)


def test_a_machine_without_a_gpu(cuda: FakeCUDA, nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.count = 0
    refused("driver 580.65.06 finds none")
    nvml.count, cuda.gpus = 1, []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused("no GPU is visible", "CUDA_VISIBLE_DEVICES is ''")
    assert nvml.sessions == 0


def test_a_driver_that_is_too_old(cuda: FakeCUDA, nvml: FakeNVML) -> None:
    nvml.cuda = 12080
    refused("driver 580.65.06 is too old", "CUDA 12.8", "wanted 13.0")
    nvml.cuda = 13000
    cuda.stream = raising(CudaAPIError("Call to cuLinkAddData results in CUDA_ERROR_UNSUPPORTED_PTX_VERSION"))
    refused("driver 580.65.06 is too old for the installed CUDA toolkit")
    assert nvml.sessions == 0


def test_a_gpu_that_is_too_old(cuda: FakeCUDA) -> None:
    cuda.gpus[0].compute_capability = (7, 0)
    refused("Fake 100", "compute capability 7.0", "wanted 7.5")


def test_a_library_that_cannot_be_found(cuda: FakeCUDA, nvml: FakeNVML) -> None:
    """NVML is there and libcuda is not: numba.cuda says so in several lines."""
    message = "Error at driver init: \n\nCUDA driver library cannot be found.\nEnsure that...\n:"
    type(cuda).gpus = property(raising(CudaAPIError(message)))  # type: ignore[assignment]
    try:
        del cuda.__dict__["gpus"]
        refused("libcuda is not found")
    finally:
        del type(cuda).gpus  # type: ignore[attr-defined]
    assert nvml.sessions == 0


def test_which_gpu(cuda: FakeCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTCOLD_DEVICE", "1")
    with open_device().check("looking"):
        assert [gpu.depth for gpu in cuda.gpus] == [0, 1]
    assert open_device(0).index == 0
    monkeypatch.setenv("HOTCOLD_DEVICE", "2")
    refused("got number 2, wanted 0 to 1")
    for text in ("", "-1", "first"):
        monkeypatch.setenv("HOTCOLD_DEVICE", text)
        refused("HOTCOLD_DEVICE", repr(text))


def test_memory_that_runs_out(cuda: FakeCUDA) -> None:
    """The message has the numbers, and the device goes on."""
    device = open_device()
    works = cuda.to_device
    cuda.to_device = raising(CudaAPIError("Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"))
    with pytest.raises(GPUError, match=rf"GPU 0 \(Fake 100\): out of memory: wanted 4000 bytes, {78 * GIB} are free"):
        device.upload(np.zeros(1000, np.float32))
    cuda.pinned_array = raising(CudaAPIError("CUDA_ERROR_OUT_OF_MEMORY"))
    with pytest.raises(GPUError, match="pinning host memory: out of memory"):
        device.pinned((4,))
    cuda.to_device = works
    np.testing.assert_array_equal(device.upload(np.arange(6.0)[::2]), [0, 2, 4])
    device.close()


def test_a_fault_breaks_the_device(cuda: FakeCUDA, nvml: FakeNVML) -> None:
    """One error, the same at every later use; closing is silent, and the next device is new."""
    device = open_device()
    with pytest.raises(GPUError, match="layer 3: .*ILLEGAL_ADDRESS") as first, device.check("layer 3"):
        raise CudaAPIError("[700] Call to cuStreamSynchronize results in CUDA_ERROR_ILLEGAL_ADDRESS")
    assert isinstance(first.value.__cause__, CudaAPIError) and isinstance(first.value, HotcoldError)
    uses = [device.synchronize, device.event, lambda: device.upload(np.zeros(1)), lambda: device.allocate((1,))]
    for use in uses:
        with pytest.raises(GPUError) as later:
            use()
        assert str(later.value) == str(first.value)
    device.close()
    device.close()
    assert nvml.sessions == 0 and cuda.gpus[0].resets == 1
    open_device().close()


def test_two_devices_on_one_gpu(cuda: FakeCUDA) -> None:
    """The one that fails does not take the GPU from the other."""
    one, other = open_device(), open_device()
    with pytest.raises(GPUError), one.check("it"):
        raise CudaAPIError("fault")
    one.close()
    assert cuda.gpus[0].resets == 0
    other.synchronize()
    other.close()


def test_errors_of_ours_pass_through(cuda: FakeCUDA) -> None:
    device = open_device()
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), device.check("it"):
            raise error
    device.synchronize()
    device.close()
    with pytest.raises(GPUError, match="used after close"):
        device.synchronize()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Device:
    if not jit.simulated():
        pytest.skip("the simulator's memory")
    monkeypatch.setenv("HOTCOLD_SIM_VRAM", "10000")
    monkeypatch.delenv("HOTCOLD_DEVICE", raising=False)
    return open_device()


def test_the_simulators_memory(simulated: Device) -> None:
    """What is handed out counts until it and its views are gone."""
    assert simulated.memory() == Memory(10000, 10000, 0)
    a = simulated.upload(np.arange(1000, dtype=np.float32))
    b = simulated.allocate((10, 50), np.float16)
    assert simulated.memory() == Memory(10000, 5000, 5000)
    view = a[10:20].reshape(2, 5)
    del a
    assert simulated.memory().used_by_us == 5000
    np.testing.assert_array_equal(view.copy_to_host(), np.arange(10, 20).reshape(2, 5))
    with pytest.raises(GPUError, match="out of memory: wanted 5001 bytes, 5000 are free"):
        simulated.allocate((5001,), np.uint8)
    del view, b
    assert simulated.memory() == Memory(10000, 10000, 0)
    kept = simulated.allocate((10000,), np.uint8)
    simulated.check_budget(10000)
    with pytest.raises(GPUError, match="10000 bytes are in use, more than the budget of 9999"):
        simulated.check_budget(9999)
    del kept
    simulated.close()


def test_host_memory(simulated: Device) -> None:
    """Pinned and mapped arrays take nothing of the GPU's memory, and what the host writes the device reads."""
    pinned, mapped = simulated.pinned((3, 4), np.int32), simulated.mapped((5,), np.float32)
    assert pinned.shape == (3, 4) and pinned.dtype == np.int32
    simulated.host_view(mapped)[:] = 7
    np.testing.assert_array_equal(mapped.copy_to_host(), np.full(5, 7, np.float32))
    assert simulated.memory().used_by_us == 0


def test_the_simulator_has_one_gpu(simulated: Device) -> None:
    with pytest.raises(GPUError, match="got number 1, wanted 0"):
        open_device(1)
    start, end = simulated.event(), simulated.event()
    start.record(simulated.stream)
    end.record(simulated.stream)
    end.synchronize()
    assert simulated.seconds_between(start, end) >= 0
