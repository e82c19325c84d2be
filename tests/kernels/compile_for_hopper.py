"""Compile kernels for compute capability 9.0 where there is no GPU: ``python compile_for_hopper.py MODULE CALLS``.

The compiler, ptxas included, needs no device; the interpreter that the tests run in never meets it, so whatever only
the compiler refuses would be found by the first user. CALLS is a Python expression that calls functions of MODULE,
``m``, on CPU tensors; nothing is run. Prints a line for each kernel: name, registers, bytes spilt.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def report(kernel) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return f"{kernel.metadata.name} {registers} {stack}"


def main(module: str, calls: str) -> None:
    assert "TRITON_INTERPRET" not in os.environ
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        print(report(kernel), flush=True)
        return kernel

    JITFunction.run = compile_only
    eval(calls, {"m": importlib.import_module(module), "torch": torch})


if __name__ == "__main__":
    main(*sys.argv[1:])
