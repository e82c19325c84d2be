r"""Softmax pooling over separate sources with torch operations: any device, any dtype, no copy of a source.

The equations are those of :mod:`depthmix.ops.pool`. A score is a matrix-vector product times a reciprocal
root mean square, so that no normalised source is ever written. Nothing here is differentiable; the gradients
are written out.

Shapes inside this file: sources ``[N, D]``, k of them; whatever is a number per source and token is ``[k, N]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import _plain, _reciprocal_rms, _to
from .reference import compute_dtype


def _scores(sources: list[Tensor], weight: Tensor | None, scale: float, eps: float):
    """``(logits [k, N], r [k, N] or None)`` for sources and weight in the compute dtype."""
    logits = sources[0].new_empty(len(sources), sources[0].shape[0])
    if weight is None:
        return logits.zero_(), None
    r = torch.empty_like(logits)
    for v, logit, reciprocal in zip(sources, logits.unbind(), r.unbind(), strict=True):
        torch.mv(v, weight, out=logit)
        reciprocal.copy_(_reciprocal_rms(v, eps))
    # 0 * inf: where the mean square overflowed the normalised vector is 0, and so is its score.
    return logits.mul_(r).mul_(scale).masked_fill_(r == 0, 0.0), r


def _softmax(logits: Tensor, lse: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weights ``[k, N]`` of the sources and ``[N]`` of the mean whose log-sum-exp is ``lse [N]``."""
    top = logits.amax(0)
    if lse is not None:
        top = torch.maximum(top, lse)
    weights = torch.exp(logits - top)
    total = weights.sum(0)
    if lse is None:
        return weights.div_(total), None
    carried = torch.exp(lse - top)
    total = total + carried
    return weights.div_(total), carried.div_(total)


def _mean(weights: Tensor, sources: list[Tensor], share: Tensor | None = None, carried: Tensor | None = None):
    """``sum_i weights[i] v_i + share carried``, ``[N, D]``, in the compute dtype."""
    total = None if carried is None or share is None else share.unsqueeze(-1) * carried
    for weight, v in zip(weights.unsqueeze(-1), sources, strict=True):
        total = weight * v if total is None else total.addcmul_(weight, v)
    return total


def _dots(sources: list[Tensor], x: Tensor) -> Tensor:
    """``v_i . x`` token by token, ``[k, N]``."""
    found, product, ones = x.new_empty(len(sources), len(x)), torch.empty_like(x), x.new_ones(x.shape[-1])
    for v, row in zip(sources, found.unbind(), strict=True):
        torch.mul(v, x, out=product)
        torch.mv(product, ones, out=row)
    return found


def _along(d_logits: Tensor, logits: Tensor, r: Tensor, scale: float, width: int) -> tuple[Tensor, Tensor]:
    """Factors ``[k, N]`` of the weight and of the source itself in a source's gradient."""
    # r^2 first: where the mean square overflowed, r = 0 and nothing else may become infinite.
    return d_logits * r * scale, r.square().mul_(logits).mul_(d_logits).div_(-width)


def _normed(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h`` (rounded) in the compute dtype and its reciprocal root mean square ``[N, 1]``."""
    return h.to(weight.dtype), _reciprocal_rms(h, eps).unsqueeze(-1)


def pool_forward(
    sources: list[Tensor],
    weight: Tensor | None,
    carried: Tensor | None,
    carried_lse: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """``h [N, D]`` in the sources' dtype."""
    storage, dtype = sources[0].dtype, compute_dtype(sources[0].dtype)
    with _plain(sources[0].device):
        values = [v.to(dtype) for v in sources]
        logits, _ = _scores(values, _to(weight, dtype), scale, eps)
        alpha, share = _softmax(logits, carried_lse)
        h = _mean(alpha, values, share, carried).to(storage)
        if norm_weight is None:
            return h
        norm_weight = norm_weight.to(dtype)
        h, r = _normed(h, norm_weight, norm_eps)
        return (h * r).mul_(norm_weight).to(storage)


def pool_backward(
    grad_h: Tensor,
    sources: list[Tensor],
    weight: Tensor | None,
    carried: Tensor | None,
    carried_lse: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
    into: list[Tensor],
    h: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, carried, carried_lse and norm_weight; those of the sources are written into ``into``.

    ``h``, the result of :func:`pool_forward` without a norm, may be given in place of ``carried``.
    """
    dtype, width = compute_dtype(sources[0].dtype), sources[0].shape[-1]
    d_weight = d_carried = d_lse = d_norm = None
    with _plain(sources[0].device):
        values, grad, q = [v.to(dtype) for v in sources], grad_h.to(dtype), _to(weight, dtype)
        logits, r = _scores(values, q, scale, eps)
        alpha, share = _softmax(logits, carried_lse)
        if norm_weight is not None:
            gamma = norm_weight.to(dtype)
            mean = _mean(alpha, values, share, carried).to(sources[0].dtype)
            mean, r_h = _normed(mean, gamma, norm_eps)
            product = mean * grad
            d_norm = torch.mv(product.t(), r_h.view(-1)).to(norm_weight.dtype)
            along = (product @ gamma).unsqueeze(-1).mul_(r_h.pow(3)).div_(-width).masked_fill_(r_h == 0, 0.0)
            grad = (grad * gamma).mul_(r_h).addcmul_(mean, along)
        if weight is not None or share is not None:
            d_alpha = _dots(values, grad)
            if h is not None:
                inner = _dots([h.to(dtype)], grad)[0]
            else:
                inner = (alpha * d_alpha).sum(0)
                if carried is not None and share is not None:
                    d_share = _dots([carried], grad)[0]
                    inner = inner + share * d_share
            d_logits = d_alpha.sub_(inner).mul_(alpha)
            if share is not None:
                # The gradients of all logits add up to zero.
                d_lse = -d_logits.sum(0) if h is not None else share * (d_share - inner)
                d_carried = share.unsqueeze(-1) * grad
        terms = None
        if weight is not None and q is not None:
            along_q, along_v = _along(d_logits, logits, r, scale, width)
            d_weight = torch.zeros_like(q)
            for v, row in zip(values, along_q, strict=True):
                d_weight.addmv_(v.t(), row)
            d_weight = d_weight.to(weight.dtype)
            terms = q, along_q, along_v
        for i, (v, target) in enumerate(zip(values, into, strict=True)):
            total = alpha[i].unsqueeze(-1) * grad
            if terms is not None:
                q, along_q, along_v = terms
                total.addcmul_(along_q[i].unsqueeze(-1), q).addcmul_(along_v[i].unsqueeze(-1), v)
            target.copy_(total)
    return d_weight, d_carried, d_lse, d_norm


def pool_many_forward(
    sources: list[Tensor], queries: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """``(out [Q, N, D], lse [Q, N])`` in the compute dtype."""
    dtype = compute_dtype(sources[0].dtype)
    with _plain(sources[0].device):
        values = [v.to(dtype) for v in sources]
        scores, _ = _scores_of_many(values, queries.to(dtype), scale, eps)
        out = torch.stack([_mean(_softmax(logits)[0], values) for logits in scores])
        return out, torch.logsumexp(scores, 1)


def pool_many_backward(
    grad_out: Sequence[Tensor],
    grad_lse: Tensor,
    sources: list[Tensor],
    queries: Tensor,
    lse: Tensor,
    scale: float,
    eps: float,
    into: list[Tensor],
) -> Tensor:
    """The gradient of ``queries``; those of the sources are written into ``into``.

    ``grad_out``: Q tensors ``[N, D]``.
    """
    dtype, width = compute_dtype(sources[0].dtype), sources[0].shape[-1]
    with _plain(sources[0].device):
        values, q = [v.to(dtype) for v in sources], queries.to(dtype)
        scores, r = _scores_of_many(values, q, scale, eps)
        totals = [torch.zeros_like(v) for v in values]
        d_queries = torch.zeros_like(q)
        for j, logits in enumerate(scores):
            alpha = torch.exp(logits - lse[j])
            d_alpha = _dots(values, grad_out[j])
            d_logits = d_alpha.sub_((alpha * d_alpha).sum(0)).add_(grad_lse[j]).mul_(alpha)
            along_q, along_v = _along(d_logits, logits, r, scale, width)
            for i, (v, total) in enumerate(zip(values, totals, strict=True)):
                total.addcmul_(alpha[i].unsqueeze(-1), grad_out[j])
                total.addcmul_(along_q[i].unsqueeze(-1), q[j]).addcmul_(along_v[i].unsqueeze(-1), v)
                d_queries[j].addmv_(v.t(), along_q[i])
        for total, target in zip(totals, into, strict=True):
            target.copy_(total)
        return d_queries.to(queries.dtype)


def _scores_of_many(sources: list[Tensor], queries: Tensor, scale: float, eps: float):
    """``(logits [Q, k, N], r [k, N])``."""
    r = torch.stack([_reciprocal_rms(v, eps) for v in sources])
    logits = torch.stack([torch.mm(queries, v.t()) for v in sources], 1)
    return logits.mul_(r).mul_(scale).masked_fill_(r == 0, 0.0), r
