r"""The MGR step that undoes itself: streams of the backward pass by Eq. 16 (paper, section 4.4.2), with bounded error.

.. math:: s = \frac{s' - \beta y}{1 - \beta}

The backward pass walks down the lerps, and every step hands the streams it entered with to the one before as the
gradient of a *token*: a tensor of their shape without storage that accompanies the streams forwards. Kept per
step: ``y``, ``beta`` and the rows that :math:`1 - \beta` would not bring back.

**Error.** The forward pass rounded :math:`s'`, by at most :math:`u \|s'\|` for a row (the streams of one token and one
index) of a dtype with unit roundoff u. A step back divides that and every error from above by :math:`1 - \beta`; going
down from row :math:`k` to row :math:`i` of the same stream, the relative error is at most

.. math:: \frac{1}{\|s_i\|} \sum_{l=i+1}^{k} u \|s_l\| \prod_{m=i+1}^{l} \frac{1}{1 - \beta_m}
          \;\le\; R_k := \sum_{l \le k} u \|s_l\| W_l, \qquad
          W_l = \frac{\max(W_{l-1},\, 1 / \|s_{l-1}\|)}{1 - \beta_l}

W and R travel forwards, two numbers a row, and begin at zero wherever a row of :math:`s_{k-1}` is kept exactly. At
every step the share ``top_p`` of rows with the largest R is kept. Where another row would exceed the tolerance
still, the whole tensor is: an *anchor*. So the bound holds for any gates; at gates near 1 in every layer this keeps
every row of every layer, as ``store`` does. The first and the last step are anchors: the streams that enter the first
are kept by the read behind the ramp in any case, those of the last begin the walk.

**The paper's scheme** keeps the rows with the largest :math:`\beta` and nothing else (``tolerance=None``); its error
grows like :math:`\prod 1/(1-\beta)`.

Whether a row exceeds the tolerance is looked at step by step, which a GPU has to be waited for and ``torch.compile``
cannot trace: a compiled model leaves its graph around every such step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from .mgr import mgr_step, step_backward
from .reference import compute_dtype


@dataclass(frozen=True)
class Fallback:
    """What inversion keeps. ``top_p``: share of rows a step. ``tolerance``: the largest relative error of a row's
    reconstruction; ``None`` keeps the rows of largest gates and guarantees nothing, as the paper does."""

    top_p: float
    tolerance: float | None


@dataclass(frozen=True)
class Kept:
    """What one step keeps of the streams ``[N, n, D]`` that entered it: all of them, or some of ``N n`` rows."""

    anchor: Tensor | None
    index: Tensor | None
    rows: Tensor | None


Budget = tuple[Tensor, Tensor, Tensor]
"""``(row norms, W, R)``, each ``[N, n]``."""


def first_budget(streams: Tensor) -> Budget:
    """Of a window's first streams ``[N, n, D]``."""
    norms = row_norms(streams)
    return norms, torch.zeros_like(norms), torch.zeros_like(norms)


def row_norms(streams: Tensor) -> Tensor:
    """``[..., D] -> [...]`` in the compute dtype, never 0."""
    norms = torch.linalg.vector_norm(streams, dim=-1, dtype=compute_dtype(streams.dtype))
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _rounding(before: Tensor, after: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Largest norm of what the lerp's rounding and the arithmetic of Eq. 16 leave in a row, ``[N, n]``."""
    info, arithmetic = torch.finfo(dtype), 4 * torch.finfo(before.dtype).eps
    below_normal = info.smallest_normal * info.eps / 2 * math.sqrt(width)
    return after * (info.eps / 2) + (before + after) * arithmetic + below_normal


def choose(streams, new_streams, beta, budget: Budget, fallback: Fallback, anchored: bool):
    """What a step from ``streams`` to ``new_streams [N, n, D]`` keeps, and the budget behind it: ``(Kept, Budget)``.

    ``anchored``: keep everything, whatever the budget.
    """
    before, weight, error = budget
    after = row_norms(new_streams)
    zero = torch.zeros_like(error)
    if anchored:
        return Kept(streams, None, None), (after, zero, zero)
    weight = torch.maximum(weight, 1 / before) / (1 - beta)
    error = error + weight * _rounding(before, after, streams.shape[-1], streams.dtype)
    # 0 / 0 in a product of overflowed numbers is no small error.
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    ranked = (beta if fallback.tolerance is None else error).flatten()
    count = min(math.ceil(fallback.top_p * ranked.numel()), ranked.numel())
    index = ranked.topk(count, sorted=False).indices
    weight, error = (x.flatten().index_fill(0, index, 0).view_as(x) for x in (weight, error))
    if fallback.tolerance is not None and _exceeds(error, fallback.tolerance):
        return Kept(streams, None, None), (after, zero, zero)
    rows = streams.flatten(0, 1).index_select(0, index)
    return Kept(None, index, rows), (after, weight, error)


def _exceeds(error: Tensor, tolerance: float) -> bool:
    if error.is_meta or isinstance(error, FakeTensor) or error.numel() == 0:
        return False  # no numbers to look at: a count of bytes is then one without anchors
    return bool(error.amax() > tolerance)


def undo(new_streams: Tensor, layer_output: Tensor, beta: Tensor, kept: Kept) -> Tensor:
    """The streams ``[N, n, D]`` that entered a step, in the compute dtype."""
    if kept.anchor is not None:
        return kept.anchor.to(beta.dtype)
    update = layer_output.to(beta.dtype).unsqueeze(-2)
    streams = torch.addcmul(new_streams, beta.unsqueeze(-1), update, value=-1)
    streams.div_((1 - beta).unsqueeze(-1))
    if kept.index is not None and kept.rows is not None:
        streams.flatten(0, 1).index_copy_(0, kept.index, kept.rows.to(beta.dtype))
    return streams


class InversionStep(torch.autograd.Function):
    """``(y [N, D], streams [N, n, D], token or None, budget, 5 parameters, settings, fallback, last)`` ->
    ``(h [N, D], new_streams, next token or None, next budget)``; the last step has no token to hand on.

    ``settings``: ``(gate, scale, eps, norm_eps)``.
    """

    @staticmethod
    def forward(
        ctx, layer_output, streams, token, norms, weight, error, gate_weight, gate_bias, pool_weight, update_weight,
        norm_weight, settings, fallback, last,
    ):  # fmt: skip
        parameters = gate_weight, gate_bias, pool_weight, update_weight, norm_weight
        h, new_streams, beta = mgr_step(layer_output, streams, *parameters, *settings)
        first = token is None
        kept, budget = choose(
            streams, new_streams, beta, (norms, weight, error), fallback, anchored=first or last
        )
        ctx.save_for_backward(layer_output, beta, kept.anchor, kept.index, kept.rows, *parameters)
        ctx.settings, ctx.first, ctx.dtype = settings, first, streams.dtype
        ctx.mark_non_differentiable(*budget)
        ctx.set_materialize_grads(False)
        next_token = None if last else beta.new_zeros(1).expand(streams.shape)
        return h, new_streams, next_token, *budget

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_streams, after, *_):
        layer_output, beta, *kept_and_parameters = ctx.saved_tensors
        kept, parameters = Kept(*kept_and_parameters[:3]), kept_and_parameters[3:]
        if kept.anchor is None and after is None:
            raise RuntimeError(
                "a stretch of inverted lerps was left before its last step, so its streams cannot be reconstructed; "
                "run whole models, or use stream_memory='store'"
            )
        streams = undo(after, layer_output, beta, kept)
        grads = iter(
            step_backward(
                grad_h, grad_streams, layer_output, streams.to(ctx.dtype), [], [], beta,
                *parameters, *ctx.settings,
            )
        )  # fmt: skip
        d_output, d_streams, *d_parameters = (
            None if x is None else next(grads) for x in (layer_output, streams, *parameters)
        )
        return (
            d_output,
            d_streams,
            None if ctx.first else streams,
            None,
            None,
            None,
            *d_parameters,
            None,
            None,
            None,
        )
