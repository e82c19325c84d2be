r"""The pool in Triton: softmax over the depth of a token, any number of sources, none of them stacked.

For sources :math:`v_1 \dots v_k` (streams of Multi-Gate Residuals, arXiv 2605.23259 Eq. 1, or the outputs of
earlier sublayers in Attention Residuals), a weight :math:`w` and a scale :math:`c`:

.. math::
    r_i = 1/\sqrt{\mathrm{mean}(v_i^2) + \epsilon}, \qquad a_i = c\, r_i\, (w \cdot v_i), \qquad
    \alpha = \mathrm{softmax}(a), \qquad h = \sum_i \alpha_i v_i,

optionally merged with the softmax mean of other sources (``carried``, and the logarithm ``carried_lse`` of the sum
of exponentials behind it) as one softmax over all, and followed by an RMSNorm. Backwards, with
:math:`d_i = v_i \cdot \partial h`, :math:`\delta = \sum_i \alpha_i d_i` and :math:`g_i = \alpha_i (d_i - \delta)`:

.. math:: \partial v_i = \alpha_i\, \partial h + c\, r_i g_i\, w - (a_i g_i r_i^2 / D)\, v_i, \qquad
          \partial w = \sum c\, r_i g_i\, v_i .

**Fusion.** A program has one token at a time, its row of D in registers.

forward
    One launch and one pass by online softmax: k reads, one write. The next source is on its way while the dot
    products of this one are summed.
backward
    One launch. First the three dot products of every source, with :math:`v_i`, w and :math:`\partial h`; then the
    k gradients. A token's sources stay in registers in between where they fit; where they do not, the same
    program reads them again a few microseconds later, from the cache. From memory k + 1 reads and k writes.
    With an output norm the mixture is recomputed in between. Programs are persistent: each adds up the parameter
    gradients of its own tokens, in their order, and the rows they leave are summed in order.
several queries
    Q readers of the same sources. Where a token's sources fit, they are read once, kept, and mixed for one query
    after another. Otherwise in two launches: all scores, then all mixtures, each reading the sources once.
    Backwards always so.

More than ``SOURCES`` sources, or rows too long for registers, take the same two-launch kernels (forward: chained
launches that carry mixture and log-sum-exp in fp32), in which only the scores of a token, not its row, are held.

A row is held as ``SUB`` pieces of ``BLOCK`` numbers, a power of two, so that D = 7168 costs the registers of 7168
and not of 8192, and D = 1280 those of 1280. See :func:`plan`.

All arithmetic is fp32. A mean square that overflows gives :math:`r = 0` and a score of 0.
Shapes in this file: ``N`` tokens, ``k`` (``K``) sources ``[N, D]`` of any row stride, ``Q`` queries, ``P`` programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreting

SOURCES = 32
"""Sources of one launch: its code is unrolled over them."""
LONGEST_ROW = 16384
"""Numbers of a row that a program holds at most; beyond, a row is passed through in tiles."""


class Launch(NamedTuple):
    """How a kernel that holds a row is launched."""

    block: int
    """Numbers in a piece of a row; a power of two."""
    sub: int
    """Pieces."""
    warps: int
    resident: bool
    """The sources stay in registers between their first and their second use."""


TUNED: dict[tuple[str, int, int, int], Launch] = {}
"""Launches found by measurement, by ``(kernel, bytes of a number, sources, D)``; they go before :func:`plan`."""


def pieces(width: int) -> tuple[int, int]:
    """``(BLOCK, SUB)``: at most 8 equal pieces, a power of two each, that exceed ``width`` by the least.

    >>> [pieces(d) for d in (768, 1024, 1280, 5120, 7168, 1000)]
    [(256, 3), (1024, 1), (256, 5), (1024, 5), (1024, 7), (1024, 1)]
    """
    options = ((triton.next_power_of_2(triton.cdiv(width, sub)), sub) for sub in range(1, 9))
    # Pieces of less than a warp's 32 lanes would leave lanes without work.
    return min((o for o in options if o[0] >= 32 or o[1] == 1), key=lambda o: (o[0] * o[1], o[1]))


def plan(kernel: str, width: int, k: int, itemsize: int) -> Launch | None:
    """Launch of ``"forward"``, ``"backward"`` or ``"many"`` for ``k`` rows of ``width``; ``None``: in tiles.

    Reasoned from the registers of an H100: 64 Ki of 32 bits for each multiprocessor, 255 at most for a thread,
    1024 threads at most in a program. Let a thread hold E numbers of a row.

    forward: mixture, weight and the source at hand in fp32 (3 E) and the next source as it came (E, or E / 2 in 16
    bits). E = 32 needs some 130 registers, so that 16 warps fit, which have 16 x 32 x 32 numbers (32 KiB in 16
    bits) of the next sources on their way; 24 KiB hide the latency of memory at full bandwidth. One warp for
    D = 1024 reduces without a barrier.

    backward: gradient, weight, the weight's gradient and the source at hand (4 E, and 1 E with an output norm). The
    sources kept need k E more, unpacked. Up to 96 registers of those they are kept: with E = 8, k = 12. E = 8 takes
    D / 256 warps, at most 16 (with 32 warps a thread has 64 registers only). Otherwise the second read comes from
    the cache, and E = 16 leaves room for several programs.

    many: the sources kept, the mixture and the query: (k + 2) E.
    """
    if width > LONGEST_ROW or k > SOURCES:
        return None
    found = TUNED.get((kernel, itemsize, k, width))
    if found is not None:
        return found
    block, sub = pieces(width)
    held = block * sub

    def warps(each: int, most: int = 16) -> int:
        wanted = triton.next_power_of_2(triton.cdiv(held, 32 * each))
        return min(wanted, most, max(block // 32, 1))

    if kernel == "forward":
        return Launch(block, sub, warps(32), False)
    few = warps(8)
    if k * triton.cdiv(held, 32 * few) <= 96:
        return Launch(block, sub, few, True)
    return None if kernel == "many" else Launch(block, sub, warps(16), False)


def _programs(device: torch.device, warps: int, rows: int) -> int:
    """Persistent programs: what a device holds at once at 128 registers for each thread."""
    if device.type != "cuda":
        return min(rows, 3)
    return min(rows, torch.cuda.get_device_properties(device).multi_processor_count * max(16 // warps, 1))


# --- a row in pieces ------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, offset, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """The row that starts at ``offset``: ``SUB`` times ``[BLOCK]`` in its own dtype, 0 beyond ``D``."""
    row = ()
    for j in tl.static_range(SUB):
        o_d = j * BLOCK + tl.arange(0, BLOCK)
        if SUB * BLOCK == D:
            row = row + (tl.load(pointer + offset + o_d),)
        else:
            row = row + (tl.load(pointer + offset + o_d, mask=o_d < D, other=0.0),)
    return row


@triton.jit
def _store(pointer, offset, row, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """Round the pieces to the dtype behind ``pointer`` and write what lies before ``D``."""
    for j in tl.static_range(SUB):
        o_d = j * BLOCK + tl.arange(0, BLOCK)
        b_x = row[j].to(pointer.dtype.element_ty)
        if SUB * BLOCK == D:
            tl.store(pointer + offset + o_d, b_x)
        else:
            tl.store(pointer + offset + o_d, b_x, mask=o_d < D)


@triton.jit
def _zeros(BLOCK: tl.constexpr, SUB: tl.constexpr):
    row = ()
    for _j in tl.static_range(SUB):
        row = row + (tl.zeros([BLOCK], tl.float32),)
    return row


@triton.jit
def _fp32(row, SUB: tl.constexpr):
    out = ()
    for j in tl.static_range(SUB):
        out = out + (row[j].to(tl.float32),)
    return out


@triton.jit
def _dot(a, b, SUB: tl.constexpr):
    """Pieces are added before the one sum over threads."""
    b_sum = a[0] * b[0]
    for j in tl.static_range(1, SUB):
        b_sum += a[j] * b[j]
    return tl.sum(b_sum, 0)


@triton.jit
def _combine(a, x, b, y, SUB: tl.constexpr):
    """``a x + b y`` for scalars ``a`` and ``b``."""
    out = ()
    for j in tl.static_range(SUB):
        out = out + (a * x[j] + b * y[j],)
    return out


@triton.jit
def _plus(x, b, y, SUB: tl.constexpr):
    """``x + b y`` for a scalar ``b``."""
    out = ()
    for j in tl.static_range(SUB):
        out = out + (x[j] + b * y[j],)
    return out


@triton.jit
def _times(x, y, factor, SUB: tl.constexpr):
    """``factor x y``, elementwise, for a scalar ``factor``."""
    out = ()
    for j in tl.static_range(SUB):
        out = out + (factor * x[j] * y[j],)
    return out


@triton.jit
def _over(x, divisor, SUB: tl.constexpr):
    out = ()
    for j in tl.static_range(SUB):
        out = out + (x[j] / divisor,)
    return out


@triton.jit
def _rounded(x, pointer, SUB: tl.constexpr):
    """As it would be read again from behind ``pointer``."""
    out = ()
    for j in tl.static_range(SUB):
        out = out + (x[j].to(pointer.dtype.element_ty).to(tl.float32),)
    return out


@triton.jit
def _score(dot, r, scale):
    """``c r (w . v)``; where the mean square overflowed, r = 0 and the dot product may be infinite."""
    return tl.where(r == 0, 0.0, dot * r * scale)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    sources, strides, weight, carried, carried_lse, norm_weight, out, out_lse, scale, eps, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    K: tl.constexpr = len(sources)
    if weight is not None:
        b_w = _fp32(_load(weight, 0, D, BLOCK, SUB), SUB)
    if carried is None:
        b_m = tl.full([], float("-inf"), tl.float32)
        b_l = tl.full([], 0.0, tl.float32)
        b_h = _zeros(BLOCK, SUB)  # SUB x [BLOCK]: sum of exp(a - m) v
    else:
        b_m = tl.load(carried_lse + row)
        b_l = tl.full([], 1.0, tl.float32)
        b_h = _load(carried, row * D, D, BLOCK, SUB)
    b_next = _load(sources[0], row * strides[0], D, BLOCK, SUB)
    for i in tl.static_range(K):
        b_v = _fp32(b_next, SUB)
        if i + 1 < K:
            b_next = _load(sources[i + 1], row * strides[i + 1], D, BLOCK, SUB)
        if weight is None:
            b_a = tl.full([], 0.0, tl.float32)
        else:
            b_r = tl.rsqrt(_dot(b_v, b_v, SUB) / D + eps)
            b_a = _score(_dot(b_v, b_w, SUB), b_r, scale)
        b_top = tl.maximum(b_m, b_a)
        b_old, b_new = tl.exp(b_m - b_top), tl.exp(b_a - b_top)
        b_m, b_l = b_top, b_l * b_old + b_new
        b_h = _combine(b_old, b_h, b_new, b_v, SUB)
    b_h = _over(b_h, b_l, SUB)
    if out_lse is not None:  # a link of a chain
        tl.store(out_lse + row, b_m + tl.log(b_l))
    elif norm_weight is not None:
        b_h = _rounded(b_h, out, SUB)
        b_r = tl.rsqrt(_dot(b_h, b_h, SUB) / D + norm_eps)
        b_h = _times(b_h, _fp32(_load(norm_weight, 0, D, BLOCK, SUB), SUB), b_r, SUB)
    _store(out, row * D, b_h, D, BLOCK, SUB)


def pool_forward(sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps) -> Tensor:
    """``h [N, D]`` in the sources' dtype.

    ``sources``: k tensors ``[N, D]`` of one dtype, last dimension contiguous; ``weight [D]`` or ``None`` (equal
    logits); ``carried [N, D]`` and ``carried_lse [N]`` fp32, or ``None``; ``norm_weight [D]`` or ``None``.
    """
    first = sources[0]
    tokens, width = first.shape
    out = torch.empty((tokens, width), dtype=first.dtype, device=first.device)
    if tokens == 0:
        return out
    if plan("forward", width, 1, first.element_size()) is None:
        return _tiled_forward(sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps)
    chunks = _chunks(len(sources))
    for last, (start, stop) in zip([False] * (len(chunks) - 1) + [True], chunks, strict=True):
        part = sources[start:stop]
        launch = plan("forward", width, len(part), first.element_size())
        target, lse = out, None
        if not last:
            target = torch.empty((tokens, width), dtype=torch.float32, device=first.device)
            lse = torch.empty(tokens, dtype=torch.float32, device=first.device)
        _forward_kernel[(tokens,)](
            *_pointers(part), weight, carried, carried_lse, norm_weight, target, lse, scale, eps, norm_eps,
            D=width, BLOCK=launch.block, SUB=launch.sub, num_warps=launch.warps,
        )  # fmt: skip
        carried, carried_lse = target, lse
    return out


def _chunks(k: int) -> list[tuple[int, int]]:
    """``k`` sources in as few launches as possible, as even as possible."""
    parts = triton.cdiv(k, SOURCES)
    cuts = [k * i // parts for i in range(parts + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _pointers(rows: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors ``[N, D]`` and their row strides, as a kernel takes them."""
    return tuple(rows), tuple(x.stride(0) for x in rows)


# --- backward, one launch -------------------------------------------------------------------------------------------


@triton.jit
def _backward_kernel(
    grad_h, grad_stride, sources, strides, into, into_strides, weight, carried, carried_lse, norm_weight,
    d_weight, d_carried, d_carried_lse, d_norm_weight, N, scale, eps, norm_eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    K: tl.constexpr = len(sources)
    # Without scores the weights are constants, and nobody asks how good a source was.
    SCORED: tl.constexpr = weight is not None or carried is not None
    if weight is not None:
        b_w = _fp32(_load(weight, 0, D, BLOCK, SUB), SUB)
        b_dw = _zeros(BLOCK, SUB)
    if norm_weight is not None:
        b_dn = _zeros(BLOCK, SUB)
    for row in range(program, N, tl.num_programs(0)):
        b_g = _fp32(_load(grad_h, row * grad_stride, D, BLOCK, SUB), SUB)
        if carried is None:
            b_m = tl.full([], float("-inf"), tl.float32)
        else:
            b_m = tl.load(carried_lse + row)

        # What follows from the sources as K scalars each: r, the score, and the dot product with the gradient.
        kept, reciprocals, scores, dots = (), (), (), ()
        b_next = _load(sources[0], row * strides[0], D, BLOCK, SUB)
        for i in tl.static_range(K):
            b_raw = b_next
            if i + 1 < K:
                b_next = _load(sources[i + 1], row * strides[i + 1], D, BLOCK, SUB)
            if RESIDENT:
                kept = kept + (b_raw,)
            b_v = _fp32(b_raw, SUB)
            if weight is None:
                b_a = tl.full([], 0.0, tl.float32)
            else:
                b_r = tl.rsqrt(_dot(b_v, b_v, SUB) / D + eps)
                b_a = _score(_dot(b_v, b_w, SUB), b_r, scale)
                reciprocals = reciprocals + (b_r,)
            scores = scores + (b_a,)
            b_m = tl.maximum(b_m, b_a)
            if SCORED and norm_weight is None:
                dots = dots + (_dot(b_v, b_g, SUB),)

        b_l = tl.full([], 0.0, tl.float32)
        if carried is not None:
            b_p = tl.exp(tl.load(carried_lse + row) - b_m)
            b_l += b_p
        exponentials = ()
        for i in tl.static_range(K):
            b_e = tl.exp(scores[i] - b_m)
            b_l += b_e
            exponentials = exponentials + (b_e,)
        alphas = ()
        for i in tl.static_range(K):
            alphas = alphas + (exponentials[i] / b_l,)
        if carried is not None:
            b_p = b_p / b_l
            b_c = _load(carried, row * D, D, BLOCK, SUB)

        if norm_weight is not None:
            # The mixture again, and the gradient through the norm.
            b_h = _zeros(BLOCK, SUB)
            if carried is not None:
                b_h = _plus(b_h, b_p, b_c, SUB)
            for i in tl.static_range(K):
                if RESIDENT:
                    b_v = _fp32(kept[i], SUB)
                else:
                    b_v = _fp32(_load(sources[i], row * strides[i], D, BLOCK, SUB), SUB)
                b_h = _plus(b_h, alphas[i], b_v, SUB)
            b_h = _rounded(b_h, sources[0], SUB)
            b_rh = tl.rsqrt(_dot(b_h, b_h, SUB) / D + norm_eps)
            b_n = _fp32(_load(norm_weight, 0, D, BLOCK, SUB), SUB)
            b_x = _times(b_h, b_g, b_rh, SUB)
            b_dn = _plus(b_dn, 1.0, b_x, SUB)
            b_along = _dot(b_x, b_n, SUB) * b_rh * b_rh / -D
            b_g = _plus(_times(b_g, b_n, b_rh, SUB), b_along, b_h, SUB)
            if SCORED:
                for i in tl.static_range(K):
                    if RESIDENT:
                        b_v = _fp32(kept[i], SUB)
                    else:
                        b_v = _fp32(_load(sources[i], row * strides[i], D, BLOCK, SUB), SUB)
                    dots = dots + (_dot(b_v, b_g, SUB),)

        b_delta = tl.full([], 0.0, tl.float32)
        if SCORED:
            for i in tl.static_range(K):
                b_delta += alphas[i] * dots[i]
        if carried is not None:
            b_dot = _dot(b_c, b_g, SUB)
            b_delta += b_p * b_dot
            tl.store(d_carried_lse + row, b_p * (b_dot - b_delta))
            _store(d_carried, row * D, _plus(_zeros(BLOCK, SUB), b_p, b_g, SUB), D, BLOCK, SUB)

        for i in tl.static_range(K):
            b_dv = _plus(_zeros(BLOCK, SUB), alphas[i], b_g, SUB)
            if weight is not None:
                if RESIDENT:
                    b_v = _fp32(kept[i], SUB)
                else:
                    b_v = _fp32(_load(sources[i], row * strides[i], D, BLOCK, SUB), SUB)
                b_ds = alphas[i] * (dots[i] - b_delta)
                b_along = b_ds * reciprocals[i] * scale
                b_dw = _plus(b_dw, b_along, b_v, SUB)
                b_dv = _plus(b_dv, b_along, b_w, SUB)
                b_dv = _plus(b_dv, b_ds * scores[i] * reciprocals[i] * reciprocals[i] / -D, b_v, SUB)
            _store(into[i], row * into_strides[i], b_dv, D, BLOCK, SUB)
    if weight is not None:
        _store(d_weight, program * D, b_dw, D, BLOCK, SUB)
    if norm_weight is not None:
        _store(d_norm_weight, program * D, b_dn, D, BLOCK, SUB)


def pool_backward(
    grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(d_weight, d_carried, d_carried_lse, d_norm_weight)``, ``None`` where the input is.

    ``grad_h [N, D]``; the rest as for :func:`pool_forward`. The sources' gradients are written into ``into``, k
    tensors ``[N, D]`` of any row stride.
    """
    first = sources[0]
    tokens, width = first.shape
    if width > 1 and grad_h.stride(-1) != 1:
        grad_h = grad_h.contiguous()
    d_carried = None if carried is None else torch.empty_like(carried)
    d_carried_lse = None if carried is None else torch.empty_like(carried_lse)
    if tokens == 0:
        d_weight, d_norm = (None if w is None else torch.zeros_like(w) for w in (weight, norm_weight))
        return d_weight, d_carried, d_carried_lse, d_norm
    launch = plan("backward", width, len(sources), first.element_size())
    if launch is None:
        return _tiled_backward(
            grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into
        )
    programs = _programs(first.device, launch.warps, tokens)
    part_weight, part_norm = (
        None if w is None else torch.empty((programs, width), dtype=torch.float32, device=first.device)
        for w in (weight, norm_weight)
    )
    _backward_kernel[(programs,)](
        grad_h, grad_h.stride(0), *_pointers(sources), *_pointers(into), weight, carried, carried_lse, norm_weight,
        part_weight, d_carried, d_carried_lse, part_norm, tokens, scale, eps, norm_eps,
        D=width, BLOCK=launch.block, SUB=launch.sub, RESIDENT=launch.resident, num_warps=launch.warps,
    )  # fmt: skip
    d_weight = None if weight is None else part_weight.sum(0).to(weight.dtype)
    d_norm = None if norm_weight is None else part_norm.sum(0).to(norm_weight.dtype)
    return d_weight, d_carried, d_carried_lse, d_norm
