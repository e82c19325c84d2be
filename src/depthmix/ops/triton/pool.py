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
    One launch and one pass by online softmax: k reads, one write. Sources come in groups of a few, whose loads
    are all on their way before the first is used.
backward
    One launch. First the three dot products of every source, with :math:`v_i`, w and :math:`\partial h`; then the
    k gradients. The sources of a single group of a token stay in registers in between; of more the same program reads
    them again soon after, from the cache. From memory k + 1 reads and k writes.
    With an output norm the mixture is recomputed in between. Of what was carried only :math:`\delta` needs more
    than its weight, and :math:`\delta = h \cdot \partial h`: without a norm h may be given in its place, and as a
    softmax's gradients add up to zero, that of the log-sum-exp is :math:`-\sum_i g_i`. Programs are persistent: each
    adds up the parameter gradients of its own tokens, in their order, and the rows they leave are summed in order.
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

# ruff: noqa: RUF005  (Triton adds tuples, and knows no starred ones)

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SOURCES = 32
"""Sources of one launch: its code is unrolled over them."""
LONGEST_ROW = 8192
"""Numbers of a row that a program holds at most; beyond, a row is passed through in tiles."""


class Launch(NamedTuple):
    """How a kernel that holds a row is launched."""

    block: int
    """Numbers in a piece of a row; a power of two."""
    sub: int
    """Pieces."""
    warps: int
    group: int
    """Sources loaded together. The only group keeps its sources in registers from their first to their last use."""


TUNED: dict[tuple[str, int, int, int], Launch] = {}
"""Launches found by measurement, by ``(kernel, bytes of a number, sources, D)``; they go before :func:`plan`."""


def pieces(width: int) -> tuple[int, int]:
    """``(BLOCK, SUB)``: at most 8 equal pieces, a power of two each, that exceed ``width`` by the least.

    >>> [pieces(d) for d in (768, 1024, 1280, 5120, 7168, 1000)]
    [(256, 3), (1024, 1), (256, 5), (1024, 5), (1024, 7), (1024, 1)]
    """
    options = ((triton.next_power_of_2(triton.cdiv(width, sub)), sub) for sub in range(1, 9))
    # A warp reads 256 numbers of 16 bits at once; below, pieces are not worth their instructions.
    return min((o for o in options if o[0] >= 256 or o[1] == 1), key=lambda o: (o[0] * o[1], o[1]))


def plan(kernel: str, width: int, k: int, itemsize: int) -> Launch | None:
    """Launch of ``"forward"``, ``"backward"`` or ``"many"`` for ``k`` rows of ``width``; ``None``: in tiles.

    Reasoned from the registers of an H100: 64 Ki of 32 bits for each multiprocessor, 255 at most for a thread,
    1024 threads at most in a program. Let a thread hold E numbers of a row. What the compiler takes was looked up
    (Triton 3.6 for sm_90, 16-bit sources; no launch below spills); no GPU was at hand to time it.

    forward: mixture, weight and the group's rows: some (2 + G) E. One warp up to D = 1280 (E = 40, G = 4, 160 to 200
    registers) sums without a barrier, and ten such programs have 100 KiB on their way; 24 KiB hide the latency of
    memory at full bandwidth. Rows of 8 warps come in pairs: at D = 7168 128 registers and two programs instead of
    180 and one.

    backward: gradient, weight, the weight's gradient and the group's rows, (3 + G) E. E = 16 or somewhat more, in
    fours (120 to 170 registers), or in pairs from E = 17 on (184 at D = 7168).

    many: the sources kept, the mixture and the query, (2 + k) E: E = 8, where k E <= 96; ``None`` beyond.
    """
    if width > LONGEST_ROW or k > SOURCES:
        return None
    found = TUNED.get((kernel, itemsize, k, width))
    if found is not None:
        return found
    block, sub = pieces(width)

    def warps(each: int) -> int:
        # At least 4 numbers of a piece for each thread, one load.
        return min(triton.next_power_of_2(triton.cdiv(block * sub, 32 * each)), max(block // 128, 1))

    if kernel == "forward":
        count = warps(40)
        return Launch(block, sub, count, min(4 if count <= 4 else 2, k))
    if kernel == "backward":
        count = warps(16)
        return Launch(block, sub, count, min(4 if block * sub <= 512 * count else 2, k))
    count, group = warps(8), triton.next_power_of_2(k)
    return Launch(block, sub, count, group) if group * block * sub <= 96 * 32 * count else None


def _programs(device: torch.device, warps: int, rows: int) -> int:
    """Persistent programs: what a device holds at once at 168 registers for each thread."""
    if device.type != "cuda":
        return min(rows, 3)
    return min(rows, torch.cuda.get_device_properties(device).multi_processor_count * max(12 // warps, 1))


# --- a row in pieces ------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, offset, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """The row that starts at ``offset``: ``SUB`` times ``[BLOCK]`` in its own dtype, 0 beyond ``D``."""
    row = ()  # type: tuple[object, ...]
    for j in tl.static_range(SUB):
        o_d = j * BLOCK + tl.arange(0, BLOCK)
        if SUB * BLOCK == D:
            row = row + (tl.load(pointer + offset + o_d),)
        else:
            row = row + (tl.load(pointer + offset + o_d, mask=o_d < D, other=0.0),)
    return row


@triton.jit
def _pick(options, g, s: tl.constexpr, G: tl.constexpr):
    """Number ``g G + s`` of a tuple: a loop over groups cannot index it. A tuple of one stands for equal ones."""
    if len(options) == 1:
        chosen = options[0]
    else:
        chosen = options[s]
        for j in tl.static_range(1, len(options) // G):
            chosen = tl.where(g == j, options[j * G + s], chosen)
    return chosen


@triton.jit
def _load_group(
    sources, strides, row, g, k, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr
):
    """One row of each source of group ``g``; 0 for those past the ``k``-th. All loads before any use."""
    rows = ()  # type: tuple[object, ...]
    for s in tl.static_range(G):
        p_v = _pick(sources, g, s, G) + row * _pick(strides, g, s, G)
        pieces = ()  # type: tuple[object, ...]
        for j in tl.static_range(SUB):
            o_d = j * BLOCK + tl.arange(0, BLOCK)
            m_d = (o_d < D) & (o_d * 0 + (g * G + s) < k)  # [BLOCK]: a scalar may be a Python number here
            pieces = pieces + (tl.load(p_v + o_d, mask=m_d, other=0.0),)
        rows = rows + (pieces,)
    return rows


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
    row = ()  # type: tuple[object, ...]
    for _j in tl.static_range(SUB):
        row = row + (tl.zeros([BLOCK], tl.float32),)
    return row


@triton.jit
def _fp32(row, SUB: tl.constexpr):
    out = ()  # type: tuple[object, ...]
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
    out = ()  # type: tuple[object, ...]
    for j in tl.static_range(SUB):
        out = out + (a * x[j] + b * y[j],)
    return out


@triton.jit
def _plus(x, b, y, SUB: tl.constexpr):
    """``x + b y`` for a scalar ``b``."""
    out = ()  # type: tuple[object, ...]
    for j in tl.static_range(SUB):
        out = out + (x[j] + b * y[j],)
    return out


@triton.jit
def _times(x, y, factor, SUB: tl.constexpr):
    """``factor x y``, elementwise, for a scalar ``factor``."""
    out = ()  # type: tuple[object, ...]
    for j in tl.static_range(SUB):
        out = out + (factor * x[j] * y[j],)
    return out


@triton.jit
def _over(x, divisor, SUB: tl.constexpr):
    out = ()  # type: tuple[object, ...]
    for j in tl.static_range(SUB):
        out = out + (x[j] / divisor,)
    return out


@triton.jit
def _rounded(x, pointer, SUB: tl.constexpr):
    """As it would be read again from behind ``pointer``."""
    out = ()  # type: tuple[object, ...]
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
    sources, strides, k, weight, carried, carried_lse, norm_weight, out, out_lse, scale, eps, norm_eps,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
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
    for g in range(len(sources) // G):
        b_group = _load_group(sources, strides, row, g, k, G, D, BLOCK, SUB)
        for s in tl.static_range(G):
            b_v = _fp32(b_group[s], SUB)
            if weight is None:
                b_a = tl.full([], 0.0, tl.float32)
            else:
                b_r = tl.rsqrt(_dot(b_v, b_v, SUB) / D + eps)
                b_a = _score(_dot(b_v, b_w, SUB), b_r, scale)
            b_a = tl.where(g * G + s < k, b_a, float("-inf"))
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
    parts = [sources[start:stop] for start, stop in _chunks(len(sources))]
    launches = [plan("forward", width, len(part), first.element_size()) for part in parts]
    for i, (part, launch) in enumerate(zip(parts, launches, strict=True), 1):
        if launch is None:  # for the width, and so for every part
            return _tiled_forward(sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps)
        last = i == len(parts)
        target, lse = out, None
        if not last:
            target = torch.empty((tokens, width), dtype=torch.float32, device=first.device)
            lse = torch.empty(tokens, dtype=torch.float32, device=first.device)
        _forward_kernel[(tokens,)](
            *_pointers(part, launch.group), len(part), weight, carried, carried_lse, norm_weight, target, lse,
            scale, eps, norm_eps,
            G=launch.group, D=width, BLOCK=launch.block, SUB=launch.sub, num_warps=launch.warps,
        )  # fmt: skip
        carried, carried_lse = target, lse
    return out


def _chunks(k: int) -> list[tuple[int, int]]:
    """``k`` sources in as few launches as possible, as even as possible."""
    parts = triton.cdiv(k, SOURCES)
    cuts = [k * i // parts for i in range(parts + 1)]
    return list(pairwise(cuts))


def _pointers(rows: list[Tensor], group: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors ``[N, D]``, filled up to whole groups, and their row strides (one if they are all the same)."""
    filled = (*rows, *[rows[0]] * (-len(rows) % group))
    strides = tuple(x.stride(0) for x in filled)
    return filled, strides[:1] if len(set(strides)) == 1 else strides


# --- backward, one launch -------------------------------------------------------------------------------------------


@triton.jit
def _entry(vector, o_k, i):
    """Entry ``i`` of ``vector [K2]``."""
    return tl.sum(tl.where(o_k == i, vector, 0.0), 0)


@triton.jit
def _backward_kernel(
    grad_h, grad_stride, sources, strides, into, into_strides, k, weight, carried, carried_lse, h, norm_weight,
    d_weight, d_carried, d_carried_lse, d_norm_weight, N, scale, eps, norm_eps,
    G: tl.constexpr, K2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = len(sources) // G
    # Without scores the weights are constants, and nobody asks how good a source was.
    SCORED: tl.constexpr = weight is not None or carried_lse is not None
    o_k = tl.arange(0, K2)
    if weight is not None:
        b_w = _fp32(_load(weight, 0, D, BLOCK, SUB), SUB)
        b_dw = _zeros(BLOCK, SUB)
    if norm_weight is not None:
        b_dn = _zeros(BLOCK, SUB)
    for row in range(program, N, tl.num_programs(0)):
        b_g = _fp32(_load(grad_h, row * grad_stride, D, BLOCK, SUB), SUB)
        if GROUPS == 1:
            b_group = _load_group(sources, strides, row, 0, k, G, D, BLOCK, SUB)
        if h is not None:
            b_delta = _dot(_fp32(_load(h, row * D, D, BLOCK, SUB), SUB), b_g, SUB)

        # [K2] each: scores, r, and the dot products of the sources with the gradient of the mixture.
        b_a = tl.zeros([K2], tl.float32)
        b_r = tl.zeros([K2], tl.float32)
        b_d = tl.zeros([K2], tl.float32)
        if weight is not None or norm_weight is None:
            for g in range(GROUPS):
                if GROUPS > 1:
                    b_group = _load_group(sources, strides, row, g, k, G, D, BLOCK, SUB)
                for s in tl.static_range(G):
                    b_v = _fp32(b_group[s], SUB)
                    if weight is not None:
                        b_ri = tl.rsqrt(_dot(b_v, b_v, SUB) / D + eps)
                        b_r = tl.where(o_k == g * G + s, b_ri, b_r)
                        b_a = tl.where(o_k == g * G + s, _score(_dot(b_v, b_w, SUB), b_ri, scale), b_a)
                    if SCORED and norm_weight is None:
                        b_d = tl.where(o_k == g * G + s, _dot(b_v, b_g, SUB), b_d)

        b_top = tl.where(o_k < k, b_a, float("-inf"))
        b_m = tl.max(b_top, 0)
        if carried_lse is not None:
            b_m = tl.maximum(b_m, tl.load(carried_lse + row))
        b_alpha = tl.exp(b_top - b_m)
        b_l = tl.sum(b_alpha, 0)
        if carried_lse is not None:
            b_alpha_c = tl.exp(tl.load(carried_lse + row) - b_m)
            b_l += b_alpha_c
            b_alpha_c = b_alpha_c / b_l
        if carried is not None:
            b_c = _load(carried, row * D, D, BLOCK, SUB)
        b_alpha = b_alpha / b_l

        if norm_weight is not None:
            # The mixture again, and the gradient through the norm.
            b_h = _zeros(BLOCK, SUB)
            if carried is not None:
                b_h = _plus(b_h, b_alpha_c, b_c, SUB)
            for g in range(GROUPS):
                if GROUPS > 1:
                    b_group = _load_group(sources, strides, row, g, k, G, D, BLOCK, SUB)
                for s in tl.static_range(G):
                    b_h = _plus(b_h, _entry(b_alpha, o_k, g * G + s), _fp32(b_group[s], SUB), SUB)
            b_h = _rounded(b_h, sources[0], SUB)
            b_rh = tl.rsqrt(_dot(b_h, b_h, SUB) / D + norm_eps)
            b_n = _fp32(_load(norm_weight, 0, D, BLOCK, SUB), SUB)
            b_x = _times(b_h, b_g, b_rh, SUB)
            b_dn = _plus(b_dn, 1.0, b_x, SUB)
            b_along = _dot(b_x, b_n, SUB) * b_rh * b_rh / -D
            b_g = _plus(_times(b_g, b_n, b_rh, SUB), b_along, b_h, SUB)
            if SCORED:
                for g in range(GROUPS):
                    if GROUPS > 1:
                        b_group = _load_group(sources, strides, row, g, k, G, D, BLOCK, SUB)
                    for s in tl.static_range(G):
                        b_d = tl.where(o_k == g * G + s, _dot(_fp32(b_group[s], SUB), b_g, SUB), b_d)

        if h is None:
            b_delta = tl.sum(b_alpha * b_d, 0)
            if carried is not None:
                b_dc = _dot(b_c, b_g, SUB)
                b_delta += b_alpha_c * b_dc
                tl.store(d_carried_lse + row, b_alpha_c * (b_dc - b_delta))
        b_da = b_alpha * (b_d - b_delta)
        if h is not None:
            tl.store(d_carried_lse + row, -tl.sum(b_da, 0))
        if carried_lse is not None:
            _store(d_carried, row * D, _plus(_zeros(BLOCK, SUB), b_alpha_c, b_g, SUB), D, BLOCK, SUB)

        # What each source's gradient has of w and of the source itself.  [K2]
        b_along_w = b_da * b_r * scale
        b_along_v = b_da * b_a * b_r * b_r / -D
        for g in range(GROUPS):
            if GROUPS > 1 and weight is not None:
                b_group = _load_group(sources, strides, row, g, k, G, D, BLOCK, SUB)
            for s in tl.static_range(G):
                b_dv = _plus(_zeros(BLOCK, SUB), _entry(b_alpha, o_k, g * G + s), b_g, SUB)
                if weight is not None:
                    b_v = _fp32(b_group[s], SUB)
                    b_cw = _entry(b_along_w, o_k, g * G + s)
                    b_dw = _plus(b_dw, b_cw, b_v, SUB)
                    b_dv = _plus(b_dv, b_cw, b_w, SUB)
                    b_dv = _plus(b_dv, _entry(b_along_v, o_k, g * G + s), b_v, SUB)
                if g * G + s < k:
                    offset = row * _pick(into_strides, g, s, G)
                    _store(_pick(into, g, s, G), offset, b_dv, D, BLOCK, SUB)
    if weight is not None:
        _store(d_weight, program * D, b_dw, D, BLOCK, SUB)
    if norm_weight is not None:
        _store(d_norm_weight, program * D, b_dn, D, BLOCK, SUB)


def pool_backward(
    grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into, h=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(d_weight, d_carried, d_carried_lse, d_norm_weight)``, ``None`` where the input is.

    ``grad_h [N, D]``; the rest as for :func:`pool_forward`. The sources' gradients are written into ``into``, k
    tensors ``[N, D]`` of any row stride. ``h [N, D]``, the result of :func:`pool_forward` without a norm, may be given
    in place of ``carried``.
    """
    first = sources[0]
    tokens, width = first.shape
    if width > 1 and grad_h.stride(-1) != 1:
        grad_h = grad_h.contiguous()
    d_carried = d_carried_lse = None
    if carried_lse is not None:
        d_carried = torch.empty((tokens, width), dtype=torch.float32, device=first.device)
        d_carried_lse = torch.empty(tokens, dtype=torch.float32, device=first.device)
    if tokens == 0:
        d_weight, d_norm = (None if w is None else torch.zeros_like(w) for w in (weight, norm_weight))
        return d_weight, d_carried, d_carried_lse, d_norm
    launch = plan("backward", width, len(sources), first.element_size())
    if launch is None:
        return _tiled_backward(
            grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into, h
        )
    programs = _programs(first.device, launch.warps, tokens)
    part_weight, part_norm = (
        None if w is None else torch.empty((programs, width), dtype=torch.float32, device=first.device)
        for w in (weight, norm_weight)
    )
    _backward_kernel[(programs,)](
        grad_h, grad_h.stride(0), *_pointers(sources, launch.group), *_pointers(into, launch.group), len(sources),
        weight, carried, carried_lse, h, norm_weight, part_weight, d_carried, d_carried_lse, part_norm,
        tokens, scale, eps, norm_eps,
        G=launch.group, K2=triton.next_power_of_2(len(sources)), D=width, BLOCK=launch.block, SUB=launch.sub,
        num_warps=launch.warps,
    )  # fmt: skip
    d_weight, d_norm = (
        None if w is None or part is None else part.sum(0).to(w.dtype)
        for w, part in ((weight, part_weight), (norm_weight, part_norm))
    )
    return d_weight, d_carried, d_carried_lse, d_norm


# --- several queries, and rows in tiles: scores first, mixtures and gradients second --------------------------------


@triton.jit
def _chosen(tensors, o_q, ALIGNED: tl.constexpr):
    """Pointers ``[Q2]`` to tensors of a tuple; past its end to the last."""
    p_q = tensors[len(tensors) - 1] + o_q * 0
    for q in tl.static_range(len(tensors) - 1):
        p_q = tl.where(o_q == q, tensors[q], p_q)
    if (
        ALIGNED
    ):  # a choice between aligned pointers does not count as aligned, and would be read number by number
        p_q = tl.multiple_of(p_q, [16])
    return p_q


@triton.jit
def _scores_kernel(
    sources, strides, queries, grads, grad_stride, ALIGNED: tl.constexpr, r, dots, grad_dots, N, Q, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """For one token: ``r [k]``, ``v_i . q`` and, with ``grads``, Q of ``[N, D]``, ``v_i . grad`` ``[k, Q]``."""
    row = tl.program_id(0).to(tl.int64)
    o_q, o_k = tl.program_id(1) * Q2 + tl.arange(0, Q2), tl.arange(0, K2)
    b_square = tl.zeros([K2], tl.float32)
    b_dot = tl.zeros([K2, Q2], tl.float32)
    b_grad = tl.zeros([K2, Q2], tl.float32)
    if grads is not None:
        p_q = _chosen(grads, o_q, ALIGNED) + row * grad_stride
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        m_qd = (o_q < Q)[:, None] & (o_d < D)[None, :]
        o_qd = o_q[:, None].to(tl.int64) * D + o_d[None, :]
        b_q = tl.load(queries + o_qd, mask=m_qd, other=0.0).to(tl.float32)  # [Q2, BLOCK]
        if grads is not None:
            b_g = tl.load(p_q[:, None] + o_d[None, :], mask=m_qd, other=0.0).to(tl.float32)  # [Q2, BLOCK]
        for i in tl.static_range(len(sources)):
            b_v = tl.load(sources[i] + row * strides[i] + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_square += tl.where(o_k == i, tl.sum(b_v * b_v, 0), 0.0)
            b_part = tl.sum(b_q * b_v[None, :], 1)
            b_dot += tl.where((o_k == i)[:, None], b_part[None, :], 0.0)
            if grads is not None:
                b_part = tl.sum(b_g * b_v[None, :], 1)
                b_grad += tl.where((o_k == i)[:, None], b_part[None, :], 0.0)
    m_k = o_k < len(sources)
    tl.store(r + o_k * N + row, tl.rsqrt(b_square / D + eps), mask=m_k)
    m_kq = m_k[:, None] & (o_q < Q)[None, :]
    o_kq = (o_k[:, None] * Q + o_q[None, :]).to(tl.int64) * N + row
    tl.store(dots + o_kq, b_dot, mask=m_kq)
    if grads is not None:
        tl.store(grad_dots + o_kq, b_grad, mask=m_kq)


@triton.jit
def _mix_kernel(
    sources, strides, alpha, out, N, Q,
    ADD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """``out [Q, N, D] (+)= sum_i alpha[i, :, N] v_i`` for one token and ``BLOCK`` features."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_q = tl.program_id(2) * Q2 + tl.arange(0, Q2)
    m_d, m_q = o_d < D, o_q < Q
    p_out = out + (o_q[:, None].to(tl.int64) * N + row) * D + o_d[None, :]
    m_qd = m_q[:, None] & m_d[None, :]
    b_h = tl.zeros([Q2, BLOCK], tl.float32)
    if ADD:
        b_h = tl.load(p_out, mask=m_qd, other=0.0)
    for i in tl.static_range(len(sources)):
        b_v = tl.load(sources[i] + row * strides[i] + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_alpha = tl.load(alpha + (i * Q + o_q).to(tl.int64) * N + row, mask=m_q, other=0.0)  # [Q2]
        b_h += b_alpha[:, None] * b_v[None, :]
    tl.store(p_out, b_h, mask=m_qd)


@triton.jit
def _gradients_kernel(
    sources, strides, into, into_strides, queries, grads, grad_stride, ALIGNED: tl.constexpr,
    alpha, along_q, along_v, d_queries, N, Q,
    D: tl.constexpr, BLOCK: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """``d v_i = sum_q alpha[i, q] grad_q + along_q[i, q] q + along_v[i] v_i`` for ``BLOCK`` features.

    A persistent program's own tokens add up to ``d_queries [P, Q, D]``, ``sum along_q[i, q] v_i``.
    """
    program = tl.program_id(0).to(tl.int64)
    o_d, o_q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, Q2)
    m_d, m_q = o_d < D, o_q < Q
    m_qd = m_q[:, None] & m_d[None, :]
    o_qd = o_q[:, None].to(tl.int64) * D + o_d[None, :]
    b_q = tl.load(queries + o_qd, mask=m_qd, other=0.0).to(tl.float32)  # [Q2, BLOCK]
    b_dq = tl.zeros([Q2, BLOCK], tl.float32)
    p_q = _chosen(grads, o_q, ALIGNED)
    for row in range(program, N, tl.num_programs(0)):
        p_g = (p_q + row * grad_stride)[:, None] + o_d[None, :]
        b_g = tl.load(p_g, mask=m_qd, other=0.0).to(tl.float32)  # [Q2, BLOCK]
        for i in tl.static_range(len(sources)):
            b_v = tl.load(sources[i] + row * strides[i] + o_d, mask=m_d, other=0.0).to(tl.float32)
            o_k = (i * Q + o_q).to(tl.int64) * N + row
            b_alpha = tl.load(alpha + o_k, mask=m_q, other=0.0)  # [Q2]
            b_along = tl.load(along_q + o_k, mask=m_q, other=0.0)  # [Q2]
            b_dq += b_along[:, None] * b_v[None, :]
            b_dv = tl.sum(b_alpha[:, None] * b_g + b_along[:, None] * b_q, 0)
            b_dv += tl.load(along_v + i * N + row) * b_v
            tl.store(into[i] + row * into_strides[i] + o_d, b_dv.to(into[i].dtype.element_ty), mask=m_d)
    tl.store(d_queries + program * Q * D + o_qd, b_dq, mask=m_qd)


class _Tiles(NamedTuple):
    """Launch of the kernels above: ``queries`` of a tile, and numbers of a row in it."""

    queries: int
    block: int


def _tiles(kernel: str, queries: int, width: int) -> _Tiles:
    """A tile ``[queries, block]`` in fp32 takes 4096 numbers, 32 registers of each of 128 threads.

    Gradients need every query at once: their tile is as tall as it must be, and narrower.
    """
    tall = triton.next_power_of_2(queries)
    if kernel != "gradients":
        tall = min(tall, 8)
    return _Tiles(tall, min(triton.next_power_of_2(width), max(4096 // tall, 16), 2048))


def _scores(sources, queries, grads, scale, eps):
    """``(r [k, 1, N], scores a [k, Q, N], v . grad [k, Q, N] or None)``; ``grads``: Q of ``[N, D]``, or ``None``."""
    tokens, width = sources[0].shape
    k, count = len(sources), queries.shape[0]
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=queries.device)  # noqa: E731
    r, dots = new(k, 1, tokens), new(k, count, tokens)
    grad_dots = None if grads is None else new(k, count, tokens)
    tile = _tiles("scores", count, width)
    for start, stop in _chunks(k):
        _scores_kernel[(tokens, triton.cdiv(count, tile.queries))](
            *_separate(sources[start:stop]), queries, *_alike(grads), r[start:], dots[start:],
            None if grads is None else grad_dots[start:], tokens, count, eps,
            D=width, BLOCK=tile.block, Q2=tile.queries, K2=triton.next_power_of_2(stop - start),
        )  # fmt: skip
    return r, torch.where(r == 0, 0.0, dots * r * scale), grad_dots


def _alike(grads: list[Tensor] | None) -> tuple[tuple[Tensor, ...] | None, int, bool]:
    """Tensors ``[N, D]``, the row stride that all of them have, and whether all start at a multiple of 16 bytes."""
    if grads is None:
        return None, 0, False
    if len({g.stride() for g in grads}) > 1 or grads[0].stride(1) != 1:
        grads = [g.contiguous() for g in grads]
    return tuple(grads), grads[0].stride(0), all(g.data_ptr() % 16 == 0 for g in grads)


def _separate(rows: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors ``[N, D]`` and their row strides."""
    return tuple(rows), tuple(x.stride(0) for x in rows)


def _mix(sources, alpha, out, add: bool) -> None:
    """``out [Q, N, D] = sum_i alpha[i] v_i``, or added to it; ``alpha [k, Q, N]``."""
    count, tokens, width = out.shape
    tile = _tiles("mix", count, width)
    grid = (tokens, triton.cdiv(width, tile.block), triton.cdiv(count, tile.queries))
    for start, stop in _chunks(len(sources)):
        _mix_kernel[grid](
            *_separate(sources[start:stop]), alpha[start:], out, tokens, count,
            ADD=add or start > 0, D=width, BLOCK=tile.block, Q2=tile.queries,
        )  # fmt: skip


def _gradients(grads, sources, queries, alpha, d_score, r, a, scale, into) -> Tensor:
    """Write the sources' gradients; ``d_queries [Q, D]`` fp32. ``grads``: Q of ``[N, D]``; all ``[k, Q, N]``: alpha,
    d_score, a."""
    tokens, width = sources[0].shape
    count = queries.shape[0]
    along_q = (d_score * r).mul_(scale)
    along_v = ((d_score * a).sum(1) * r[:, 0] * r[:, 0]).div_(-width)
    tile = _tiles("gradients", count, width)
    programs = _programs(queries.device, 4, tokens)
    total = torch.zeros((count, width), dtype=torch.float32, device=queries.device)
    for start, stop in _chunks(len(sources)):
        part = torch.empty((programs, count, width), dtype=torch.float32, device=queries.device)
        _gradients_kernel[(programs, triton.cdiv(width, tile.block))](
            *_separate(sources[start:stop]), *_separate(into[start:stop]), queries, *_alike(grads),
            alpha[start:], along_q[start:], along_v[start:], part, tokens, count,
            D=width, BLOCK=tile.block, Q2=tile.queries,
        )  # fmt: skip
        total += part.sum(0)
    return total


def _softmax_with(a, carried_lse) -> tuple[Tensor, Tensor | None]:
    """``(alpha [k, 1, N], alpha of what is carried [N] or None)`` from scores ``a [k, 1, N]``."""
    if carried_lse is None:
        return torch.softmax(a, 0), None
    alpha = torch.softmax(torch.cat([a, carried_lse.view(1, 1, -1)]), 0)
    return alpha[:-1], alpha[-1, 0]


def _tiled_mixture(sources, alpha, alpha_carried, carried) -> Tensor:
    """``[N, D]`` fp32."""
    out = torch.empty(sources[0].shape, dtype=torch.float32, device=sources[0].device)
    if carried is not None:
        torch.mul(alpha_carried.unsqueeze(-1), carried, out=out)
    _mix(sources, alpha, out.unsqueeze(0), carried is not None)
    return out


def _as_query(weight, first) -> Tensor:
    """``[1, D]``; without a weight every score is 0."""
    if weight is None:
        return torch.zeros((1, first.shape[1]), dtype=torch.float32, device=first.device)
    return weight.view(1, -1)


def _tiled_forward(sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps) -> Tensor:
    dtype = sources[0].dtype
    _, a, _ = _scores(sources, _as_query(weight, sources[0]), None, scale, eps)
    h = _tiled_mixture(sources, *_softmax_with(a, carried_lse), carried).to(dtype)
    if norm_weight is None:
        return h
    h = h.float()
    r = torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps)
    return h.mul_(r).mul_(norm_weight.float()).to(dtype)


def _tiled_backward(
    grad_h, sources, weight, carried, carried_lse, norm_weight, scale, eps, norm_eps, into, h
):
    first, width = sources[0], sources[0].shape[1]
    query, d_norm = _as_query(weight, first), None
    if norm_weight is None:
        # h like a source: all that is asked of it is its dot product with the gradient.
        read = sources if h is None else [*sources, h]
        r, a, d_alpha = _scores(read, query, [grad_h], scale, eps)
        inner = d_alpha[-1]
        r, a, d_alpha = (x[: len(sources)] for x in (r, a, d_alpha))
        alpha, alpha_carried = _softmax_with(a, carried_lse)
    else:
        r, a, _ = _scores(sources, query, None, scale, eps)
        alpha, alpha_carried = _softmax_with(a, carried_lse)
        mean = _tiled_mixture(sources, alpha, alpha_carried, carried).to(first.dtype).float()
        r_h = torch.rsqrt(mean.square().mean(-1, keepdim=True) + norm_eps)
        x = grad_h.float() * r_h
        d_norm = (x * mean).sum(0).to(norm_weight.dtype)
        x.mul_(norm_weight.float())
        grad_h = x.addcmul_(mean, (x * mean).sum(-1, keepdim=True) * r_h * r_h / -width)
        _, _, d_alpha = _scores(sources, query, [grad_h], scale, eps)
    if h is None:
        inner = (alpha * d_alpha).sum(0)
        if carried is not None:
            dot = (carried * grad_h).sum(-1)
            inner = inner + alpha_carried * dot
    d_score = (d_alpha - inner).mul_(alpha)
    d_carried = d_carried_lse = None
    if carried_lse is not None:
        d_carried_lse = alpha_carried * (dot - inner[0]) if h is None else -d_score.sum(0)[0]
        d_carried = alpha_carried.unsqueeze(-1) * grad_h.float()
    d_query = _gradients([grad_h], sources, query, alpha, d_score, r, a, scale, into)
    return None if weight is None else d_query[0].to(weight.dtype), d_carried, d_carried_lse, d_norm


@triton.jit
def _many_kernel(
    sources, strides, k, queries, out, lse, N, Q, scale, eps,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """All queries of one token, whose sources stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, G)
    b_group = _load_group(sources, strides, row, 0, k, G, D, BLOCK, SUB)
    b_r = tl.zeros([G], tl.float32)
    for s in tl.static_range(G):
        b_v = _fp32(b_group[s], SUB)
        b_r = tl.where(o_k == s, tl.rsqrt(_dot(b_v, b_v, SUB) / D + eps), b_r)
    for q in range(Q):
        b_q = _fp32(_load(queries, q * D, D, BLOCK, SUB), SUB)
        b_a = tl.zeros([G], tl.float32)
        for s in tl.static_range(G):
            b_a = tl.where(o_k == s, _dot(_fp32(b_group[s], SUB), b_q, SUB), b_a)
        b_a = tl.where(o_k < k, _score(b_a, b_r, scale), float("-inf"))
        b_m = tl.max(b_a, 0)
        b_p = tl.exp(b_a - b_m)
        b_l = tl.sum(b_p, 0)
        b_p = b_p / b_l
        b_h = _zeros(BLOCK, SUB)
        for s in tl.static_range(G):
            b_h = _plus(b_h, _entry(b_p, o_k, s), _fp32(b_group[s], SUB), SUB)
        p_row = (row * 0 + q) * N + row  # 64 bits
        tl.store(lse + p_row, b_m + tl.log(b_l))
        _store(out, p_row * D, b_h, D, BLOCK, SUB)


def pool_many_forward(sources, queries, scale, eps) -> tuple[Tensor, Tensor]:
    """``(out [Q, N, D], lse [Q, N])`` in fp32: each query's mixture, and the log-sum-exp of its scores.

    ``sources``: k tensors ``[N, D]`` of any row stride; ``queries [Q, D]``.
    """
    first, count = sources[0], queries.shape[0]
    tokens, width = first.shape
    out = torch.empty((count, tokens, width), dtype=torch.float32, device=first.device)
    lse = torch.empty((count, tokens), dtype=torch.float32, device=first.device)
    if tokens == 0 or count == 0:
        return out, lse
    launch = plan("many", width, len(sources), first.element_size())
    if launch is not None:
        _many_kernel[(tokens,)](
            *_pointers(sources, launch.group), len(sources), queries, out, lse, tokens, count, scale, eps,
            G=launch.group, D=width, BLOCK=launch.block, SUB=launch.sub, num_warps=launch.warps,
        )  # fmt: skip
        return out, lse
    _, a, _ = _scores(sources, queries, None, scale, eps)
    torch.logsumexp(a, 0, out=lse)
    _mix(sources, torch.softmax(a, 0), out, False)
    return out, lse


def pool_many_backward(grad_out, grad_lse, sources, queries, lse, scale, eps, into) -> Tensor:
    """``d_queries [Q, D]``; the sources' gradients are written into ``into``.

    ``grad_out``: Q tensors ``[N, D]``; ``grad_lse [Q, N]``; ``lse`` as :func:`pool_many_forward` returned it, whose
    ``out`` is not read: its dot product with its gradient is a weighted sum of those with the sources.
    """
    if len(sources[0]) == 0 or queries.shape[0] == 0:
        for x in into:
            x.zero_()
        return torch.zeros_like(queries)
    r, a, d_alpha = _scores(sources, queries, grad_out, scale, eps)
    alpha = torch.exp(a - lse)
    d_score = (d_alpha - (alpha * d_alpha).sum(0)).add_(grad_lse).mul_(alpha)
    return _gradients(grad_out, sources, queries, alpha, d_score, r, a, scale, into).to(queries.dtype)
