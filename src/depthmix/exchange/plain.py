"""What a standalone model has in place of depthmix's kernels: the same functions in torch operations, for autograd.

:mod:`depthmix.exchange.standalone` puts these where the model's code calls the fused ones. Each is the equation that
the fused one is tested against; nothing here is called by depthmix itself.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ..ops import hyper, reference
from ..ops.channel_gate import admit, channel_gate
from ..ops.depth_attention import reference as depth_reference
from ..ops.reference import compute_dtype
from ..ops.sinkhorn import sinkhorn_reference
from .fields import FIELDS


def make_config(values):
    """The fields of a model's configuration that build it. Streams are kept for the backward pass as they are."""
    made = SimpleNamespace(**{name: getattr(values, name) for name in FIELDS})
    made.stream_memory = "store"
    made.n_sublayers = 2 * values.n_layer
    made.head_dim, made.attention_width = values.head_dim, values.attention_width
    return made


def rms_norm(x, weight, eps=1e-6):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, statistics in fp32, dtype of ``x``."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def relu_squared(x):
    """``max(x, 0)^2``."""
    return x.relu().square()


def step_and_norm(site, y, state, norm):
    """The step of ``site``, then the next sublayer's norm."""
    h, state = site(y, state)
    return h if norm is None else norm(h), state


def foresee(residual, state, blocks):
    """Nothing: every step works without."""
    return state


def multi_gate_residual(
    layer_output, streams, gate_weight, gate_bias, pool_weight, *, gate, update_weight, eps, scale
):
    """Gate, lerp, pool: ``(h [..., D], new_streams [..., n, D])``."""
    scale = streams.shape[-1] ** -0.5 if scale is None else scale
    return reference.multi_gate_residual(
        layer_output, streams, gate_weight, gate_bias, pool_weight, gate, update_weight, scale, eps
    )


def attention_pool(streams, pool_weight, *, scale=None, eps=1e-6):
    """``sum_i softmax_i(scale * w . rms(s_i)) s_i`` of ``streams [..., n, D]``."""
    scale = streams.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention_pool(streams, pool_weight, scale, eps)


def source_pool(sources, pool_weight, *, scale=None, eps=1e-6, carried=None):
    """:func:`attention_pool` of separate tensors ``[..., D]``."""
    return attention_pool(torch.stack(list(sources), -2), pool_weight, scale=scale, eps=eps)


def source_pool_many(*_, **__):
    """Pools of many readers at once: only for states that were made by ``foresee``."""
    raise ValueError("nothing is foreseen here")


def gated_update(x, update, weight, bias, *, convex, normalise=True, eps=1e-6):
    """``x + g u`` or ``(1 - g) x + g u`` with a gate for each channel."""
    dtype = compute_dtype(x.dtype)
    gate = channel_gate(x, update, weight, bias, normalise, eps)
    return admit(x.to(dtype), update.to(dtype), gate, convex).to(x.dtype)


def weighted_sum(weights, sources):
    """``sum_j weights[j] sources[j]``."""
    dtype = compute_dtype(sources[0].dtype)
    weights = weights.to(dtype)
    return sum(weights[j] * source.to(dtype) for j, source in enumerate(sources)).to(sources[0].dtype)


def hyper_begin(streams, family, parameters):
    """The coefficients that ``streams [..., n, D]`` give, and the first read."""
    made = family.reference(streams, *parameters)
    return hyper.read(streams, made[..., -1, :]), made


def hyper_step(layer_output, streams, coefficients, family, parameters):
    """Write, the coefficients that the new streams give, read."""
    new = hyper.write(layer_output, streams, coefficients)
    made = family.reference(new, *parameters)
    return hyper.read(new, made[..., -1, :]), new, made


def hyper_write(layer_output, streams, coefficients):
    """``A_r^T H + B (x) y``."""
    return hyper.mix_reference(layer_output, streams, coefficients[..., :-2, :], coefficients[..., -2, :])


def hyper_static_step(layer_output, streams, carry, depth, weights):
    """Write and read with coefficients that no token changes."""
    new = hyper.mix_reference(layer_output, streams, carry, depth)
    return hyper.read(new, weights.expand(new.shape[:-1])), new


def hyper_read(streams, weights):
    """``sum_i weights_i H_i``: ``[..., n, D], [..., n] -> [..., D]``."""
    dtype = compute_dtype(streams.dtype)
    return (weights.to(dtype).unsqueeze(-1) * streams.to(dtype)).sum(-2).to(streams.dtype)


def sinkhorn(logits, iterations):
    """``logits [..., n, n]`` -> matrices whose rows and columns sum to 1."""
    return sinkhorn_reference(logits, iterations)


def read_depth_memory(q, k, v, memory, *, depth_query, causal=True, mask=None, scale=None):
    """Attention over a sequence and, at the same token, over the depth memory: ``(output, memory)``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return depth_reference(q, k, v, memory[::2], memory[1::2], depth_query, causal, mask, scale), memory


def extend_depth_memory(memory, key, value):
    """``memory`` with one more source."""
    return (*memory, key, value)


def add_rms_norm(x, update, weight, eps=1e-6):
    """``(rms_norm(total), total)`` of ``total = x + update``."""
    total = x + update
    return rms_norm(total, weight, eps), total


class NotHere:
    """Stands where depthmix has a way of training with less memory; a standalone model keeps its streams."""

    def __init__(self, *_, **__):
        raise ValueError("this way of keeping streams needs depthmix")


def fallback(*_):
    """What inversion would keep: nothing is inverted here."""
