"""What the operations have in common where torch runs them, and small ones of the model with gradients by hand."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import compute_dtype


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """``[..., D] -> [...]`` in the compute dtype of ``x``."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=compute_dtype(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """``sum_i weights[N, n] streams[N, n, D] -> [N, D]``, one pass, in the order of the streams."""
    total = weights[:, :1] * streams[:, 0]
    for i in range(1, streams.shape[1]):
        total.addcmul_(weights[:, i : i + 1], streams[:, i])
    return total


def _plain(device: torch.device):
    """Autocast must not reach inside: gate and pool arithmetic is fp32."""
    if device.type == "meta":
        # Alone among the devices here without autocast; is_autocast_available breaks compiled graphs in torch 2.11.
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class ReLUSquared(torch.autograd.Function):
    """``max(x, 0)^2``; keeps ``max(x, 0)``, which is zero where the gradient is."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
