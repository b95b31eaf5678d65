"""Compiles CUDA kernels to PTX and assembles them with ptxas, on a machine without a GPU.

    python tests/cuda_ptx.py [NAME ...]     (default: all kernels)

Prints registers and spilled bytes of each for sm_75 and sm_90. Needs Numba's compiler, so not its simulator.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

from hotcold.runtime.cuda import jit

CAPABILITIES = ((7, 5), (9, 0))


class Assembled(NamedTuple):
    """What ptxas says of a kernel: registers a thread, bytes of spilled stores and loads, shared memory of a block."""

    registers: int
    spilled: int
    shared: int


def ptx(name: str, capability: tuple[int, int]) -> str:
    """The kernel as PTX for a compute capability."""
    from numba import cuda, types

    source = jit.program(name, jit.WARP)
    # A device function asks the device for its capability, and there may be none.
    device = SimpleNamespace(compute_capability=capability)
    with patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        text, _ = cuda.compile_ptx(source.function, types.void(*source.signature), cc=capability, fastmath=True)
    return str(text)


def ptxas() -> Path:
    """The assembler, from the package nvidia-cuda-nvcc."""
    import nvidia

    found = [path for root in nvidia.__path__ for path in Path(root).glob("**/bin/ptxas*")]
    if not found:
        raise FileNotFoundError("ptxas: pip install 'nvidia-cuda-nvcc==13.0.*'")
    return found[0]


def assemble(name: str, capability: tuple[int, int]) -> Assembled:
    """Compile and assemble a kernel; CalledProcessError carries what ptxas said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx(name, capability))
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        command = [str(ptxas()), "-v", arch, str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def figure(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, said))

    return Assembled(figure(r"Used (\d+) registers"), figure(r"(\d+) bytes spill"), figure(r"(\d+) bytes smem"))


def main(names: list[str]) -> None:
    print(f"{'kernel':32s} {'arch':6s} registers spilled shared")
    for name in names or jit.names():
        for capability in CAPABILITIES:
            r = assemble(name, capability)
            arch = f"sm_{capability[0]}{capability[1]}"
            print(f"{name:32s} {arch:6s} {r.registers:9d} {r.spilled:7d} {r.shared:6d}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
