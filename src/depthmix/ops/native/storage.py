"""Storage as ``storage.h`` knows it: fp32, bf16 and, where the compiler knows it, fp16, computed with in fp32."""

import functools

import torch
from torch import Tensor

from . import _load, available

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The number of each dtype in the sources."""

CHUNK = 64
"""Rows whose part of a parameter's gradient is summed first, whatever the threads: as in the sources."""


@functools.cache
def _has_half() -> bool:
    library, _ = _load()
    return library is not None and bool(library.has_half())


def storable(*tensors: Tensor | None) -> bool:
    """Whether kernels that read and write through ``storage.h`` can take these."""
    given = [x for x in tensors if x is not None]
    return (
        # A tensor of a subclass may have its numbers elsewhere, or not yet.
        all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype in DTYPES for x in given)
        and available()
        and (_has_half() or all(x.dtype is not torch.float16 for x in given))
    )


def typed(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor and its dtype, as kernels take them."""
    return x, 0 if x is None else DTYPES[x.dtype]


def chunks(rows: int) -> int:
    """Sums over so many rows that a parameter's gradient is added up from."""
    return -(-rows // CHUNK)


def fp32(x: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: few numbers, contiguous."""
    return None if x is None else x.detach().to(torch.float32).contiguous()
