r"""Softmax pooling over the depth of a token as registered operations, whatever runs them.

For sources :math:`v_1 \dots v_k` (streams of Multi-Gate Residuals, arXiv 2605.23259, Eq. 1; outputs of earlier
sublayers in Attention Residuals, arXiv 2603.15031, Eq. 2), a weight :math:`w` and a scale :math:`c`:

.. math::
    r_i = 1/\sqrt{\mathrm{mean}(v_i^2) + \epsilon}, \qquad a_i = c\, r_i\, (w \cdot v_i), \qquad
    \alpha = \mathrm{softmax}(a), \qquad h = \sum_i \alpha_i v_i,

equal weights where there is no w, and where a norm's weight is given then :math:`h \leftarrow \mathrm{rms}(h)\, \gamma`
of the h that was rounded. The weight of a key norm belongs into w, since only their product enters. Backwards,
with :math:`g_i = \alpha_i (v_i \cdot \partial h - h \cdot \partial h)` the gradient of :math:`a_i`,

.. math:: \partial v_i = \alpha_i\, \partial h + c\, r_i g_i\, w - (a_i g_i r_i^2 / D)\, v_i, \qquad
          \partial w = \sum c\, r_i g_i\, v_i .

======================== =========================================================================================
``pool``                 any number of sources in a list, none of them copied; k read and 1 written, backwards
                         k + 1 read and k written
``pool_streams``         the same for the n streams of one tensor ``[..., n, D]``, whose gradient is one tensor
``pool_many``            Q weights meet the same sources at once, each of which is read once for all of them:
                         ``(out, lse)``, the means in the compute dtype and the log-sum-exps of their logits
======================== =========================================================================================

**Two phases** (arXiv 2603.15031, section 4). ``pool`` takes the mean that ``pool_many`` made of other sources and
their log-sum-exp :math:`\lambda`, as one more source with the logit :math:`\lambda`: exactly one softmax over all.

**Kept** for the backward pass: the inputs, and scores are computed again, on chip. Not kept is the mean that came from
``pool_many``, D fp32 numbers: with :math:`\omega` its share, its part :math:`\omega\, \bar v` is what h, which whoever
reads it keeps as well, has over the fresh sources; only :math:`h \cdot \partial h` is needed, and
:math:`\partial \lambda = -\sum_i g_i` since a softmax's gradients add up to zero. In bf16 and fp16 that h is the
rounded one. With a norm behind it, where h is nowhere, the mean itself is kept.

Gradients are of first order. Tensors are fp32, bf16, fp16 or (torch operations only) fp64, of any leading shape;
arithmetic is fp32, fp64 for fp64.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, pool_eager
from .native import pool as native
from .reference import compute_dtype
from .registration import register, register_differentiable, runs_directly


def _kernels(x: Tensor) -> ModuleType:
    """The module whose functions run on ``x``."""
    choice = backend.choose(x)
    if x.dtype != torch.float64:
        if choice == "triton":
            from .triton import pool

            return pool
        if choice == "native" and native.usable(x):
            return native
    return pool_eager


def _rows(sources: Sequence[Tensor], kernels: ModuleType) -> list[Tensor]:
    """``[..., D] -> [N, D]``, the last dimension contiguous; a view wherever there can be one."""
    if kernels is native and all(x.is_contiguous() for x in sources):
        return list(sources)
    flat = [x.reshape(-1, x.shape[-1]) for x in sources]
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in flat]


def _unstacked(streams: Tensor) -> list[Tensor]:
    """The n streams ``[N, D]`` of ``[..., n, D]``, views wherever there can be."""
    n, width = streams.shape[-2:]
    streams = streams.reshape(-1, n, width)
    if streams.stride(2) != 1 and width > 1:
        streams = streams.contiguous()
    return list(streams.unbind(1))


def _whole(x: Tensor | None) -> Tensor | None:
    """``[..., D] -> [N, D]``, contiguous."""
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _empty(x: Tensor) -> Tensor:
    """Contiguous, of the shape of ``x``."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


# --- pool -------------------------------------------------------------------------------------


def pool(
    sources: Sequence[Tensor],
    weight: Tensor | None,
    carried: Tensor | None = None,
    carried_lse: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    scale: float,
    eps: float,
    norm_eps: float = 1e-6,
) -> Tensor:
    """``h [..., D]`` of sources ``[..., D]``; ``carried [..., D]`` and ``carried_lse [...]`` of :func:`pool_many`."""
    return run_pool(list(sources), weight, carried, carried_lse, norm_weight, scale, eps, norm_eps)


def _pool(
    sources: Sequence[Tensor],
    weight: Tensor | None,
    carried: Tensor | None,
    carried_lse: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """``h [..., D]``."""
    kernels, first = _kernels(sources[0]), sources[0]
    rows, carried, lse = _rows(sources, kernels), _whole(carried), _flat(carried_lse)
    h = kernels.pool_forward(rows, weight, carried, lse, norm_weight, scale, eps, norm_eps)
    return h.view(first.shape)


def _pool_backward(
    grad_h: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor | None,
    h: Tensor | None,
    carried: Tensor | None,
    carried_lse: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> list[Tensor]:
    """Gradients of the sources and of those of ``weight``, ``carried``, ``carried_lse`` and ``norm_weight`` that there
    are; with ``carried_lse`` comes ``h`` or ``carried``, and both it and the mean have a gradient."""
    kernels, first = _kernels(sources[0]), sources[0]
    rows, h, carried, lse = _rows(sources, kernels), _whole(h), _whole(carried), _flat(carried_lse)
    gradients = [_empty(v) for v in sources]
    d_weight, d_carried, d_lse, d_norm = kernels.pool_backward(
        _whole(grad_h), rows, weight, carried, lse, norm_weight, scale, eps, norm_eps, _rows(gradients, kernels), h
    )  # fmt: skip
    if carried_lse is not None:
        d_carried, d_lse = d_carried.view(first.shape), d_lse.view(carried_lse.shape)
    return [*gradients, *_present(d_weight, d_carried, d_lse, d_norm)]


def _fake_pool(sources, *_):
    return sources[0].new_empty(sources[0].shape)


def _fake_pool_backward(grad_h, sources, weight, h, carried, carried_lse, norm_weight, *_):
    first = sources[0]
    d_carried = None if carried_lse is None else first.new_empty(first.shape, dtype=carried_lse.dtype)
    return [x.new_empty(x.shape) for x in (*sources, *_present(weight, d_carried, carried_lse, norm_weight))]


def _keep_pool(ctx, inputs, output):
    sources, weight, carried, lse, norm_weight, *ctx.rest = inputs
    h = None
    if carried is not None and norm_weight is None:
        h, carried = output, None
    ctx.save_for_backward(weight, h, carried, lse, norm_weight, *sources)


def _differentiate_pool(run_backward, ctx, grad_h):
    weight, h, carried, lse, norm_weight, *sources = ctx.saved_tensors
    found = run_backward(grad_h, sources, weight, h, carried, lse, norm_weight, *ctx.rest)
    rest = iter(found[len(sources) :])
    d_others = [None if x is None else next(rest) for x in (weight, lse, lse, norm_weight)]
    return found[: len(sources)], *d_others, None, None, None


registered_pool_backward = register("pool_backward", _pool_backward, _fake_pool_backward)
run_pool = register_differentiable(
    "pool", _pool, _fake_pool, _keep_pool, _differentiate_pool, _pool_backward, registered_pool_backward
)


# --- pool_streams -----------------------------------------------------------------------------


def pool_streams(
    streams: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None = None,
    *,
    scale: float,
    eps: float,
    norm_eps: float = 1e-6,
) -> Tensor:
    """``h [..., D]`` of streams ``[..., n, D]``."""
    return run_pool_streams(streams, weight, norm_weight, scale, eps, norm_eps)


def _streams(
    streams: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """``h [..., D]``."""
    h = _kernels(streams).pool_forward(
        _unstacked(streams), weight, None, None, norm_weight, scale, eps, norm_eps
    )
    return h.view(*streams.shape[:-2], streams.shape[-1])


def _streams_backward(
    grad_h: Tensor,
    streams: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> list[Tensor]:
    """Gradients of the streams and of those of ``weight`` and ``norm_weight`` that there are."""
    d_streams = _empty(streams)
    d_weight, _, _, d_norm = _kernels(streams).pool_backward(
        _whole(grad_h), _unstacked(streams), weight, None, None, norm_weight, scale, eps, norm_eps,
        _unstacked(d_streams),
    )  # fmt: skip
    return _present(d_streams, d_weight, d_norm)


def _fake_streams(streams, *_):
    return streams.new_empty(*streams.shape[:-2], streams.shape[-1])


def _fake_streams_backward(grad_h, streams, weight, norm_weight, *_):
    return [x.new_empty(x.shape) for x in _present(streams, weight, norm_weight)]


def _keep_streams(ctx, inputs, output):
    streams, weight, norm_weight, *ctx.rest = inputs
    ctx.save_for_backward(streams, weight, norm_weight)


def _differentiate_streams(run_backward, ctx, grad_h):
    saved = ctx.saved_tensors
    rest = iter(run_backward(grad_h, *saved, *ctx.rest))
    return *(None if x is None else next(rest) for x in saved), None, None, None


registered_streams_backward = register("pool_streams_backward", _streams_backward, _fake_streams_backward)
run_pool_streams = register_differentiable(
    "pool_streams", _streams, _fake_streams, _keep_streams, _differentiate_streams, _streams_backward,
    registered_streams_backward,
)  # fmt: skip


# --- pool_many --------------------------------------------------------------------------------


def pool_many(
    sources: Sequence[Tensor], weights: Tensor, *, scale: float, eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``(Q means [..., D], Q log-sum-exps [...])`` for ``weights [Q, D]``, in the compute dtype of the sources."""
    Q = len(weights)
    if runs_directly(sources[0]):
        found = PoolMany.apply(weights, scale, eps, *sources)
        return found[:Q], found[Q:]
    out, lse = registered_pool_many(list(sources), weights, scale, eps)
    return out.unbind(0), lse.unbind(0)


def _many_forward(sources, weights, scale, eps) -> tuple[Tensor, Tensor]:
    kernels, first = _kernels(sources[0]), sources[0]
    out, lse = kernels.pool_many_forward(_rows(sources, kernels), weights.contiguous(), scale, eps)
    return out.view(len(weights), *first.shape), lse.view(len(weights), *first.shape[:-1])


def _many_backward(grad_out, grad_lse, sources, weights, lse, scale, eps) -> tuple[list[Tensor], Tensor]:
    """Gradients of the sources and of ``weights``; ``grad_out``: Q tensors, ``grad_lse`` and ``lse [Q, ...]``."""
    kernels, Q = _kernels(sources[0]), len(weights)
    rows, weights = _rows(sources, kernels), weights.contiguous()
    grad_out, grad_lse, lse = [_whole(g) for g in grad_out], grad_lse.reshape(Q, -1), lse.reshape(Q, -1)
    gradients = [_empty(v) for v in sources]
    d_weights = kernels.pool_many_backward(
        grad_out, grad_lse.contiguous(), rows, weights, lse, scale, eps, _rows(gradients, kernels)
    )
    return gradients, d_weights


class PoolMany(torch.autograd.Function):
    """``(weights [Q, D], scale, eps, *sources) -> (Q means, Q log-sum-exps)``: no gradient is stacked."""

    @staticmethod
    def forward(ctx, weights, scale, eps, *sources):
        out, lse = _many_forward(sources, weights, scale, eps)
        _keep_many(ctx, (sources, weights, scale, eps), (out, lse))
        return *out.unbind(0), *lse.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        weights, lse, *sources = ctx.saved_tensors
        Q = len(weights)
        if all(g is None for g in grads):
            return None, None, None, *(None for _ in sources)
        nothing = None
        if any(g is None for g in grads[:Q]):
            nothing = lse.new_zeros(ctx.shape[1:])
        grad_out = [nothing if g is None else g for g in grads[:Q]]
        grad_lse = torch.stack([torch.zeros_like(lse[0]) if g is None else g for g in grads[Q:]])
        d_sources, d_weights = _many_backward(grad_out, grad_lse, sources, weights, lse, *ctx.rest)
        return d_weights, None, None, *d_sources


@torch.library.custom_op("depthmix::pool_many", mutates_args=())
def registered_pool_many(
    sources: Sequence[Tensor], weights: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """``(out [Q, ..., D], lse [Q, ...])``."""
    return _many_forward(sources, weights, scale, eps)


@registered_pool_many.register_fake
def _(sources, weights, *_):
    first = sources[0]
    out = first.new_empty(len(weights), *first.shape, dtype=compute_dtype(first.dtype))
    return out, out.new_empty(out.shape[:-1])


@torch.library.custom_op("depthmix::pool_many_backward", mutates_args=())
def registered_pool_many_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    sources: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor,
    scale: float,
    eps: float,
) -> list[Tensor]:
    """Gradients of the sources and of ``weights``."""
    d_sources, d_weights = _many_backward(grad_out, grad_lse, sources, weights, lse, scale, eps)
    return [*d_sources, d_weights]


@registered_pool_many_backward.register_fake
def _(grad_out, grad_lse, sources, weights, *_):
    return [x.new_empty(x.shape) for x in (*sources, weights)]


def _keep_many(ctx, inputs, output):
    sources, weights, *ctx.rest = inputs
    ctx.save_for_backward(weights, output[1], *sources)
    ctx.shape = output[0].shape
    ctx.set_materialize_grads(False)


def _differentiate_many(ctx, grad_out, grad_lse):
    weights, lse, *sources = ctx.saved_tensors
    if grad_out is None:
        grad_out = lse.new_zeros(ctx.shape)
    if grad_lse is None:
        grad_lse = torch.zeros_like(lse)
    *d_sources, d_weights = registered_pool_many_backward(
        grad_out, grad_lse, sources, weights, lse, *ctx.rest
    )
    return d_sources, d_weights, None, None


registered_pool_many.register_autograd(_differentiate_many, setup_context=_keep_many)
