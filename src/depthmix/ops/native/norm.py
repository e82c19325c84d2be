"""RMSNorm, with or without a sum before it, in C++ (``norm.cpp``): fp32, bf16 and fp16 on a CPU."""

import torch
from torch import Tensor

from . import call
from .storage import chunks, fp32, storable, typed


def usable(*tensors: Tensor | None) -> bool:
    """Whether these kernels take such tensors."""
    return storable(*tensors)


def forward(x: Tensor, update: Tensor | None, weight: Tensor, eps: float):
    N, D = x.shape
    out, total = torch.empty_like(x), None if update is None else torch.empty_like(x)
    r = torch.empty(N)
    call(
        "rms_norm_forward", N, D, float(eps), torch.get_num_threads(), *typed(x), *typed(update), fp32(weight),
        total, out, r,
    )  # fmt: skip
    return out, total, r


def backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, r: Tensor):
    N, D = x.shape
    d_x, parts = torch.empty_like(x), torch.empty((chunks(N), D))
    call(
        "rms_norm_backward", N, D, torch.get_num_threads(), *typed(grad), *typed(grad_total), *typed(x),
        fp32(weight), r, d_x, parts,
    )  # fmt: skip
    return d_x, parts.sum(0)
