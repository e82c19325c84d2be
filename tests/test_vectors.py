"""The tests of the CPU kernels once more with the shorter vectors of older processors."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from depthmix.ops import native

HERE = Path(__file__).parent
TESTS = (
    "test_native_mgr.py",
    "test_native_pool.py",
    "test_channel_gate.py",
    "test_norm.py",
    "test_native.py::test_error_is_at_most_twice_that_of_torch",
    "test_native.py::test_sinkhorn",
)


def flags():
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.skipif(native.plan()[0] is None, reason="no C++ compiler: " + native.plan()[1])
@pytest.mark.parametrize(
    "level,lanes,needs,instead_of",
    [("x86-64-v2", 4, {"sse4_2"}, "avx"), ("x86-64-v3", 8, {"avx2", "fma", "f16c", "bmi2"}, "avx512f")],
)
def test_kernels_compiled_for(level, lanes, needs, instead_of, tmp_path):
    if not needs <= flags():
        pytest.skip(f"this processor has no {', '.join(sorted(needs - flags()))}")
    if instead_of not in flags():
        pytest.skip(f"{lanes} numbers are this processor's own length: the listed files test it as they are")
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\nfor x; do shift; [ "$x" = -march=native ] && x=-march={level}; set -- "$@" "$x"; done\n'
        f'exec {native.plan()[0]} "$@"\n'
    )
    compiler.chmod(0o755)
    header = HERE.parent / "src/depthmix/ops/native/lanes.h"
    macros = subprocess.run(
        [compiler, "-march=native", "-std=c++17", "-x", "c++", "-E", "-dM", header],
        capture_output=True,
        text=True,
    )
    assert f"#define LANES {lanes}\n" in macros.stdout, macros.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(HERE / name) for name in TESTS)],
        env={**os.environ, "CXX": str(compiler), "DEPTHMIX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "native").glob("kernels-*.so")), "the compiler was not used"
