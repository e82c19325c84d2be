r"""The pointwise passes of the channel gate in Triton; :mod:`depthmix.ops.channel_gate` has the equations.

With the products :math:`p_x = W_x x` and :math:`p_u = W_u u` from torch and
:math:`r = 1/\sqrt{\mathrm{mean}(x^2) + \epsilon}` of each row:

.. math::
    z = r_x p_x + r_u p_u + b, \qquad
    x' = x + \sigma(z) \odot u \ \text{ or }\ (1 - \sigma(z)) \odot x + \sigma(z) \odot u .

**Fusion.** ``forward`` takes a row to a program: mean squares in a first pass over its tiles, all else in a second,
which finds x and u in the cache (in registers, where a row is one tile): reads p, x and u, writes z and x'. ``logits``
takes tiles of features to persistent programs, each of which sums the bias's gradient over its own rows in their order;
the partial rows are then summed in order. ``inputs`` is a row to a program again: a dot product, then the gradients.
Arithmetic is fp32. Any D: rows are passed through in tiles of at most ``TILE``.

Shapes in this file: ``N`` rows, ``D`` features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Features at a time: with 8 warps 16 a thread, in at most seven tensors of fp32."""
PROGRAMS = 512
"""Programs, at most, for each tile of features that sum the bias's gradient."""


@triton.jit
def _sigmoid(z):
    # From the side of small exponentials: nothing overflows.
    b_e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def _forward_kernel(
    product_x, product_u, bias, x, update, out, r_x, r_u, eps,
    CONVEX: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b_sx = tl.zeros([BLOCK], tl.float32)
    b_su = tl.zeros([BLOCK], tl.float32)
    if r_x is not None:
        for start in range(0, D, BLOCK):
            o_d = start + tl.arange(0, BLOCK)
            b_x = tl.load(x + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK]
            b_sx += b_x * b_x
            if r_u is not None:
                b_u = tl.load(update + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK]
                b_su += b_u * b_u
        b_rx = tl.rsqrt(tl.sum(b_sx, 0) / D + eps)
        tl.store(r_x + row, b_rx)
        if r_u is not None:
            b_ru = tl.rsqrt(tl.sum(b_su, 0) / D + eps)
            tl.store(r_u + row, b_ru)
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        m_d = o_d < D
        b_z = tl.load(product_x + row * D + o_d, mask=m_d, other=0.0)  # [BLOCK]
        if r_x is not None:
            b_z = tl.where(b_rx == 0, 0.0, b_z * b_rx)  # where r = 0 the product may be infinite
        b_z += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        if product_u is not None:
            b_p = tl.load(product_u + row * D + o_d, mask=m_d, other=0.0)  # [BLOCK]
            if r_u is not None:
                b_p = tl.where(b_ru == 0, 0.0, b_p * b_ru)
            b_z += b_p
        b_x = tl.load(x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_u = tl.load(update + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_g = _sigmoid(b_z)
        if CONVEX:
            b_new = b_g * b_u + (1.0 - b_g) * b_x
        else:
            b_new = b_g * b_u + b_x
        tl.store(product_x + row * D + o_d, b_z, mask=m_d)
        tl.store(out + row * D + o_d, b_new.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _logits_kernel(
    grad, logit, x, update, r_x, r_u, scaled_x, scaled_u, d_bias, N,
    CONVEX: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    b_db = tl.zeros([BLOCK], tl.float32)
    for row in range(program, N, tl.num_programs(0)):
        o_row = program * 0 + row  # 64 bits
        b_dz = tl.load(update + o_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
        if CONVEX:
            b_dz -= tl.load(x + o_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dz *= tl.load(grad + o_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_g = _sigmoid(tl.load(logit + o_row * D + o_d, mask=m_d, other=0.0))
        b_dz *= (1.0 - b_g) * b_g
        b_db += b_dz
        b_sx = b_dz
        if r_x is not None:
            b_sx = b_dz * tl.load(r_x + o_row)
        tl.store(scaled_x + o_row * D + o_d, b_sx, mask=m_d)
        if scaled_u is not None:
            tl.store(scaled_u + o_row * D + o_d, b_dz * tl.load(r_u + o_row), mask=m_d)
    tl.store(d_bias + program * D + o_d, b_db, mask=m_d)


@triton.jit
def _inputs_kernel(
    grad, logit, x, update, r_x, r_u, through_x, through_u, d_x, d_update,
    CONVEX: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if r_x is not None:
        b_dx = tl.zeros([BLOCK], tl.float32)
        b_du = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            o_d = start + tl.arange(0, BLOCK)
            b_x = tl.load(x + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK]
            b_dx += b_x * tl.load(through_x + row * D + o_d, mask=o_d < D, other=0.0)
            if r_u is not None:
                b_u = tl.load(update + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK]
                b_du += b_u * tl.load(through_u + row * D + o_d, mask=o_d < D, other=0.0)
        # r^2 times the dot product could leave fp32 where each of r and r times the dot does not.
        b_r = tl.load(r_x + row)
        b_along_x = tl.sum(b_dx, 0) * b_r * b_r / -D
        if r_u is not None:
            b_r = tl.load(r_u + row)
            b_along_u = tl.sum(b_du, 0) * b_r * b_r / -D
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        m_d = o_d < D
        b_g = tl.load(grad + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
        b_du = _sigmoid(tl.load(logit + row * D + o_d, mask=m_d, other=0.0)) * b_g
        b_dx = b_g
        if CONVEX:
            b_dx = b_g - b_du
        b_dx += tl.load(through_x + row * D + o_d, mask=m_d, other=0.0)
        if r_x is not None:
            b_dx += b_along_x * tl.load(x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        if through_u is not None:
            b_du += tl.load(through_u + row * D + o_d, mask=m_d, other=0.0)
            if r_u is not None:
                b_du += b_along_u * tl.load(update + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(d_x + row * D + o_d, b_dx.to(d_x.dtype.element_ty), mask=m_d)
        tl.store(d_update + row * D + o_d, b_du.to(d_update.dtype.element_ty), mask=m_d)


def plan(width: int) -> dict[str, int]:
    """``BLOCK`` and ``num_warps``: 16 features a thread, 8 warps at most.

    Some seven tensors live at once are 112 registers: two programs of 8 warps on a multiprocessor of 64 Ki, eight rows
    of 16 bits on their way each.
    """
    block = min(triton.next_power_of_2(width), TILE)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def _rows(r: Tensor) -> Tensor | None:
    return r if len(r) else None


def forward(product_x, product_u, bias, x, update, convex, normalise, eps):
    """``(x' [N, D], r_x [N], r_u [N])``, r empty where there is none; ``product_x`` fp32 becomes the logit."""
    N, D = x.shape
    out = torch.empty_like(x)
    r_x = torch.empty(N if normalise else 0, dtype=torch.float32, device=x.device)
    r_u = torch.empty(
        N if normalise and product_u is not None else 0, dtype=torch.float32, device=x.device
    )  # fmt: skip
    if N:
        _forward_kernel[(N,)](
            product_x, product_u, bias, x, update, out, _rows(r_x), _rows(r_u), eps,
            CONVEX=convex, D=D, **plan(D),
        )  # fmt: skip
    return out, r_x, r_u


def logits(grad, logit, x, update, r_x, r_u, convex, see_update):
    """``(r_x delta [N, D], r_u delta or None if not see_update, sum of delta [D])``."""
    N, D = x.shape
    scaled_x = torch.empty_like(logit)
    scaled_u = (
        torch.empty_like(logit) if see_update and len(r_u) else None
    )  # without a norm both are the same
    launch = plan(D)
    programs = min(N, PROGRAMS)
    parts = torch.empty((programs, D), dtype=torch.float32, device=x.device)
    if N:
        _logits_kernel[(programs, triton.cdiv(D, launch["BLOCK"]))](
            grad, logit, x, update, _rows(r_x), _rows(r_u), scaled_x, scaled_u, parts, N,
            CONVEX=convex, D=D, **launch,
        )  # fmt: skip
    return scaled_x, scaled_x if see_update and scaled_u is None else scaled_u, parts.sum(0)


def inputs(grad, logit, x, update, r_x, r_u, through_x, through_u, convex):
    """Gradients of ``x`` and ``update`` from ``through``, the products of the logits' gradient with W."""
    N, D = x.shape
    d_x, d_update = torch.empty_like(x), torch.empty_like(update)
    if N:
        _inputs_kernel[(N,)](
            grad, logit, x, update, _rows(r_x), _rows(r_u), through_x, through_u, d_x, d_update,
            CONVEX=convex, D=D, **plan(D),
        )  # fmt: skip
    return d_x, d_update
