"""The pool in C++ (``pool.cpp``): the functions of :mod:`depthmix.ops.pool_eager` for fp32, bf16 and fp16 on a CPU.

Here a source may also be contiguous of any leading shape, and results have that of the first.
"""

import math

import torch
from torch import Tensor

from . import call
from .storage import DTYPES, fp32, storable

SMALLEST_CHUNK, MOST_CHUNKS = 32, 256
"""Tokens whose part of a parameter's gradient is summed by itself, and the number of such sums: of the size of
the problem alone, so that any number of threads gives the same bits."""


def usable(x: Tensor) -> bool:
    """Whether these kernels take tensors like ``x``."""
    return storable(x)


def _strides(rows: list[Tensor]) -> list[int]:
    width = rows[0].shape[-1]
    return [x.stride(0) if x.dim() == 2 else width for x in rows]


def _chunks(N: int) -> int:
    return max(1, min(MOST_CHUNKS, -(-N // SMALLEST_CHUNK)))


def _shape(sources: list[Tensor]) -> tuple[int, int, int, int]:
    *leading, width = sources[0].shape
    return DTYPES[sources[0].dtype], math.prod(leading), len(sources), width


def pool_forward(sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps):
    dtype, N, k, width = _shape(sources)
    out = torch.empty(sources[0].shape, dtype=sources[0].dtype)
    weight, norm_weight = fp32(weight), fp32(norm_weight)
    call(
        "pool_forward", dtype, N, k, width, torch.get_num_threads(), sources, _strides(sources), weight, carried,
        carried_lse, norm_weight, float(scale), float(eps), float(norm_eps), out,
    )  # fmt: skip
    return out


def pool_backward(
    grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into, h=None
):
    dtype, N, k, width = _shape(sources)
    chunks = _chunks(N)
    w, g = fp32(weight), fp32(norm_weight)
    given = (weight is not None) + (norm_weight is not None)
    part = torch.empty(given * chunks * width)
    d_weight, d_norm = (None if x is None else torch.empty(width) for x in (w, g))
    d_carried = d_lse = None
    if carried_lse is not None:
        d_carried, d_lse = torch.empty(sources[0].shape), torch.empty(sources[0].shape[:-1])
    call(
        "pool_backward", dtype, N, k, width, torch.get_num_threads(), chunks, grad_h, sources, _strides(sources), w,
        carried, carried_lse, h, g, float(scale), float(eps), float(norm_eps), into, _strides(into), d_weight,
        d_carried, d_lse, d_norm, part,
    )  # fmt: skip
    return (
        None if weight is None else d_weight.to(weight.dtype),
        d_carried,
        d_lse,
        None if norm_weight is None else d_norm.to(norm_weight.dtype),
    )


def pool_many_forward(sources, queries, scale, eps):
    dtype, N, k, width = _shape(sources)
    Q = len(queries)
    first = sources[0].shape
    out, lse = torch.empty(Q, *first), torch.empty(Q, *first[:-1])
    queries = fp32(queries)
    call(
        "pool_many_forward", dtype, N, k, Q, width, torch.get_num_threads(), sources, _strides(sources), queries,
        float(scale), float(eps), out, lse,
    )  # fmt: skip
    return out, lse


def pool_many_backward(grad_out, grad_lse, sources, queries, lse, scale, eps, into):
    dtype, N, k, width = _shape(sources)
    chunks, Q = _chunks(N), len(queries)
    part, d_queries = torch.empty(chunks * Q * width), torch.empty(Q, width)
    q = fp32(queries)
    call(
        "pool_many_backward", dtype, N, k, Q, width, torch.get_num_threads(), chunks, grad_out, grad_lse,
        sources, _strides(sources), q, float(scale), float(eps), into, _strides(into), d_queries, part,
    )  # fmt: skip
    return d_queries.to(queries.dtype)
