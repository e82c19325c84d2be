"""Kernels in Triton, for CUDA devices; with ``TRITON_INTERPRET=1`` they run on the CPU, slowly, for tests.

Importing this package imports no Triton: the modules beside it do, and are imported where they are called.
"""

import functools
import os
from importlib.util import find_spec

import torch


def available() -> bool:
    """Whether the kernels can run here: Triton is installed, and there is a CUDA device or the interpreter is on."""
    return _installed() and (interpreting() or torch.cuda.is_available())


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python; it reads the variable when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None
