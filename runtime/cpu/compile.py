"""Compile kernels to object files: the child process that jit.py starts, `python -m hotcold.runtime.cpu.compile`.

Numba lives only here, so that a warm start needs neither its import time nor its memory, and several children
compile at once. Its argument is an output folder; kernel names come as lines on stdin, each when the one before is
done, which a line `done NAME` tells.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from numba import types
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from . import isa
from .jit import environment

SYMBOL = "hotcold_kernel"
FAMILIES = {
    "walk": "tape",
    "embed": "embed",
    "norm": "norm",
    "pack": "pack",
    "activate": "pack",
    "matmul": "matmul",
    "matmul_t": "matmul_t",
    "bands": "bands",
    "weave": "weave",
    "select": "select",
    "rows": "rows",
    "down": "down",
    "add_parts": "down",
    "route": "route",
    "combine": "route",
    "experts": "experts",
    "transpose": "transpose",
    "decode": "decode",
    "encode": "encode",
    "read": "read",
    "peak": "peak",
    "rope": "rope",
    "attention": "attention",
}
OPTIONS = {
    "nopython": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
    "boundscheck": False,
}


class _Library(JITCodeLibrary):
    """A function's LLVM module as Numba writes it: optimised and made machine code once, as part of a whole kernel.

    Numba does both for each function, as it could be called by itself: nearly half of the time of a compilation.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0


class _Codegen(JITCPUCodegen):
    _library_class = _Library

    def set_env(self, env_name: str, env: object) -> None:
        """Nothing runs here."""


def build(name: str) -> tuple[Any, Any]:
    """The Python function and Numba signature of a kernel named `family` or `family:variant`."""
    family, _, variant = name.partition(":")
    module = import_module(f".{FAMILIES[family]}", __package__)
    function = module.build(family, variant)
    arity = function.__code__.co_argcount
    return function, types.int64(*[types.intp] * arity)


def to_module(name: str) -> Any:
    """The optimised LLVM module of a kernel, with SYMBOL as its only public function."""
    function, signature = build(name)
    kernel: Any = CFunc(function, (signature.args, signature.return_type), locals={}, options=OPTIONS)
    with global_compiler_lock:
        result: Any = kernel._compile_uncached()
        result.library._ensure_finalized()  # links the helpers in
    module = llvm.parse_assembly(result.library.get_llvm_str())
    module.link_in(llvm.parse_assembly(_entry(result.fndesc.llvm_func_name, len(signature.args))))
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration:
            symbol.linkage = "external" if symbol.name == SYMBOL else "internal"
    tuning = llvm.create_pipeline_tuning_options(3)
    tuning.loop_vectorization, tuning.slp_vectorization = True, False  # as Numba has them
    builder = llvm.create_pass_builder(_machine(), tuning)
    builder.getModulePassManager().run(module, builder)
    return module


def _entry(native: str, arity: int) -> str:
    """LLVM text of the public function. It calls Numba's native one past the wrapper for C, whose error handling needs
    Numba's runtime; kernels cannot raise."""
    arguments = ", ".join(f"i64 %a{i}" for i in range(arity))
    types_only = ", ".join(["i64"] * arity)
    return f"""
        declare i32 @"{native}"(ptr, ptr, {types_only})
        define i64 @{SYMBOL}({arguments}) {{
            %result = alloca i64
            %error = alloca ptr
            %status = call i32 @"{native}"(ptr %result, ptr %error, {arguments})
            %value = load i64, ptr %result
            ret i64 %value
        }}
    """


def _machine() -> Any:
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=os.environ["NUMBA_CPU_NAME"],
        features=os.environ.get("NUMBA_CPU_FEATURES", ""),
        opt=3,
        reloc="pic",
        jit=True,
    )


def assembly(name: str) -> str:
    """The kernel's machine code as text, for the curious: `python -m hotcold.runtime.cpu.compile --asm NAME`."""
    return str(_machine().emit_assembly(to_module(name)))


def write(folder: Path, name: str) -> None:
    """Compile one kernel into `folder`, whole or not at all: a SHA-256 digest, then the object code."""
    code = _machine().emit_object(to_module(name))
    final = folder / (name.replace(":", "-") + ".o")
    part = final.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(hashlib.sha256(code).digest() + code)
    os.replace(part, final)


def main(arguments: list[str]) -> None:
    if (
        arguments[0] == "--asm" and "NUMBA_CPU_NAME" not in os.environ
    ):  # by hand: again, as a child of jit.py is started
        command = [sys.executable, "-m", f"{__package__}.compile", *arguments]
        sys.exit(subprocess.run(command, env=environment(isa.choose())).returncode)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu_target.target_context._internal_codegen = _Codegen("hotcold")
    if arguments[0] == "--asm":
        print(assembly(arguments[1]))
        return
    for name in map(str.strip, sys.stdin):
        write(Path(arguments[0]), name)
        print("done", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
