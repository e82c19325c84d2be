r"""Weighted sum of separate tensors, :math:`Y = \sum_j \alpha_j X_j` with scalar weights, none of them copied.

Gradients: :math:`\partial L / \partial X_j = \alpha_j G` and :math:`\partial L / \partial \alpha_j = G \cdot X_j`.
Arithmetic is fp32 (fp64 for fp64), the result is rounded to the dtype of the sources once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager import _plain
from .reference import compute_dtype


def weighted_sum(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``sum_j weights[j] sources[j]``: ``weights [m]``, m sources of one shape and dtype."""
    if not torch.compiler.is_compiling():
        return WeightedSum.apply(weights, *sources)
    dtype = compute_dtype(sources[0].dtype)
    weights = weights.to(dtype)
    return total([weights[j] * source.to(dtype) for j, source in enumerate(sources)]).to(sources[0].dtype)


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of ``terms``, of which there is at least one, in their order."""
    found = terms[0]
    for term in terms[1:]:
        found = found + term
    return found


class WeightedSum(torch.autograd.Function):
    """``(weights [m], m sources) -> their sum``; keeps the sources, which whoever passes them on keeps too."""

    @staticmethod
    def forward(ctx, weights, *sources):
        dtype = compute_dtype(sources[0].dtype)
        with _plain(sources[0].device):
            w = weights.to(dtype)
            total = sources[0].to(dtype) * w[0]
            for j, source in enumerate(sources[1:], 1):
                total.addcmul_(source.to(dtype), w[j])
        ctx.save_for_backward(weights, *sources)
        return total.to(sources[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, *sources = ctx.saved_tensors
        dtype = compute_dtype(grad.dtype)
        with _plain(grad.device):
            g, w = grad.to(dtype), weights.to(dtype)
            flat = g.reshape(-1)
            d_weights = torch.stack([torch.dot(flat, source.reshape(-1).to(dtype)) for source in sources])
            d_sources = [(g * w[j]).to(source.dtype) for j, source in enumerate(sources)]
        return d_weights.to(weights.dtype), *d_sources
