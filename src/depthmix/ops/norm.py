r"""RMSNorm where torch runs operation by operation, alone or behind the sum of PreNorm, with gradients by hand.

.. math:: t = x + u, \qquad h = \gamma \odot t\, r, \qquad r = 1/\sqrt{\mathrm{mean}(t^2) + \epsilon}

with :math:`t` rounded to the dtype of x before it is normed, as two operations would. From the gradients of both,

.. math:: \partial x = \partial u = \partial t + r\, \gamma \odot \partial h
          - (r^3 / D)\,(\gamma \odot \partial h \cdot t)\, t, \qquad
          \partial \gamma = \textstyle\sum \partial h \odot t\, r .

Kept for the backward pass are t, which the trunk keeps anyway, and one number for each row. On a CPU both passes are
compiled C++, each of which reads and writes a row once (:mod:`depthmix.ops.backend`); otherwise torch operations.
There is no Triton kernel: on a GPU F.rms_norm is one kernel, and under ``torch.compile`` the compiler fuses the sum
and the norm by itself.

A mean square that overflows gives r = 0 and h = 0. Shapes inside this file: ``N`` rows, ``D`` features.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend
from .eager import _plain, _reciprocal_rms
from .native import norm as native
from .reference import compute_dtype


class TorchKernels:
    """Both passes by torch operations: any device, any dtype."""

    @staticmethod
    def forward(x: Tensor, update: Tensor | None, weight: Tensor, eps: float):
        """``(h [N, D], t [N, D] or None where there is no update, r [N])``."""
        dtype = compute_dtype(x.dtype)
        total = None if update is None else (x.to(dtype) + update).to(x.dtype)
        normed = x if total is None else total
        r = _reciprocal_rms(normed, eps)
        return (normed.to(dtype) * r.unsqueeze(-1)).mul_(weight.to(dtype)).to(x.dtype), total, r

    @staticmethod
    def backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, r: Tensor):
        """Gradients of what was normed, in its dtype, and of ``weight``, in the compute dtype."""
        dtype, width = r.dtype, x.shape[-1]
        x_c, grad_c, weight_c = x.to(dtype), grad.to(dtype), weight.to(dtype)
        product = x_c * grad_c
        d_weight = torch.mv(product.t(), r)
        along = torch.mv(product, weight_c).mul_(r).mul_(r).div_(-width).mul_(r)
        d_x = (grad_c * weight_c).mul_(r.unsqueeze(-1)).addcmul_(x_c, along.unsqueeze(-1))
        if grad_total is not None:
            d_x.add_(grad_total)
        return d_x.to(x.dtype), d_weight


def _kernels(x: Tensor, *others: Tensor | None):
    if backend.choose(x) == "native" and native.usable(x, *others):
        return native
    return TorchKernels


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, weight, eps):
        with _plain(x.device):
            out, total, r = _kernels(x, update).forward(_rows(x), _rows(update), weight, eps)
        out = out.view(x.shape)
        if update is None:
            ctx.save_for_backward(x, weight, r)
            ctx.update_dtype = None
            return out
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight, r)
        ctx.update_dtype = update.dtype
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total=None):
        x, weight, r = ctx.saved_tensors
        if grad is None and grad_total is None:
            return None, None, None, None
        if grad is None:  # only the sum was used
            d_x, d_weight = grad_total.to(x.dtype), torch.zeros_like(weight)
        else:
            with _plain(x.device):
                d_x, d_weight = _kernels(x, grad, grad_total).backward(
                    _rows(grad), _rows(grad_total), _rows(x), weight, r
                )
            d_x = d_x.view(x.shape)
        d_update = None if ctx.update_dtype is None else d_x.to(ctx.update_dtype)
        return d_x, d_update, d_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``h`` of ``x [..., D]`` in its dtype."""
    return _Norm.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(h, t)``, both ``[..., D]`` in the dtype of ``x``."""
    return _Norm.apply(x, update, weight, eps)
