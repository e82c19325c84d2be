"""What figures depend on: device, versions, bandwidth of a copy, peak of a matrix product."""

import datetime
import platform
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..ops import native
from ..source import commit

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""A buffer far beyond the caches. A copy reads and writes as much."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product that stands for the matrix peak."""


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    described = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_kernels": native.status(),
        "commit": commit(7) or "unknown",
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        described |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "triton": installed_version("triton"),
        }
    return described


def installed_version(package: str) -> str | None:
    """The version of a distribution, ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Copy:
    """Copies ``size`` bytes to another place of the same memory, and keeps what each turn took."""

    def __init__(self, device: torch.device, size: int):
        self.device, self.size = device, size
        self.source = torch.ones(max(1, size // 4), dtype=torch.float32, device=device)
        self.target = torch.empty_like(self.source)
        self.seconds: list[float] = []
        self._run()

    def _run(self) -> float:
        return _seconds(lambda: self.target.copy_(self.source), self.device)

    def turn(self) -> None:
        self.seconds.append(self._run())


def matrix_flops(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 5) -> float:
    """Multiplications and additions a second of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / statistics.median(_seconds(lambda: a @ b, device) for _ in range(rounds))


def _seconds(work, device: torch.device) -> float:
    # Several at once on a GPU, where starting one takes as long as some of them.
    repeats = 20 if device.type == "cuda" else 1
    began = now(device)
    for _ in range(repeats):
        work()
    return (now(device) - began) / repeats


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return said.stdout.split("\n")[0].strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
