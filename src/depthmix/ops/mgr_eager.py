r"""The MGR step by torch operations: any device, any dtype, few passes over the streams, gradients by hand.

Run operation by operation, the reference reads and writes an ``n x D`` tile some fifteen times forward and more
backward, and keeps several of them for autograd. Here a score is a matrix-vector product times a reciprocal root mean
square, so that no normalised copy of the streams is ever written, and the gradients are written out, so that nothing
but the streams themselves is kept:

with :math:`r_i = 1/\sqrt{\mathrm{mean}(s_i^2) + \epsilon}` and score :math:`g_i = c\,r_i\,(w \cdot s_i)`,

.. math:: \partial g_i / \partial s_i = c\, r_i\, w - (g_i r_i^2 / D)\, s_i, \qquad
          \partial g_i / \partial w = c\, r_i\, s_i .

The pool over the new streams is that of :mod:`depthmix.ops.pool_eager`, the streams being its sources.

Shapes inside this file: ``N`` tokens, ``n`` streams, ``D`` features; streams ``[N, n, D]``.
A mean square that overflows gives ``r = 0`` and a score of 0, as RMSNorm itself does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import pool_eager
from .eager import _plain, _reciprocal_rms, _to, _weighted_sum
from .reference import compute_dtype


def _score(x: Tensor, weight: Tensor, reciprocal: Tensor, scale: float) -> Tensor:
    """``scale * weight . rms(x)``: ``x [..., D]`` in a compute dtype -> ``[...]``."""
    dot = torch.mv(x.reshape(-1, x.shape[-1]), weight).view(reciprocal.shape)
    # 0 * inf: where the mean square overflowed the normalised vector is 0, and so is its score.
    return dot.mul_(reciprocal).mul_(scale).masked_fill_(reciprocal == 0, 0.0)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over a last dimension of a few entries, where the library's kernel is slow."""
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return weights.div_(weights.sum(-1, keepdim=True))


def _weight_gradient(x: Tensor, coefficient: Tensor) -> Tensor:
    """``sum over all rows of coefficient[row] x[row]``: ``x [..., D] -> [D]``."""
    return torch.mv(x.reshape(-1, x.shape[-1]).t(), coefficient.reshape(-1))


def gate_forward(layer_output, streams, gate_weight, gate_bias, gate, update_weight, scale, eps):
    """``beta [N, n]`` and what its gradient needs: ``(r, g, r_y, g_y)``; inputs in the compute dtype."""
    r = _reciprocal_rms(streams, eps)
    g = _score(streams, gate_weight, r, scale)
    logits, r_y, g_y = g, None, None
    if update_weight is not None:
        r_y = _reciprocal_rms(layer_output, eps)
        g_y = _score(layer_output, update_weight, r_y, scale)
        logits = g + g_y.unsqueeze(-1)
    if gate == "independent":
        beta = torch.sigmoid(logits + gate_bias)
    else:
        keep = gate_bias[0].expand(logits.shape[0], 1)
        # A slice of the softmax would keep the unused first column alive for as long as beta lives.
        beta = _softmax(torch.cat([keep, logits + gate_bias[1:]], -1))[:, 1:].contiguous()
    return beta, r, g, r_y, g_y


def lerp(layer_output: Tensor, streams: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """``(1 - beta) s + beta y`` in the compute dtype, rounded to ``dtype``.

    The one place where streams are advanced: replay repeats this call and gets the same bits.
    """
    beta = beta.unsqueeze(-1)
    return torch.mul(streams, 1 - beta).addcmul_(beta, layer_output.unsqueeze(-2)).to(dtype)


def _add_score_gradient(into: Tensor, x: Tensor, weight: Tensor, d_score, r, value, scale: float) -> Tensor:
    """Add the gradient of a score to ``into``; returns the gradient of ``weight``.

    ``into, x [..., D]``; ``d_score, r, value [...]``.
    """
    along_weight = d_score * r * scale
    along_x = d_score * value * r * r / -x.shape[-1]
    into.addcmul_(along_weight.unsqueeze(-1), weight)
    into.addcmul_(along_x.unsqueeze(-1), x)
    return _weight_gradient(x, along_weight)


def gate_backward(
    grad_new, layer_output, streams, gate_weight, gate, update_weight, beta, r, g, r_y, g_y, scale
):
    """Gradients of gate and lerp given ``grad_new [N, n, D]`` of the new streams; overwrites ``grad_new``.

    Returns ``(layer_output, streams, gate_weight, gate_bias, update_weight)`` gradients.
    """
    d_beta = ((layer_output.unsqueeze(-2) - streams).mul_(grad_new)).sum(-1)
    if gate == "independent":
        d_logits = beta * (1 - beta) * d_beta
        d_bias = d_logits.sum(0)
    else:
        mean = (beta * d_beta).sum(-1, keepdim=True)
        d_logits = beta * (d_beta - mean)
        d_keep = -(1 - beta.sum(-1, keepdim=True)) * mean
        d_bias = torch.cat([d_keep.sum(0), d_logits.sum(0)])
    d_output = _weighted_sum(beta, grad_new)
    d_update = None
    if update_weight is not None:
        d_update = _add_score_gradient(
            d_output, layer_output, update_weight, d_logits.sum(-1), r_y, g_y, scale
        )
    d_streams = grad_new.mul_((1 - beta).unsqueeze(-1))
    d_weight = _add_score_gradient(d_streams, streams, gate_weight, d_logits, r, g, scale)
    return d_output, d_streams, d_weight, d_bias, d_update


def entering_streams(streams: Tensor, outputs: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    """``streams [N, n, D]`` advanced by earlier steps' ``outputs [N, D]`` and ``gates [N, n]``, one after another."""
    dtype = compute_dtype(streams.dtype)
    with _plain(streams.device):
        for y, beta in zip(outputs, gates, strict=True):
            streams = lerp(y.to(dtype), streams.to(dtype), beta, streams.dtype)
    return streams


def step_forward(
    layer_output, streams, outputs, gates, gate_weight, gate_bias, pool_weight, update_weight, norm_weight,
    gate, scale, eps, norm_eps, write=True,
):  # fmt: skip
    """``(h [N, D], new_streams [N, n, D] or None, beta [N, n])``; see :mod:`depthmix.ops.mgr`."""
    dtype = compute_dtype(streams.dtype)
    w1, bias, w3 = (_to(w, dtype) for w in (gate_weight, gate_bias, update_weight))
    with _plain(streams.device):
        y, s = layer_output.to(dtype), entering_streams(streams, outputs, gates).to(dtype)
        beta, *_ = gate_forward(y, s, w1, bias, gate, w3, scale, eps)
        new_streams = lerp(y, s, beta, streams.dtype)
    sources = list(new_streams.unbind(1))
    h = pool_eager.pool_forward(sources, pool_weight, None, None, norm_weight, scale, eps, norm_eps)
    return h, new_streams if write else None, beta


def step_backward(
    grad_h, grad_streams, layer_output, streams, outputs, gates, beta, gate_weight, gate_bias, pool_weight,
    update_weight, norm_weight, gate, scale, eps, norm_eps,
):  # fmt: skip
    """Gradients in the inputs' own dtypes: ``(layer_output, streams, gate_weight, gate_bias, pool_weight,
    update_weight, norm_weight)``; see :mod:`depthmix.ops.mgr`."""
    dtype = compute_dtype(streams.dtype)
    w1, w3 = (_to(w, dtype) for w in (gate_weight, update_weight))
    with _plain(streams.device):
        y, s = layer_output.to(dtype), entering_streams(streams, outputs, gates).to(dtype)
        total = torch.zeros_like(s) if grad_h is None else torch.empty_like(s)
        if grad_h is None:  # the read was not used
            d_pool, d_norm = (None if w is None else torch.zeros_like(w) for w in (pool_weight, norm_weight))
        else:
            sources = list(lerp(y, s, beta, streams.dtype).unbind(1))
            d_pool, _, _, d_norm = pool_eager.pool_backward(
                grad_h,
                sources,
                pool_weight,
                None,
                None,
                norm_weight,
                scale,
                eps,
                norm_eps,
                list(total.unbind(1)),
            )
        if grad_streams is not None:  # they were not only read
            total.add_(grad_streams)
        r, r_y, g_y = _reciprocal_rms(s, eps), None, None
        g = _score(s, w1, r, scale)
        if w3 is not None:
            r_y = _reciprocal_rms(y, eps)
            g_y = _score(y, w3, r_y, scale)
        d_output, d_streams, d_gate, d_bias, d_update = gate_backward(
            total, y, s, w1, gate, w3, beta, r, g, r_y, g_y, scale
        )
    like = (layer_output, streams, gate_weight, gate_bias, pool_weight, update_weight, norm_weight)
    grads = (d_output, d_streams, d_gate, d_bias, d_pool, d_update, d_norm)
    return tuple(None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, like, strict=True))
