"""Every CUDA kernel compiled to PTX for two generations of GPUs and assembled, on any machine: `pytest -m ptx`.

Two processes at a time, because Numba chooses between simulator and compiler when it is imported. Prints what ptxas
says; nothing may be spilled, kept in local memory or computed in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotcold.runtime.cuda import jit

pytestmark = pytest.mark.ptx
WORKERS = 2
MOST_REGISTERS = 224  # of a thread; devices have 255, and a block of 256 threads must fit in 65536
MOST_SHARED = 32 * 1024  # bytes of a block; devices have at least 48 KiB

WORK = """
import functools, json, re, sys
import cuda_ptx
from hotcold.runtime.cuda import jit

cuda_ptx.ptx = functools.cache(cuda_ptx.ptx)
for name in jit.names()[int(sys.argv[1]) :: int(sys.argv[2])]:
    for capability in cuda_ptx.CAPABILITIES:
        text = cuda_ptx.ptx(name, capability)
        doubles, local = len(re.findall(r"[.]f64", text)), len(re.findall(r"[.]local", text))
        made = cuda_ptx.assemble(name, capability)
        print(json.dumps([name, "sm_%d%d" % capability, *made, doubles, local]), flush=True)
"""


def test_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(i), str(WORKERS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(WORKERS)
    ]
    said = [worker.communicate() for worker in workers]
    rows = [json.loads(line) for output, _ in said for line in output.splitlines() if line.startswith("[")]
    with capsys.disabled():
        print(f"\n{'kernel':32s} arch  registers spilled shared")
        for name, arch, registers, spilled, shared, *_ in sorted(rows):
            print(f"{name:32s} {arch} {registers:9d} {spilled:7d} {shared:6d}")
    assert [worker.returncode for worker in workers] == [0] * WORKERS, "".join(error for _, error in said)[-4000:]
    assert {(name, arch) for name, arch, *_ in rows} == {(n, arch) for n in jit.names() for arch in ("sm_75", "sm_90")}
    for name, arch, registers, spilled, shared, doubles, local in rows:
        assert registers <= MOST_REGISTERS and shared <= MOST_SHARED, (name, arch)
        assert not spilled and not doubles and not local, (name, arch)
