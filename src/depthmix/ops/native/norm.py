"""RMSNorm, with or without a sum before it, in C++ (``norm.cpp``): fp32, bf16 and fp16 on a CPU."""

import torch
from torch import Tensor

from . import call
from .storage import DTYPES, fp32, storable

CHUNK = 64
"""Rows whose part of the weight's gradient is summed first: as in the source."""


def usable(*tensors: Tensor | None) -> bool:
    """Whether these kernels take such tensors."""
    return storable(*tensors)


def _typed(x: Tensor | None) -> tuple[Tensor | None, int]:
    return x, 0 if x is None else DTYPES[x.dtype]


def forward(x: Tensor, update: Tensor | None, weight: Tensor, eps: float):
    N, D = x.shape
    out, total = torch.empty_like(x), None if update is None else torch.empty_like(x)
    r = torch.empty(N)
    call(
        "rms_norm_forward", N, D, float(eps), torch.get_num_threads(), *_typed(x), *_typed(update), fp32(weight),
        total, out, r,
    )  # fmt: skip
    return out, total, r


def backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, r: Tensor):
    N, D = x.shape
    d_x, parts = torch.empty_like(x), torch.empty((-(-N // CHUNK), D))
    call(
        "rms_norm_backward", N, D, torch.get_num_threads(), *_typed(grad), *_typed(grad_total), *_typed(x),
        fp32(weight), r, d_x, parts,
    )  # fmt: skip
    return d_x, parts.sum(0)
