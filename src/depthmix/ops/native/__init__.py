"""CPU kernels in C++, compiled on the machine they run on when first needed.

As Triton kernels are on a GPU. A step of many small operations is bound by their number; here it is one call. The
source is plain C++ without torch's headers, so that it compiles in seconds, and what comes of it is kept in
``$DEPTHMIX_CACHE/native`` (default ``~/.cache/depthmix/native``), named by source, compiler, flags and processor.

Everything computed here is computed by torch operations as well, which is what runs where there is no compiler
(``$CXX``, ``c++``, ``g++`` or ``clang++``), on anything but Linux, for other dtypes than a kernel takes, with
``DEPTHMIX_NATIVE=0`` (nothing is compiled) or ``DEPTHMIX_KERNELS=torch`` (:mod:`depthmix.ops.backend`). The two agree
to rounding and not to the bit.

Threads are those of torch, from the OpenMP library that torch itself has loaded: a second one would spin against
the first.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

LARGEST_N = 8
"""Streams, at most, that the kernels are compiled for."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++17", "-fPIC")


def status() -> str:
    """Whether the kernels are in use, and if not, why."""
    forced = os.environ.get("DEPTHMIX_KERNELS")
    return _load()[1] if forced in (None, "", "auto", "native") else f"off: DEPTHMIX_KERNELS={forced}"


def available() -> bool:
    """Whether the kernels are in use."""
    return _load()[0] is not None


def usable(*tensors: Tensor | None, n: int) -> bool:
    """Whether the kernels can take these: fp32 tensors on a CPU, of no subclass, and no more streams than they know."""
    return (
        all(
            x is None or (type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype is torch.float32)
            for x in tensors
        )
        and 1 <= n <= LARGEST_N
        and os.environ.get("DEPTHMIX_KERNELS") != "torch"
        and _load()[0] is not None
    )


def call(name: str, *arguments) -> None:
    """Run kernel ``name``.

    Tensors become pointers and ``None`` a null pointer, a list of tensors an array of pointers, a list of whole
    numbers an array of int64, a float a double, everything else an int64.
    """
    getattr(_load()[0], name)(*map(_argument, arguments))


def _argument(value):
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return (ctypes.c_int64 * len(value))(*value)
        return (ctypes.c_void_p * len(value))(*(None if x is None else x.data_ptr() for x in value))
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    compiler, reason = plan()
    if compiler is None:
        return None, reason
    try:
        return ctypes.CDLL(str(_compiled(compiler))), f"on, compiled by {compiler}"
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
        reason = f"off: {compiler} failed: {said[0]}"
        warnings.warn(f"CPU kernels are {reason}; torch operations are used, which are slower", stacklevel=2)
        return None, reason


def plan() -> tuple[str | None, str]:
    """The compiler that would be used, or ``None``, and a line that says so; compiles nothing."""
    if os.environ.get("DEPTHMIX_NATIVE", "1") == "0":
        return None, "off: DEPTHMIX_NATIVE=0"
    if platform.system() != "Linux":
        return None, f"off: for Linux only, this is {platform.system()}"
    compiler = _compiler()
    if compiler is None:
        return None, "off: no C++ compiler found; install g++, or name one in $CXX"
    return compiler, f"compiled by {compiler}"


def _compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for c in candidates if (found := shutil.which(c))), None)


def _openmp() -> list[str]:
    """The OpenMP library already in this process, as an argument to the linker."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")) and Path(path).exists():
            return [path, f"-Wl,-rpath,{Path(path).parent}"]
    return []


def _compiled(compiler: str) -> Path:
    here = Path(__file__).parent
    sources, headers = sorted(here.glob("*.cpp")), sorted(here.glob("*.h"))
    openmp = _openmp()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256()
    parts: list[bytes | str] = [source.read_bytes() for source in (*sources, *headers)]
    parts += [version, compiler, *FLAGS, *openmp, _processor(), torch.__version__]
    for part in parts:
        key.update(part if isinstance(part, bytes) else part.encode())
        key.update(b"\0")
    folder = Path(os.environ.get("DEPTHMIX_CACHE") or "~/.cache/depthmix").expanduser() / "native"
    path = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    except OSError:  # a home that cannot be written to
        folder = build = Path(tempfile.mkdtemp(prefix="depthmix-"))
        path = folder / path.name
    try:
        objects = [build / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:  # a compiler uses one core
            for made in [
                pool.submit(_run, compiler, *FLAGS, "-c", source, "-o", target)
                for source, target in zip(sources, objects, strict=True)
            ]:
                made.result()
        # Libraries behind the objects: the linker takes what is asked for by then.
        _run(compiler, *FLAGS, "-shared", "-o", build / "made.so", *objects, *openmp)
        (build / "made.so").replace(path)  # whole or not at all, whoever else compiles at the same time
    finally:
        if build != path.parent:
            shutil.rmtree(build, ignore_errors=True)
    return path


def _run(*command) -> None:
    subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, timeout=300)


def _processor() -> str:
    """What ``-march=native`` depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
