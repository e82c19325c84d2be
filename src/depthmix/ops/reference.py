r"""Multi-Gate Residuals written as the equations stand (arXiv 2605.23259, section 3.1).

With :math:`\mathrm{rms}(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, streams
:math:`s_1 \dots s_n`, a sublayer's output :math:`y` and a score scale :math:`c = 1/\sqrt D`:

====  =======================================================================================
gate  :math:`g_i = c\, w_1 \cdot \mathrm{rms}(s_i)`                                   (Eq. 4)
      competitive :math:`\beta = \mathrm{softmax}([b_0, g_1 + b_1, \dots, g_n + b_n])_{1..n}`
      (Eq. 3; its summation index is a misprint, Listing 1 is followed)
      independent :math:`\beta_i = \sigma(g_i + b_i)`                                  (Eq. 2)
lerp  :math:`s'_i = (1 - \beta_i) s_i + \beta_i y`                                     (Eq. 5)
pool  :math:`\alpha = \mathrm{softmax}_i(c\, w_2 \cdot \mathrm{rms}(s'_i))`,
      :math:`h = \sum_i \alpha_i s'_i`                                                 (Eq. 1)
====  =======================================================================================

Plain differentiable torch: the ground truth for every other implementation, and
what ``torch.compile`` is given to fuse. All arithmetic is fp32 whatever the
stream dtype (fp64 for fp64 inputs); results are rounded to the stream dtype once,
and the pool reads the rounded streams, so that reading them again later gives the same bits.
"""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gate and pool arithmetic for streams of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2, -1) + eps)``, no weight; ``x [..., D]`` in a compute dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def score(x: Tensor, weight: Tensor, scale: float, eps: float) -> Tensor:
    """``scale * weight . rms(x)``: ``x [..., D]``, ``weight [D]`` -> ``[...]``."""
    return (rms(x, eps) * weight).sum(-1) * scale


def gate_values(
    layer_output: Tensor,
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    gate: str,
    update_weight: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """``beta [..., n]`` from ``layer_output [..., D]`` and ``streams [..., n, D]``, in the compute dtype.

    ``update_weight [D]`` adds ``scale * update_weight . rms(layer_output)`` to every score.
    """
    dtype = compute_dtype(streams.dtype)
    g = score(streams.to(dtype), gate_weight.to(dtype), scale, eps)
    if update_weight is not None:
        g = g + score(layer_output.to(dtype), update_weight.to(dtype), scale, eps).unsqueeze(-1)
    bias = gate_bias.to(dtype)
    if gate == "independent":
        return torch.sigmoid(g + bias)
    keep = bias[0].expand(*g.shape[:-1], 1)
    return torch.softmax(torch.cat([keep, g + bias[1:]], -1), -1)[..., 1:]


def lerp(layer_output: Tensor, streams: Tensor, beta: Tensor) -> Tensor:
    """``(1 - beta) s + beta y`` for every stream: a convex sum that cannot overflow."""
    dtype = compute_dtype(streams.dtype)
    beta = beta.unsqueeze(-1)
    return ((1 - beta) * streams.to(dtype) + beta * layer_output.to(dtype).unsqueeze(-2)).to(streams.dtype)


def pool_weights(streams: Tensor, pool_weight: Tensor | None, scale: float, eps: float) -> Tensor:
    """``alpha [..., n]`` for ``streams [..., n, D]``, in the compute dtype."""
    dtype = compute_dtype(streams.dtype)
    if pool_weight is None:
        return streams.new_full(streams.shape[:-1], 1 / streams.shape[-2], dtype=dtype)
    return torch.softmax(score(streams.to(dtype), pool_weight.to(dtype), scale, eps), -1)


def attention_pool(streams: Tensor, pool_weight: Tensor | None, scale: float, eps: float) -> Tensor:
    """``h [..., D]`` in the stream dtype."""
    alpha = pool_weights(streams, pool_weight, scale, eps)
    return (alpha.unsqueeze(-1) * streams.to(alpha.dtype)).sum(-2).to(streams.dtype)


def multi_gate_residual(
    layer_output: Tensor,
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    gate: str,
    update_weight: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(h [..., D], new_streams [..., n, D])``."""
    beta = gate_values(layer_output, streams, gate_weight, gate_bias, gate, update_weight, scale, eps)
    new_streams = lerp(layer_output, streams, beta)
    return attention_pool(new_streams, pool_weight, scale, eps), new_streams
