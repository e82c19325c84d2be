r"""Depth mixing as stateless operations; each checks its arguments and picks an implementation.

The step and the pool are registered operations (:mod:`depthmix.ops.mgr`, :mod:`depthmix.ops.pool`), the same under
``torch.compile`` as without, that run kernels or torch operations as :mod:`depthmix.ops.backend` says. Gradients are of
first order. All compute the equations in :mod:`depthmix.ops.reference`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError, suggest
from .ops import depth_attention as depth_ops
from .ops import eager, inversion, reference
from .ops import mgr as mgr_ops
from .ops import norm as norm_ops
from .ops import pool as pool_ops

GATES = ("competitive", "independent")


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _check_floating(**tensors: Any) -> None:
    """Every tensor is floating and on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise UserError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise UserError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
        if x.device != first.device:
            raise UserError(
                f"{name} is on {x.device} but {first_name} is on {first.device}; move one of them"
            )


def _check_vector(name: str, x: Tensor | None, size: int, meaning: str) -> None:
    if x is not None and x.shape != (size,):
        raise UserError(f"{name} must have shape [{size}] ({meaning}), got {_shape(x)}")


def _check_streams(streams: Tensor) -> None:
    if streams.dim() < 2:
        raise UserError(f"streams must have shape [..., n, D], got {_shape(streams)}")
    n, width = streams.shape[-2:]
    if not 1 <= n <= 64:
        raise UserError(f"streams must hold 1 to 64 streams in dimension -2, got {n} in {_shape(streams)}")
    if width < 1:
        raise UserError(f"streams must have at least one feature, got {_shape(streams)}")


def _check_step(
    layer_output: Tensor,
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    gate: str,
    update_weight: Tensor | None,
    norm_weight: Tensor | None = None,
) -> tuple[int, int]:
    """``(n, D)`` of a step whose arguments fit together."""
    _check_floating(
        streams=streams,
        layer_output=layer_output,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        pool_weight=pool_weight,
        update_weight=update_weight,
        norm_weight=norm_weight,
    )
    _check_streams(streams)
    *leading, n, width = streams.shape
    if gate not in GATES:
        raise UserError(suggest(str(gate), GATES, "gate"))
    if layer_output.shape != (*leading, width):
        raise UserError(
            f"layer_output must have the shape of streams without the stream dimension, "
            f"got layer_output {_shape(layer_output)} and streams {_shape(streams)}"
        )
    for name, x in (
        ("gate_weight", gate_weight),
        ("pool_weight", pool_weight),
        ("update_weight", update_weight),
        ("norm_weight", norm_weight),
    ):
        _check_vector(name, x, width, "the feature dimension of streams")
    _check_vector(
        "gate_bias",
        gate_bias,
        n + (gate == "competitive"),
        f"{gate} gate with n = {n} streams{', entry 0 keeps' if gate == 'competitive' else ''}",
    )
    return n, width


def multi_gate_residual(
    layer_output: Tensor,
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    *,
    gate: str = "competitive",
    update_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of Multi-Gate Residuals: gate, lerp, pool (arXiv 2605.23259, Eq. 1 to 5, Listing 1).

    Args:
        layer_output: ``[..., D]``, the sublayer's output y.
        streams: ``[..., n, D]`` with the same leading shape; n from 1 to 64, any D >= 1.
        gate_weight: ``[D]``, w1.
        gate_bias: ``[n + 1]`` for the competitive gate (entry 0 keeps), ``[n]`` for the independent one.
        pool_weight: ``[D]``, w2; ``None`` pools with equal weights.
        gate: ``"competitive"`` or ``"independent"``.
        update_weight: ``[D]`` or ``None``: lets the gate also score the update, ``+ w3 . rms(y) / sqrt(D)``.
        eps: added to the mean square inside every score.
        norm_weight: ``[D]`` or ``None``: return h RMS-normalised (with ``norm_eps``) and scaled,
            ready for the next sublayer.
        scale: of gate and pool scores; ``None`` is the paper's 1/sqrt(D).

    Returns:
        ``(h [..., D], new_streams [..., n, D])`` in the dtype of ``streams``. fp32, bf16, fp16
        (arithmetic in fp32) or fp64. ``||new_streams_i|| <= max(||streams_i||, ||layer_output||)``
        and ``||h|| <= max_i ||new_streams_i||`` up to rounding (Eq. 8, 9).

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument.
    """
    n, width = _check_step(
        layer_output, streams, gate_weight, gate_bias, pool_weight, gate, update_weight, norm_weight
    )
    h, new_streams, _ = mgr_ops.mgr_step(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width), gate_weight, gate_bias, pool_weight,
        update_weight, norm_weight, gate, width**-0.5 if scale is None else scale, eps, norm_eps,
    )  # fmt: skip
    return h.view(layer_output.shape), new_streams.view(streams.shape)


def multi_gate_window_step(
    layer_output: Tensor,
    streams: Tensor,
    window: tuple[Tensor, ...],
    since: int,
    write: bool,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    *,
    gate: str = "competitive",
    update_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`multi_gate_residual` as a step of a replay window, which keeps no streams (:mod:`depthmix.ops.mgr`).

    Args beyond those of :func:`multi_gate_residual`:
        streams: perhaps a handle: their gradient is theirs, their values are in ``window``.
        window: ``(written, anchor, y_1, beta_1, y_2, beta_2, ...)``: the streams last written, those that entered the
            window, both ``[..., n, D]``, and ``layer_output [..., D]`` and ``beta [..., n]`` of every step before.
            None of them receives a gradient.
        since: how many steps ago ``written`` was written.
        write: whether to write the new streams; otherwise they are returned as a handle.

    Returns:
        ``(h, new_streams, beta [..., n])``; equal to :func:`multi_gate_residual`, gradients included.
    """
    n, width = _check_step(
        layer_output, streams, gate_weight, gate_bias, pool_weight, gate, update_weight, norm_weight
    )
    written, anchor, *steps = (x.detach() for x in window)
    h, new_streams, beta = mgr_ops.mgr_window_step(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width), written.reshape(-1, n, width), since,
        anchor.reshape(-1, n, width), [y.reshape(-1, width) for y in steps[::2]],
        [beta.reshape(-1, n) for beta in steps[1::2]], write, gate_weight, gate_bias, pool_weight,
        update_weight, norm_weight, gate, width**-0.5 if scale is None else scale, eps, norm_eps,
    )  # fmt: skip
    return h.view(layer_output.shape), new_streams.view(streams.shape), beta.view(streams.shape[:-1])


def inversion_budget(streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`multi_gate_inversion_step` begins with: row norms, W and R, each ``[..., n]``, of
    ``streams [..., n, D]``."""
    return inversion.first_budget(streams.detach())


def multi_gate_inversion_step(
    layer_output: Tensor,
    streams: Tensor,
    token: Tensor | None,
    row_norms: Tensor,
    weight: Tensor,
    error: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    *,
    fallback: inversion.Fallback,
    last: bool,
    gate: str = "competitive",
    update_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """:func:`multi_gate_residual` whose backward pass undoes it (:mod:`depthmix.ops.inversion`).

    Args beyond those of :func:`multi_gate_residual`:
        token, row_norms, weight, error: what the step before returned, ``[..., n, D]`` and three ``[..., n]``; the
            first step has no token, and the rest from :func:`inversion_budget`.
        fallback: what is kept where undoing loses too much.
        last: whether the walk back begins here.

    Returns:
        ``(h [..., D], new_streams [..., n, D], token, row_norms, weight, error)``; the last step's token is ``None``.
    """
    n, width = _check_step(
        layer_output, streams, gate_weight, gate_bias, pool_weight, gate, update_weight, norm_weight
    )
    h, new_streams, token, *budget = inversion.InversionStep.apply(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width),
        None if token is None else token.reshape(-1, n, width),
        *(x.reshape(-1, n) for x in (row_norms, weight, error)), gate_weight, gate_bias, pool_weight,
        update_weight, norm_weight, (gate, width**-0.5 if scale is None else scale, eps, norm_eps), fallback, last,
    )  # fmt: skip
    return (
        h.view(layer_output.shape),
        new_streams.view(streams.shape),
        None if token is None else token.view(streams.shape),
        *(x.view(streams.shape[:-1]) for x in budget),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, ``x [..., D]``, ``weight [D]``; statistics in fp32, dtype of ``x``."""
    if _norms_by_hand(x):
        return norm_ops.rms_norm(x, weight, eps)
    # Of one dtype, torch's kernels already accumulate in fp32; of two, they would promote the result.
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``(rms_norm(total, weight, eps), total)`` with ``total = x + update``, all ``[..., D]``; in one pass on a CPU."""
    if _norms_by_hand(x) and torch.promote_types(x.dtype, update.dtype) == x.dtype:
        return norm_ops.add_rms_norm(x, update, weight, eps)
    total = x + update
    return rms_norm(total, weight, eps), total


def _norms_by_hand(x: Tensor) -> bool:
    """On a CPU F.rms_norm is a chain of small operations, each of which keeps its input; a compiler fuses them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, elementwise, of any ``x [...]`` (So et al. 2021)."""
    if torch.compiler.is_compiling():
        return x.relu().square()
    return eager.ReLUSquared.apply(x) if torch.is_grad_enabled() else x.relu().square_()


def attention_pool(
    streams: Tensor,
    pool_weight: Tensor | None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Softmax-weighted mean of the streams, ``alpha = softmax_i(scale * w . rms(s_i))`` (Eq. 1).

    Args:
        streams: ``[..., n, D]``; n from 1 to 64.
        pool_weight: ``[D]``; ``None`` gives equal weights.
        scale: ``None`` is 1/sqrt(D), as in MGR; Attention Residuals use 1.0.
        eps: added to the mean square inside the score.
        norm_weight: ``[D]`` or ``None``: return the mean RMS-normalised (with ``norm_eps``) and scaled.

    Returns:
        ``[..., D]`` in the dtype of ``streams``; arithmetic in fp32.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument.
    """
    _check_floating(streams=streams, pool_weight=pool_weight, norm_weight=norm_weight)
    _check_streams(streams)
    width = streams.shape[-1]
    _check_vector("pool_weight", pool_weight, width, "the feature dimension of streams")
    _check_vector("norm_weight", norm_weight, width, "the feature dimension of streams")
    scale = width**-0.5 if scale is None else scale
    return pool_ops.pool_streams(streams, pool_weight, norm_weight, scale=scale, eps=eps, norm_eps=norm_eps)


def _check_sources(sources: Sequence[Tensor]) -> int:
    """D of sources that agree with each other."""
    if len(sources) == 0:
        raise UserError("sources must hold at least one tensor, got none")
    _check_floating(**{f"sources[{i}]": x for i, x in enumerate(sources)})
    first = sources[0]
    for i, x in enumerate(sources):
        if x.shape != first.shape or x.dtype != first.dtype:
            raise UserError(
                f"sources must agree in shape and dtype, got {_shape(first)} {first.dtype} for the first "
                f"and {_shape(x)} {x.dtype} for sources[{i}]"
            )
    if first.dim() == 0 or first.shape[-1] == 0:
        raise UserError(f"sources must have at least one feature, got {_shape(first)}")
    return first.shape[-1]


def source_pool(
    sources: Sequence[Tensor],
    pool_weight: Tensor | None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    carried: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`attention_pool` over separate tensors, without stacking them.

    Args:
        sources: one or more tensors ``[..., D]`` of one shape and dtype.
        pool_weight, scale, eps, norm_weight, norm_eps: as in :func:`attention_pool`.
        carried: the mean and the log-sum-exp that :func:`source_pool_many` made of other sources with this
            weight: the result is the pool over all of them.

    Returns:
        ``[..., D]`` in the dtype of the sources.

    Raises:
        ValueError: no source, or a shape, dtype or device does not fit.
    """
    width = _check_sources(sources)
    mean, lse = carried or (None, None)
    first = sources[0]
    _check_floating(
        **{"sources[0]": first, "pool_weight": pool_weight, "norm_weight": norm_weight},
        **{"carried[0]": mean, "carried[1]": lse},
    )
    _check_vector("pool_weight", pool_weight, width, "the feature dimension of the sources")
    _check_vector("norm_weight", norm_weight, width, "the feature dimension of the sources")
    if mean is not None and lse is not None:
        dtype = reference.compute_dtype(first.dtype)
        if mean.shape != first.shape or lse.shape != first.shape[:-1] or {mean.dtype, lse.dtype} != {dtype}:
            raise UserError(
                f"carried must be a mean {_shape(first)} and a log-sum-exp without the last dimension, both "
                f"{dtype}, got {_shape(mean)} {mean.dtype} and {_shape(lse)} {lse.dtype}"
            )
    scale = width**-0.5 if scale is None else scale
    return pool_ops.pool(
        sources, pool_weight, mean, lse, norm_weight, scale=scale, eps=eps, norm_eps=norm_eps
    )


def source_pool_many(
    sources: Sequence[Tensor], weights: Tensor, *, scale: float | None = None, eps: float = 1e-6
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """:func:`source_pool` of the same sources with many weights, each source read once for all of them.

    Args:
        sources: one or more tensors ``[..., D]`` of one shape and dtype.
        weights: ``[Q, D]``.
        scale, eps: as in :func:`attention_pool`.

    Returns:
        ``(means, lses)``: Q tensors ``[..., D]`` and, of the logits behind them, Q log-sum-exps ``[...]``, in the
        compute dtype (fp32, fp64 for fp64), for :func:`source_pool` to go on with.

    Raises:
        ValueError: no source, or a shape, dtype or device does not fit.
    """
    width = _check_sources(sources)
    _check_floating(**{"sources[0]": sources[0], "weights": weights})
    if weights.dim() != 2 or weights.shape[1] != width:
        raise UserError(f"weights must have shape [Q, {width}], got {_shape(weights)}")
    scale = width**-0.5 if scale is None else scale
    return pool_ops.pool_many(sources, weights, scale=scale, eps=eps)


def depth_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    *,
    depth_query: Tensor | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over a sequence and over depth in one softmax (Mixture-of-Depths Attention, arXiv 2603.15619).

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, H, T', d]``, the sequence's keys and values.
        depth_keys, depth_values: one or more tensors ``[B, H, T, d]`` each, one per source; the query of a
            token meets those of the same token alone.
        depth_query: ``[B, H, T, d]``, the query for depth scores; ``None`` is ``q``. With rotary positions in
            ``q`` and ``k``, give query and depth keys without.
        causal: token t reads sequence entries 1 .. t; needs T' = T.
        mask: bool ``[T, T']``, true where a token reads an entry; instead of ``causal``.
        scale: of all scores; ``None`` is 1/sqrt(d).

    Returns:
        ``[B, H, T, d]`` in the dtype of ``q``; the softmax is computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: no source, or a shape, dtype or device does not fit; names the argument.
    """
    if len(depth_keys) == 0 or len(depth_keys) != len(depth_values):
        raise UserError(
            f"depth_keys and depth_values must hold one tensor per source and at least one, "
            f"got {len(depth_keys)} and {len(depth_values)}"
        )
    depth_query = q if depth_query is None else depth_query
    like_q = {"depth_query": depth_query}
    for name, sources in (("depth_keys", depth_keys), ("depth_values", depth_values)):
        like_q |= {f"{name}[{i}]": x for i, x in enumerate(sources)}
    _check_floating(q=q, k=k, v=v, **like_q)
    if q.dim() != 4:
        raise UserError(f"q must have shape [B, H, T, d], got {_shape(q)}")
    for name, x in like_q.items():
        if x.shape != q.shape:
            raise UserError(f"{name} must have the shape of q, got {_shape(x)} and q {_shape(q)}")
    length = k.shape[-2] if k.dim() == 4 else 0
    for name, x in {"k": k, "v": v}.items():
        if x.shape != (*q.shape[:2], length, q.shape[3]):
            raise UserError(
                f"{name} must have shape [B, H, T', d] with the B, H and d of q and one T', "
                f"got k {_shape(k)}, v {_shape(v)} and q {_shape(q)}"
            )
    for name, x in {"k": k, "v": v, **like_q}.items():
        if x.dtype != q.dtype:
            raise UserError(f"{name} must have the dtype of q, got {x.dtype} and q {q.dtype}")
    if mask is not None and (causal or mask.dtype != torch.bool or mask.shape != (q.shape[2], length)):
        raise UserError(
            f"mask must be bool [T, T'] = [{q.shape[2]}, {length}] and comes with causal=False, "
            f"got {mask.dtype} {_shape(mask)} with causal={causal}"
        )
    if causal and length != q.shape[2]:
        raise UserError(f"causal=True needs as many entries as queries, got k {_shape(k)} and q {_shape(q)}")
    memory = (q.new_empty(0), *(x for pair in zip(depth_keys, depth_values, strict=True) for x in pair))
    return read_depth_memory(q, k, v, memory, depth_query=depth_query, causal=causal, mask=mask, scale=scale)[
        0
    ]


def read_depth_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: tuple[Tensor, ...],
    *,
    depth_query: Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`depth_attention` over a memory made by :func:`extend_depth_memory`; nothing is checked.

    Returns ``(output [B, H, T, d], memory)``; later reads must be of the memory returned.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    entered, *sources = memory
    if not _by_hand(q):
        keys, values = sources[::2], sources[1::2]
        return depth_ops.reference(q, k, v, keys, values, depth_query, causal, mask, scale), memory
    token: Tensor | None = entered
    if 2 * entered.shape[0] != len(sources):  # not all of them were entered into this token
        token = None
        for pair in zip(sources[::2], sources[1::2], strict=True):
            token = depth_ops.Remember.apply(token, *pair)
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    y, token = depth_ops.DepthAttention.apply(q, k, v, depth_query, token, causal, mask, scale, *sources)
    return y, (token, *sources)


def extend_depth_memory(memory: tuple[Tensor, ...], key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """``memory``, at first ``()``, with one more source ``key, value [B, H, T, d]``.

    A memory is ``(token, key_1, value_1, key_2, ...)``; see :mod:`depthmix.ops.depth_attention` for the token.
    """
    token, sources = (memory[0], memory[1:]) if memory else (None, ())
    if _by_hand(key):
        if token is None or 2 * token.shape[0] == len(sources):
            token = depth_ops.Remember.apply(token, key, value)
    elif token is None:
        token = key.new_empty(0)
    return (token, *sources, key, value)


def _by_hand(x: Tensor) -> bool:
    """Whether the hand-written depth attention runs: eager, on a CPU, on at least one number."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
