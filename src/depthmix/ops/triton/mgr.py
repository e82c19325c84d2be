r"""The MGR step in Triton: one pass over the streams forward, one backward.

Equations of :mod:`depthmix.ops.reference` (arXiv 2605.23259, section 3.1), gradients of
:mod:`depthmix.ops.mgr_eager`, with :math:`r_i = 1/\sqrt{\mathrm{mean}(s_i^2) + \epsilon}`:

.. math::
    g_i = c\,r_i\,(w_1 \cdot s_i) \;[+\; c\,r_y\,(w_3 \cdot y)], \qquad
    \beta = \mathrm{softmax}([b_0, g + b])_{1..n} \;\text{or}\; \sigma(g + b)

    s'_i = \mathrm{round}(\mathrm{fma}(\beta_i,\, y,\, (1 - \beta_i)\, s_i)), \qquad
    h = \sum_i \mathrm{softmax}_i(c\,r'_i\,(w_2 \cdot s'_i))\, s'_i

Fusion. A program holds the streams of a token, a tile ``[n, D]``, in registers from the first score to the last
sum; the n x D numbers cross the memory bus once in each direction. In elements of D per token, with a window of k
earlier steps that are lerped into the tile before anything else: forward reads n + 1 + k and writes n + 1 (1 if the
new streams are not wanted), backward reads 2n + 2 + k and writes n + 1. The backward pass knows the streams and
``beta``; all else is computed again, with the roundings of the forward pass.

Parameter gradients take two stages in a fixed order. Backward programs are as many as the device runs at once; each
walks over a contiguous stretch of tokens, adds up in registers and writes a row of partial sums, and the rows are
then added. No atomics: the same device gives the same bits from run to run. Another number of
multiprocessors means other stretches, and last bits that differ.

Where a tile does not fit, the tiled kernels walk over D in blocks, several times for each token: scores of the gate;
lerp, write and scores of the pool; pool. Later walks find the token in the L2 cache. They read the old streams and
lerp again, which gives the same bits as reading what was written and waits for nobody. :func:`plan` decides.

Shapes: ``BT`` tokens, ``NP`` >= n and ``BD`` powers of two; tiles are ``[BT, NP, BD]`` in fp32.
Everything multiplied by the number of tokens is int64.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RESIDENT_FORWARD = 32768
"""Numbers in the largest tile that a forward program keeps: 128 for each of 256 threads."""
RESIDENT_BACKWARD = 16384
"""The same backward, where the tile and its gradient are both alive: 64 for each of 256 threads."""


class Plan(NamedTuple):
    """How a kernel is launched."""

    resident: bool
    tokens: int
    """at a time, BT"""
    streams: int
    """n padded, NP"""
    features: int
    """at a time, BD"""
    warps: int


def plan(n: int, width: int, backward: bool) -> Plan:
    """Tile and warps for ``n`` streams of ``width`` features; the place for what a GPU teaches.

    It must not depend on the number of earlier steps, nor on what is written: the order of the sums over
    features follows from it, and with it the last bits.

    Reasoned from what ptxas makes of the kernels for compute capability 9.0, not yet from times. A multiprocessor has
    65536 registers, 255 at most for a thread, and issues 4 instructions of a warp in a cycle, while some 20 bytes
    arrive (H200). A sum over features costs every warp about ten instructions per stream whatever its share of the
    tile, so few warps with much each are what keeps the step bound by memory. In bf16, D = 1024, instructions per
    token, and how many could be issued while its bytes cross the bus:

    ========  ================================  ================================
    n = 4     forward 3840 with 4 warps,        backward 6280 with 4 warps,
              2710 with 2, 2130 with 1; 3960    5200 with 2; 5940
    n = 8     forward 6620 with 4 warps,        backward 16700 with 8 warps,
              5030 with 2; 7120                 12000 with 4; 10700
    ========  ================================  ================================

    The limit is registers. Forward, 128 numbers a thread make about 180 and nothing is spilt. Backward, 64
    make 255, and 50 to 70 more live in the L1 cache. Padding counts as instructions too: D = 1280 costs what 2048 does.
    """
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(width)
    limit, per_thread = (RESIDENT_BACKWARD, 64) if backward else (RESIDENT_FORWARD, 128)
    resident = rows * columns <= limit
    if resident:
        tokens = max(1, min(16, 512 // (rows * columns)))
    else:
        tokens = 1
        # Half of the limit: two programs side by side, of which one loads while the other adds.
        columns = min(columns, limit // 2 // rows)
    return Plan(resident, tokens, rows, columns, max(1, tokens * rows * columns // (32 * per_thread)))


@triton.jit
def _places(N, first, n: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr):
    """Tokens ``[BT, 1, 1]`` from ``first`` on and rows ``[BT, NP, 1]``, with masks."""
    b_t = first + tl.arange(0, BT)[:, None, None]
    b_n = tl.arange(0, NP)[None, :, None]
    m_t = b_t < N
    return b_t, b_t * n + b_n, m_t, m_t & (b_n < n)


@triton.jit
def _weight(p, b_d, m_d):
    """``[1, 1, BD]`` in fp32."""
    return tl.load(p + b_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def _load(p, b_row, b_d, m_row, m_d, D: tl.constexpr):
    """``[BT, 1, BD]`` of ``[N, D]`` or ``[BT, NP, BD]`` of ``[N, n, D]``, in fp32."""
    return tl.load(p + b_row * D + b_d, mask=m_row & m_d, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b_x, b_row, b_d, m_row, m_d, D: tl.constexpr):
    tl.store(p + b_row * D + b_d, b_x.to(p.dtype.element_ty), mask=m_row & m_d)


@triton.jit
def _sum(b_x, axis: tl.constexpr):
    """Without losing the dimension: where all tensors have three, they share a layout, and nothing is replicated."""
    return tl.sum(b_x, axis, keep_dims=True)


@triton.jit
def _lerp(b_s, b_y, b_beta, dtype: tl.constexpr):
    """``(1 - beta) s + beta y`` ``[BT, NP, BD]``, rounded to ``dtype`` and back."""
    return tl.fma(b_beta, b_y, (1.0 - b_beta) * b_s).to(dtype).to(tl.float32)


@triton.jit
def _entering(anchor, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D: tl.constexpr, K: tl.constexpr):
    """The streams that enter this step: the anchor and K earlier lerps."""
    b_s = _load(anchor, b_row, b_d, m_row, m_d, D)
    for j in tl.static_range(K):
        b_y = _load(outputs[j], b_t, b_d, m_t, m_d, D)
        b_beta = tl.load(gates[j] + b_row, mask=m_row, other=0.0)
        b_s = _lerp(b_s, b_y, b_beta, anchor.dtype.element_ty)
    return b_s


@triton.jit
def _reciprocal(b_squares, mask, D: tl.constexpr, eps):
    """``1 / sqrt(mean square + eps)``; 0 where there is nothing, and where the mean square overflowed."""
    return tl.where(mask, tl.rsqrt(b_squares / D + eps), 0.0)


@triton.jit
def _score(b_dot, b_r, scale):
    # 0 * inf: where the mean square overflowed the normalised vector is 0, and so is its score.
    return tl.where(b_r == 0.0, 0.0, b_dot * b_r * scale)


@triton.jit
def _gate(b_g, bias, m_row, n: tl.constexpr, NP: tl.constexpr, COMPETITIVE: tl.constexpr):
    """``beta [BT, NP, 1]`` from scores; 0 for streams that do not exist."""
    b_n = tl.arange(0, NP)[None, :, None]
    if COMPETITIVE:
        b_keep = tl.load(bias).to(tl.float32)
        b_logit = tl.where(m_row, b_g + _weight(bias + 1, b_n, b_n < n), float("-inf"))
        b_top = tl.maximum(tl.max(b_logit, 1, keep_dims=True), b_keep)
        b_e = tl.exp(b_logit - b_top)
        b_beta = b_e / (_sum(b_e, 1) + tl.exp(b_keep - b_top))
    else:
        b_beta = tl.where(m_row, 1.0 / (1.0 + tl.exp(-(b_g + _weight(bias, b_n, b_n < n)))), 0.0)
    return b_beta


@triton.jit
def _pool_weights(b_a, n: tl.constexpr, NP: tl.constexpr):
    """``alpha [BT, NP, 1]``: softmax of scores over the streams."""
    b_a = tl.where(tl.arange(0, NP)[None, :, None] < n, b_a, float("-inf"))
    b_e = tl.exp(b_a - tl.max(b_a, 1, keep_dims=True))
    return b_e / _sum(b_e, 1)


@triton.jit
def _pool(b_s, b_alpha, dtype: tl.constexpr):
    """``h [BT, 1, BD]``, rounded to ``dtype`` and back."""
    return _sum(b_alpha * b_s, 1).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    y, streams, outputs, gates, w1, bias, w2, w3, wn, h, new, beta, N, scale, eps, norm_eps,
    K: tl.constexpr, n: tl.constexpr, D: tl.constexpr, COMPETITIVE: tl.constexpr,
    BT: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = streams.dtype.element_ty
    b_t, b_row, m_t, m_row = _places(N, tl.program_id(0).to(tl.int64) * BT, n, BT, NP)
    b_d = tl.arange(0, BD)[None, None, :]
    m_d = b_d < D

    b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)  # [BT, NP, BD]
    b_y = _load(y, b_t, b_d, m_t, m_d, D)  # [BT, 1, BD]
    b_r = _reciprocal(_sum(b_s * b_s, 2), m_row, D, eps)  # [BT, NP, 1]
    b_g = _score(_sum(b_s * _weight(w1, b_d, m_d), 2), b_r, scale)
    if w3 is not None:
        b_r_y = _reciprocal(_sum(b_y * b_y, 2), m_t, D, eps)  # [BT, 1, 1]
        b_g += _score(_sum(b_y * _weight(w3, b_d, m_d), 2), b_r_y, scale)
    b_beta = _gate(b_g, bias, m_row, n, NP, COMPETITIVE)
    tl.store(beta + b_row, b_beta, mask=m_row)

    b_s = _lerp(b_s, b_y, b_beta, dtype)
    if new is not None:
        _store(new, b_s, b_row, b_d, m_row, m_d, D)

    if w2 is not None:
        b_r = _reciprocal(_sum(b_s * b_s, 2), m_row, D, eps)
        b_alpha = _pool_weights(_score(_sum(b_s * _weight(w2, b_d, m_d), 2), b_r, scale), n, NP)
    else:
        b_alpha = tl.where(m_row, 1.0 / n, 0.0)
    b_h = _pool(b_s, b_alpha, dtype)
    if wn is not None:
        b_h = b_h * _reciprocal(_sum(b_h * b_h, 2), m_t, D, norm_eps) * _weight(wn, b_d, m_d)
    _store(h, b_h, b_t, b_d, m_t, m_d, D)


@triton.jit(do_not_specialize=["N"])
def _forward_tiled_kernel(
    y, streams, outputs, gates, w1, bias, w2, w3, wn, h, new, beta, N, scale, eps, norm_eps,
    K: tl.constexpr, n: tl.constexpr, D: tl.constexpr, COMPETITIVE: tl.constexpr,
    BT: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = streams.dtype.element_ty
    b_t, b_row, m_t, m_row = _places(N, tl.program_id(0).to(tl.int64) * BT, n, BT, NP)
    b_d0 = tl.arange(0, BD)[None, None, :]

    b_squares, b_dot = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, NP, 1], tl.float32)
    b_squares_y, b_dot_y = tl.zeros([BT, 1, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
    for d in range(0, D, BD):
        b_d = d + b_d0
        m_d = b_d < D
        b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
        b_squares += _sum(b_s * b_s, 2)
        b_dot += _sum(b_s * _weight(w1, b_d, m_d), 2)
        if w3 is not None:
            b_y = _load(y, b_t, b_d, m_t, m_d, D)
            b_squares_y += _sum(b_y * b_y, 2)
            b_dot_y += _sum(b_y * _weight(w3, b_d, m_d), 2)
    b_g = _score(b_dot, _reciprocal(b_squares, m_row, D, eps), scale)
    if w3 is not None:
        b_g += _score(b_dot_y, _reciprocal(b_squares_y, m_t, D, eps), scale)
    b_beta = _gate(b_g, bias, m_row, n, NP, COMPETITIVE)
    tl.store(beta + b_row, b_beta, mask=m_row)

    b_squares, b_dot = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, NP, 1], tl.float32)
    if new is not None or w2 is not None:
        for d in range(0, D, BD):
            b_d = d + b_d0
            m_d = b_d < D
            b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
            b_s = _lerp(b_s, _load(y, b_t, b_d, m_t, m_d, D), b_beta, dtype)
            if new is not None:
                _store(new, b_s, b_row, b_d, m_row, m_d, D)
            if w2 is not None:
                b_squares += _sum(b_s * b_s, 2)
                b_dot += _sum(b_s * _weight(w2, b_d, m_d), 2)
    if w2 is not None:
        b_alpha = _pool_weights(_score(b_dot, _reciprocal(b_squares, m_row, D, eps), scale), n, NP)
    else:
        b_alpha = tl.where(m_row, 1.0 / n, 0.0)

    b_squares_h = tl.zeros([BT, 1, 1], tl.float32)
    for d in range(0, D, BD):
        b_d = d + b_d0
        m_d = b_d < D
        b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
        b_h = _pool(_lerp(b_s, _load(y, b_t, b_d, m_t, m_d, D), b_beta, dtype), b_alpha, dtype)
        _store(h, b_h, b_t, b_d, m_t, m_d, D)
        b_squares_h += _sum(b_h * b_h, 2)
    if wn is not None:
        b_r_h = _reciprocal(b_squares_h, m_t, D, norm_eps)
        tl.debug_barrier()  # h is read back, by other threads than wrote it for all we know
        for d in range(0, D, BD):
            b_d = d + b_d0
            m_d = b_d < D
            b_h = _load(h, b_t, b_d, m_t, m_d, D) * b_r_h * _weight(wn, b_d, m_d)
            _store(h, b_h, b_t, b_d, m_t, m_d, D)


@triton.jit
def _gate_gradient(b_beta, b_d_beta, COMPETITIVE: tl.constexpr):
    """Gradients ``[BT, NP, 1]`` of the logits and ``[BT, 1, 1]`` of ``b_0``."""
    b_mean = _sum(b_beta * b_d_beta, 1)
    if COMPETITIVE:
        b_d_logit = b_beta * (b_d_beta - b_mean)
    else:
        b_d_logit = b_beta * (1.0 - b_beta) * b_d_beta
    return b_d_logit, (_sum(b_beta, 1) - 1.0) * b_mean


@triton.jit
def _score_gradient(b_d_score, b_score, b_r, scale, D: tl.constexpr):
    """Factors of the weight and of the vector in ``d score * (c r w - (score r^2 / D) x)``."""
    return b_d_score * b_r * scale, b_d_score * b_score * b_r * b_r / -D


@triton.jit
def _write_bias(part_bias, i_p, b_d_bias, b_d_keep, n: tl.constexpr, NP: tl.constexpr):
    b_n = tl.arange(0, NP)[None, :, None]
    tl.store(part_bias + i_p * (n + 1), tl.sum(b_d_keep))
    tl.store(part_bias + i_p * (n + 1) + 1 + b_n, _sum(b_d_bias, 0), mask=b_n < n)


@triton.jit(do_not_specialize=["N", "groups"])
def _backward_kernel(
    grad_h, grad_streams, y, streams, outputs, gates, beta, w1, w2, w3, wn,
    d_y, d_s, part_w1, part_bias, part_w2, part_w3, part_wn, N, groups, scale, eps, norm_eps,
    K: tl.constexpr, n: tl.constexpr, D: tl.constexpr, COMPETITIVE: tl.constexpr,
    BT: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = streams.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    b_d = tl.arange(0, BD)[None, None, :]
    m_d = b_d < D

    b_d_w1, b_d_w2 = tl.zeros([BT, 1, BD], tl.float32), tl.zeros([BT, 1, BD], tl.float32)
    b_d_w3, b_d_wn = tl.zeros([BT, 1, BD], tl.float32), tl.zeros([BT, 1, BD], tl.float32)
    b_d_bias, b_d_keep = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
    for i in range(groups):
        b_t, b_row, m_t, m_row = _places(N, (i_p * groups + i) * BT, n, BT, NP)

        # All that is read is asked for before the first sum waits for it.
        b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)  # [BT, NP, BD]
        b_y = _load(y, b_t, b_d, m_t, m_d, D)  # [BT, 1, BD]
        b_beta = tl.load(beta + b_row, mask=m_row, other=0.0)  # [BT, NP, 1]
        if grad_streams is not None:
            b_grad = _load(grad_streams, b_row, b_d, m_row, m_d, D)
        else:
            b_grad = tl.zeros([BT, NP, BD], tl.float32)
        if grad_h is not None:
            b_d_h = _load(grad_h, b_t, b_d, m_t, m_d, D)

        b_w1 = _weight(w1, b_d, m_d)
        b_r = _reciprocal(_sum(b_s * b_s, 2), m_row, D, eps)
        b_g = _score(_sum(b_s * b_w1, 2), b_r, scale)

        if grad_h is not None:
            b_new = _lerp(b_s, b_y, b_beta, dtype)
            if w2 is not None:
                b_w2 = _weight(w2, b_d, m_d)
                b_r_new = _reciprocal(_sum(b_new * b_new, 2), m_row, D, eps)
                b_a = _score(_sum(b_new * b_w2, 2), b_r_new, scale)
                b_alpha = _pool_weights(b_a, n, NP)
            else:
                b_alpha = tl.where(m_row, 1.0 / n, 0.0)
            if wn is not None:
                b_h = _pool(b_new, b_alpha, dtype)
                b_r_h = _reciprocal(_sum(b_h * b_h, 2), m_t, D, norm_eps)
                b_h = b_h * b_r_h
                b_d_wn += b_h * b_d_h
                b_d_h = b_d_h * _weight(wn, b_d, m_d)
                b_d_h = tl.fma(_sum(b_h * b_d_h, 2) / -D, b_h, b_d_h) * b_r_h
            b_grad = tl.fma(b_alpha, b_d_h, b_grad)
            if w2 is not None:
                b_d_alpha = _sum(b_new * b_d_h, 2)
                b_d_a = b_alpha * (b_d_alpha - _sum(b_alpha * b_d_alpha, 1))
                b_along_w, b_along_s = _score_gradient(b_d_a, b_a, b_r_new, scale, D)
                b_d_w2 += _sum(b_along_w * b_new, 1)
                b_grad = tl.fma(b_along_s, b_new, tl.fma(b_along_w, b_w2, b_grad))

        b_d_logit, b_d_b0 = _gate_gradient(b_beta, _sum((b_y - b_s) * b_grad, 2), COMPETITIVE)
        b_d_bias += b_d_logit
        b_d_keep += b_d_b0

        b_d_y = _sum(b_beta * b_grad, 1)
        if w3 is not None:
            b_w3 = _weight(w3, b_d, m_d)
            b_r_y = _reciprocal(_sum(b_y * b_y, 2), m_t, D, eps)
            b_g_y = _score(_sum(b_y * b_w3, 2), b_r_y, scale)
            b_along_w, b_along_y = _score_gradient(_sum(b_d_logit, 1), b_g_y, b_r_y, scale, D)
            b_d_w3 += b_along_w * b_y
            b_d_y = tl.fma(b_along_y, b_y, tl.fma(b_along_w, b_w3, b_d_y))
        _store(d_y, b_d_y, b_t, b_d, m_t, m_d, D)

        b_along_w, b_along_s = _score_gradient(b_d_logit, b_g, b_r, scale, D)
        b_d_w1 += _sum(b_along_w * b_s, 1)
        b_grad = tl.fma(b_along_s, b_s, tl.fma(b_along_w, b_w1, (1.0 - b_beta) * b_grad))
        _store(d_s, b_grad, b_row, b_d, m_row, m_d, D)

    tl.store(part_w1 + i_p * D + b_d, _sum(b_d_w1, 0), mask=m_d)
    if w2 is not None:
        tl.store(part_w2 + i_p * D + b_d, _sum(b_d_w2, 0), mask=m_d)
    if w3 is not None:
        tl.store(part_w3 + i_p * D + b_d, _sum(b_d_w3, 0), mask=m_d)
    if wn is not None:
        tl.store(part_wn + i_p * D + b_d, _sum(b_d_wn, 0), mask=m_d)
    _write_bias(part_bias, i_p, b_d_bias, b_d_keep, n, NP)


@triton.jit
def _add_to(p, b_d, m_d, b_x):
    """Add ``[BT, 1, BD]``, over its tokens, to a row of partial sums."""
    tl.store(p + b_d, tl.load(p + b_d, mask=m_d, other=0.0) + _sum(b_x, 0), mask=m_d)


@triton.jit
def _new_gradient(
    grad_h, grad_streams, wn, w2, b_new, b_alpha, b_along_w, b_along_s, b_along_h, b_r_h,
    b_t, b_row, b_d, m_t, m_row, m_d,
    dtype: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient ``[BT, NP, BD]`` of the new streams, as they were handed on and as they were read."""
    if grad_streams is not None:
        b_grad = _load(grad_streams, b_row, b_d, m_row, m_d, D)
    else:
        b_grad = tl.zeros([BT, NP, BD], tl.float32)
    if grad_h is not None:
        b_d_h = _load(grad_h, b_t, b_d, m_t, m_d, D)
        if wn is not None:
            b_h = _pool(b_new, b_alpha, dtype) * b_r_h
            b_d_h = tl.fma(b_along_h, b_h, b_d_h * _weight(wn, b_d, m_d)) * b_r_h
        b_grad = tl.fma(b_alpha, b_d_h, b_grad)
        if w2 is not None:
            b_grad = tl.fma(b_along_s, b_new, tl.fma(b_along_w, _weight(w2, b_d, m_d), b_grad))
    return b_grad


@triton.jit(do_not_specialize=["N", "groups"])
def _backward_tiled_kernel(
    grad_h, grad_streams, y, streams, outputs, gates, beta, w1, w2, w3, wn,
    d_y, d_s, part_w1, part_bias, part_w2, part_w3, part_wn, N, groups, scale, eps, norm_eps,
    K: tl.constexpr, n: tl.constexpr, D: tl.constexpr, COMPETITIVE: tl.constexpr,
    BT: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = streams.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    b_d0 = tl.arange(0, BD)[None, None, :]

    b_d_bias, b_d_keep = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
    for i in range(groups):
        b_t, b_row, m_t, m_row = _places(N, (i_p * groups + i) * BT, n, BT, NP)
        b_beta = tl.load(beta + b_row, mask=m_row, other=0.0)

        # First walk: what the scores of gate and pool are made of, and the new streams times the gradient of h.
        b_squares, b_dot = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, NP, 1], tl.float32)
        b_squares_new, b_dot_new = tl.zeros([BT, NP, 1], tl.float32), tl.zeros([BT, NP, 1], tl.float32)
        b_squares_y, b_dot_y = tl.zeros([BT, 1, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
        b_d_alpha = tl.zeros([BT, NP, 1], tl.float32)
        for d in range(0, D, BD):
            b_d = d + b_d0
            m_d = b_d < D
            b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
            b_y = _load(y, b_t, b_d, m_t, m_d, D)
            b_squares += _sum(b_s * b_s, 2)
            b_dot += _sum(b_s * _weight(w1, b_d, m_d), 2)
            if w3 is not None:
                b_squares_y += _sum(b_y * b_y, 2)
                b_dot_y += _sum(b_y * _weight(w3, b_d, m_d), 2)
            if grad_h is not None and w2 is not None:
                b_new = _lerp(b_s, b_y, b_beta, dtype)
                b_squares_new += _sum(b_new * b_new, 2)
                b_dot_new += _sum(b_new * _weight(w2, b_d, m_d), 2)
                b_d_h = _load(grad_h, b_t, b_d, m_t, m_d, D)
                if wn is not None:
                    b_d_h = b_d_h * _weight(wn, b_d, m_d)
                b_d_alpha += _sum(b_new * b_d_h, 2)
        b_r = _reciprocal(b_squares, m_row, D, eps)
        b_g = _score(b_dot, b_r, scale)
        b_r_new = _reciprocal(b_squares_new, m_row, D, eps)
        b_a = _score(b_dot_new, b_r_new, scale)
        if w2 is not None:
            b_alpha = _pool_weights(b_a, n, NP)
        else:
            b_alpha = tl.where(m_row, 1.0 / n, 0.0)

        # Second walk, with a norm behind the pool: its statistics, and the new streams times h.
        b_r_h, b_along_h = tl.zeros([BT, 1, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
        if grad_h is not None and wn is not None:
            b_squares_h, b_dot_h = tl.zeros([BT, 1, 1], tl.float32), tl.zeros([BT, 1, 1], tl.float32)
            b_new_h = tl.zeros([BT, NP, 1], tl.float32)
            for d in range(0, D, BD):
                b_d = d + b_d0
                m_d = b_d < D
                b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
                b_new = _lerp(b_s, _load(y, b_t, b_d, m_t, m_d, D), b_beta, dtype)
                b_h = _pool(b_new, b_alpha, dtype)
                b_squares_h += _sum(b_h * b_h, 2)
                b_dot_h += _sum(b_h * _load(grad_h, b_t, b_d, m_t, m_d, D) * _weight(wn, b_d, m_d), 2)
                b_new_h += _sum(b_new * b_h, 2)
            b_r_h = _reciprocal(b_squares_h, m_t, D, norm_eps)
            b_along_h = b_dot_h * b_r_h / -D
            b_d_alpha = (b_d_alpha + b_along_h * b_r_h * b_new_h) * b_r_h
        b_d_a = b_alpha * (b_d_alpha - _sum(b_alpha * b_d_alpha, 1))
        b_along_w2, b_along_new = _score_gradient(b_d_a, b_a, b_r_new, scale, D)

        # Third walk: the gradient of the gate.
        b_d_beta = tl.zeros([BT, NP, 1], tl.float32)
        for d in range(0, D, BD):
            b_d = d + b_d0
            m_d = b_d < D
            b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
            b_y = _load(y, b_t, b_d, m_t, m_d, D)
            b_grad = _new_gradient(
                grad_h, grad_streams, wn, w2, _lerp(b_s, b_y, b_beta, dtype), b_alpha, b_along_w2, b_along_new,
                b_along_h, b_r_h, b_t, b_row, b_d, m_t, m_row, m_d, dtype, D, BT, NP, BD,
            )  # fmt: skip
            b_d_beta += _sum((b_y - b_s) * b_grad, 2)
        b_d_logit, b_d_b0 = _gate_gradient(b_beta, b_d_beta, COMPETITIVE)
        b_d_bias += b_d_logit
        b_d_keep += b_d_b0
        b_along_w1, b_along_s = _score_gradient(b_d_logit, b_g, b_r, scale, D)
        b_r_y = _reciprocal(b_squares_y, m_t, D, eps)
        b_g_y = _score(b_dot_y, b_r_y, scale)
        b_along_w3, b_along_y = _score_gradient(_sum(b_d_logit, 1), b_g_y, b_r_y, scale, D)

        # Last walk: everything is known.
        for d in range(0, D, BD):
            b_d = d + b_d0
            m_d = b_d < D
            b_s = _entering(streams, outputs, gates, b_t, b_row, b_d, m_t, m_row, m_d, D, K)
            b_y = _load(y, b_t, b_d, m_t, m_d, D)
            b_new = _lerp(b_s, b_y, b_beta, dtype)
            b_grad = _new_gradient(
                grad_h, grad_streams, wn, w2, b_new, b_alpha, b_along_w2, b_along_new,
                b_along_h, b_r_h, b_t, b_row, b_d, m_t, m_row, m_d, dtype, D, BT, NP, BD,
            )  # fmt: skip
            if grad_h is not None and w2 is not None:
                _add_to(part_w2 + i_p * D, b_d, m_d, _sum(b_along_w2 * b_new, 1))
            if grad_h is not None and wn is not None:
                b_h = _pool(b_new, b_alpha, dtype) * b_r_h
                _add_to(part_wn + i_p * D, b_d, m_d, b_h * _load(grad_h, b_t, b_d, m_t, m_d, D))
            _add_to(part_w1 + i_p * D, b_d, m_d, _sum(b_along_w1 * b_s, 1))
            b_d_y = _sum(b_beta * b_grad, 1)
            if w3 is not None:
                _add_to(part_w3 + i_p * D, b_d, m_d, b_along_w3 * b_y)
                b_d_y = tl.fma(b_along_y, b_y, tl.fma(b_along_w3, _weight(w3, b_d, m_d), b_d_y))
            _store(d_y, b_d_y, b_t, b_d, m_t, m_d, D)
            b_grad = tl.fma(b_along_w1, _weight(w1, b_d, m_d), (1.0 - b_beta) * b_grad)
            _store(d_s, tl.fma(b_along_s, b_s, b_grad), b_row, b_d, m_row, m_d, D)
        tl.debug_barrier()  # the sums are read back, by other threads than wrote them for all we know

    _write_bias(part_bias, i_p, b_d_bias, b_d_keep, n, NP)


def _launch(kernel, programs: int, chosen: Plan, device: torch.device, *arguments, **constants) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](
            *arguments, **constants,
            BT=chosen.tokens, NP=chosen.streams, BD=chosen.features, num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip


def _history(layer_output: Tensor, beta: Tensor, outputs, gates) -> tuple[tuple, tuple]:
    """Earlier outputs and gates as tuples of pointers; never empty."""
    return tuple(outputs) or (layer_output,), tuple(gates) or (beta,)


def step_forward(
    layer_output, streams, outputs, gates, gate_weight, gate_bias, pool_weight, update_weight, norm_weight,
    gate, scale, eps, norm_eps, write,
):  # fmt: skip
    """``(h [N, D], new_streams [N, n, D] or None, beta [N, n] fp32)``.

    ``outputs`` and ``gates`` are what earlier steps of a window added to ``streams``, lerped in before this
    one: bit for bit what those steps would have left. ``new_streams`` is ``None`` unless ``write``.
    """
    tokens, n, width = streams.shape
    h = torch.empty(tokens, width, dtype=streams.dtype, device=streams.device)
    new_streams = torch.empty_like(streams) if write else None
    beta = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    if tokens:
        chosen = plan(n, width, backward=False)
        _launch(
            _forward_kernel if chosen.resident else _forward_tiled_kernel,
            triton.cdiv(tokens, chosen.tokens), chosen, streams.device,
            layer_output, streams, *_history(layer_output, beta, outputs, gates),
            gate_weight, gate_bias, pool_weight, update_weight, norm_weight, h, new_streams, beta,
            tokens, scale, eps, norm_eps, K=len(outputs), n=n, D=width, COMPETITIVE=gate == "competitive",
        )  # fmt: skip
    return h, new_streams, beta


def _programs(groups: int, chosen: Plan, device: torch.device) -> int:
    """Backward programs: as many as have registers at the same time, and not more than there is to do."""
    if device.type != "cuda":
        return min(groups, 3)
    numbers = chosen.tokens * chosen.streams * chosen.features // (32 * chosen.warps)
    registers = 32 * chosen.warps * min(256, 64 + 3 * numbers)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(groups, multiprocessors * max(1, 65536 // registers))


def step_backward(
    grad_h, grad_streams, layer_output, streams, outputs, gates, beta, gate_weight, gate_bias, pool_weight,
    update_weight, norm_weight, gate, scale, eps, norm_eps,
):  # fmt: skip
    """Gradients of ``(layer_output, streams, gate_weight, gate_bias, pool_weight, update_weight,
    norm_weight)``, ``None`` for a weight that is ``None``; ``streams`` are those that enter this step."""
    tokens, n, width = streams.shape
    weights = (gate_weight, pool_weight, update_weight, norm_weight)
    if not tokens or (grad_h is None and grad_streams is None):
        zeros = [None if x is None else torch.zeros_like(x) for x in (layer_output, streams, *weights)]
        return *zeros[:3], torch.zeros_like(gate_bias), *zeros[3:]
    d_output, d_streams = torch.empty_like(layer_output), torch.empty_like(streams)
    chosen = plan(n, width, backward=True)
    groups = triton.cdiv(tokens, chosen.tokens)
    programs = _programs(groups, chosen, streams.device)
    fp32 = {"dtype": torch.float32, "device": streams.device}
    # The tiled kernel adds to its rows, block by block.
    make = torch.empty if chosen.resident else torch.zeros
    parts = [None if w is None else make(programs, width, **fp32) for w in weights]
    part_bias = torch.empty(programs, n + 1, **fp32)
    _launch(
        _backward_kernel if chosen.resident else _backward_tiled_kernel,
        programs, chosen, streams.device,
        grad_h, grad_streams, layer_output, streams, *_history(layer_output, beta, outputs, gates), beta,
        gate_weight, pool_weight, update_weight, norm_weight, d_output, d_streams,
        parts[0], part_bias, *parts[1:], tokens, triton.cdiv(groups, programs), scale, eps, norm_eps,
        K=len(outputs), n=n, D=width, COMPETITIVE=gate == "competitive",
    )  # fmt: skip
    d_gate, *d_weights = (
        None if w is None else p.sum(0).to(w.dtype) for w, p in zip(weights, parts, strict=True)
    )
    d_bias = part_bias.sum(0)[0 if gate == "competitive" else 1 :].to(gate_bias.dtype)
    return d_output, d_streams, d_gate, d_bias, *d_weights
