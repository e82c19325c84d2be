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

from . import backend, pool_eager
from .reference import compute_dtype


def _kernels(x: Tensor) -> ModuleType:
    """The module whose functions run on ``x``."""
    choice = backend.choose(x)
    if x.dtype != torch.float64:
        if choice == "triton":
            from .triton import pool

            return pool
        if choice == "native":
            from .native import pool

            if pool.usable(x):
                return pool
    return pool_eager


def _rows(x: Tensor | None) -> Tensor | None:
    """``[..., D] -> [N, D]``, the last dimension contiguous; a view wherever there can be one."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    """``[..., D] -> [N, D]``, contiguous."""
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


@torch.library.custom_op("depthmix::pool", mutates_args=())
def pool(
    sources: Sequence[Tensor],
    weight: Tensor | None,
    carried: Tensor | None,
    carried_lse: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """``h [..., D]`` of sources ``[..., D]``; ``carried [..., D]`` and ``carried_lse [...]`` of ``pool_many``."""
    first = sources[0]
    h = _kernels(first).pool_forward(
        [_rows(v) for v in sources], weight, _whole(carried), _flat(carried_lse), norm_weight, scale, eps, norm_eps
    )  # fmt: skip
    return h.view(first.shape)


@torch.library.custom_op("depthmix::pool_backward", mutates_args=())
def pool_backward(
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
    are; with ``carried_lse`` comes ``h`` or ``carried``, and both have a gradient."""
    first = sources[0]
    kernels = _kernels(first)
    rows = [_rows(v) for v in sources]
    into = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in rows]
    h, carried, lse = _whole(h), _whole(carried), _flat(carried_lse)
    arguments = [_whole(grad_h), rows, weight, carried, lse, norm_weight, scale, eps, norm_eps, into]
    if h is not None and kernels.__name__.endswith("triton.pool"):  # which knows no h
        arguments[3] = pool_eager.carried_of(h, rows, weight, lse, scale, eps)
    elif h is not None:
        arguments.append(h)
    d_weight, d_carried, d_lse, d_norm = kernels.pool_backward(*arguments)
    if carried_lse is not None:
        d_carried, d_lse = d_carried.view(first.shape), d_lse.view(carried_lse.shape)
    return [*(x.view(first.shape) for x in into), *_present(d_weight, d_carried, d_lse, d_norm)]


@torch.library.custom_op("depthmix::pool_streams", mutates_args=())
def pool_streams(
    streams: Tensor, weight: Tensor | None, norm_weight: Tensor | None, scale: float, eps: float, norm_eps: float
) -> Tensor:
    """``h [..., D]`` of streams ``[..., n, D]``."""
    h = _kernels(streams).pool_forward(
        _unstacked(streams), weight, None, None, norm_weight, scale, eps, norm_eps
    )
    return h.view(*streams.shape[:-2], streams.shape[-1])


@torch.library.custom_op("depthmix::pool_streams_backward", mutates_args=())
def pool_streams_backward(
    grad_h: Tensor,
    streams: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> list[Tensor]:
    """Gradients of the streams and of those of ``weight`` and ``norm_weight`` that there are."""
    d_streams = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    d_weight, _, _, d_norm = _kernels(streams).pool_backward(
        _whole(grad_h), _unstacked(streams), weight, None, None, norm_weight, scale, eps, norm_eps,
        _unstacked(d_streams),
    )  # fmt: skip
    return [d_streams, *_present(d_weight, d_norm)]


def _unstacked(streams: Tensor) -> list[Tensor]:
    """The n streams as views ``[N, D]``."""
    n, width = streams.shape[-2:]
    streams = streams.reshape(-1, n, width)
    if streams.stride(2) != 1 and width > 1:
        streams = streams.contiguous()
    return list(streams.unbind(1))


@torch.library.custom_op("depthmix::pool_many", mutates_args=())
def pool_many(sources: Sequence[Tensor], weights: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """``(out [Q, ..., D], lse [Q, ...])`` of ``weights [Q, D]``, in the compute dtype of the sources."""
    first = sources[0]
    out, lse = _kernels(first).pool_many_forward(
        [_rows(v) for v in sources], weights.contiguous(), scale, eps
    )
    return out.view(-1, *first.shape), lse.view(-1, *first.shape[:-1])


@torch.library.custom_op("depthmix::pool_many_backward", mutates_args=())
def pool_many_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    sources: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor,
    scale: float,
    eps: float,
) -> list[Tensor]:
    """Gradients of the sources and of ``weights``."""
    first, kernels, Q = sources[0], _kernels(sources[0]), len(weights)
    rows, weights = [_rows(v) for v in sources], weights.contiguous()
    into = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in rows]
    N, width = rows[0].shape
    d_weights = kernels.pool_many_backward(
        grad_out.reshape(Q, N, width).contiguous(), grad_lse.reshape(Q, N).contiguous(), rows, weights, None,
        lse.reshape(Q, N), scale, eps, into,
    )  # fmt: skip
    return [*(x.view(first.shape) for x in into), d_weights]


# --- shapes -----------------------------------------------------------------------------------


def _like(*tensors: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x is not None]


@pool.register_fake
def _(sources, *_):
    return sources[0].new_empty(sources[0].shape)


@pool_backward.register_fake
def _(grad_h, sources, weight, h, carried, carried_lse, norm_weight, *_):
    first = sources[0]
    d_carried = None if carried_lse is None else first.new_empty(first.shape, dtype=carried_lse.dtype)
    return _like(*sources, weight, d_carried, carried_lse, norm_weight)


@pool_streams.register_fake
def _(streams, *_):
    return streams.new_empty(*streams.shape[:-2], streams.shape[-1])


@pool_streams_backward.register_fake
def _(grad_h, streams, weight, norm_weight, *_):
    return _like(streams, weight, norm_weight)


@pool_many.register_fake
def _(sources, weights, *_):
    first = sources[0]
    out = first.new_empty(len(weights), *first.shape, dtype=compute_dtype(first.dtype))
    return out, out.new_empty(out.shape[:-1])


@pool_many_backward.register_fake
def _(grad_out, grad_lse, sources, weights, *_):
    return _like(*sources, weights)


# --- gradients --------------------------------------------------------------------------------


def _keep_pool(ctx, inputs, output):
    sources, weight, carried, lse, norm_weight, *ctx.rest = inputs
    h = None
    if carried is not None and norm_weight is None:
        h, carried = output, None
    ctx.save_for_backward(weight, h, carried, lse, norm_weight, *sources)


def _differentiate_pool(ctx, grad_h):
    weight, h, carried, lse, norm_weight, *sources = ctx.saved_tensors
    gradients = pool_backward(grad_h, sources, weight, h, carried, lse, norm_weight, *ctx.rest)
    d_sources, rest = gradients[: len(sources)], iter(gradients[len(sources) :])
    d_weight, d_carried, d_lse, d_norm = (
        None if x is None else next(rest) for x in (weight, lse, lse, norm_weight)
    )
    return d_sources, d_weight, d_carried, d_lse, d_norm, None, None, None


def _keep_streams(ctx, inputs, output):
    streams, weight, norm_weight, *ctx.rest = inputs
    ctx.save_for_backward(streams, weight, norm_weight)


def _differentiate_streams(ctx, grad_h):
    streams, weight, norm_weight = ctx.saved_tensors
    rest = iter(pool_streams_backward(grad_h, streams, weight, norm_weight, *ctx.rest))
    gradients = (None if x is None else next(rest) for x in (streams, weight, norm_weight))
    return *gradients, None, None, None


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
    *d_sources, d_weights = pool_many_backward(grad_out, grad_lse, sources, weights, lse, *ctx.rest)
    return d_sources, d_weights, None, None


pool.register_autograd(_differentiate_pool, setup_context=_keep_pool)
pool_streams.register_autograd(_differentiate_streams, setup_context=_keep_streams)
pool_many.register_autograd(_differentiate_many, setup_context=_keep_many)
