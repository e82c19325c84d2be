r"""The step of the Hyper-Connections family: n streams, mixed by coefficients that the streams themselves give.

For one token, streams :math:`H \in R^{n \times D}`, a sublayer's output y and *coefficients*
:math:`A_r \in R^{n \times n}`, :math:`B, A_m \in R^n` (Zhu et al. 2024, arXiv 2409.19606):

.. math:: H' = A_r^\top H + B \otimes y, \qquad (A_r', B', A_m') = f(H'), \qquad h' = A_m'^\top H'

:math:`A_r` and B were computed from H by the step before, :math:`A_r'` and B' are handed to the step behind.
Coefficients are one tensor ``C [n + 2, n]``: the n rows of :math:`A_r` (from stream i to stream j), then B, then
:math:`A_m`. What differs between the members of the family is :math:`f`:

======================  ======================================================================================
:class:`HyperDynamic`   per stream i: :math:`[A_m | A_r | B]_i = s \tanh(\mathrm{norm}(H_i) W) + [A_m | A_r | B]^0_i`
:class:`Manifold`       from the whole token, :math:`z = \alpha\, \mathrm{rms}(\mathrm{vec}(H)) \phi + b`:
                        :math:`A_m = \sigma(z_{pre})`, :math:`B = 2 \sigma(z_{post})`, and
                        :math:`A_r^\top` = Sinkhorn of :math:`z_{res}` (Xie et al. 2025, arXiv 2512.24880)
                        or a mean of permutations (Yang, Gao 2026, arXiv 2601.05732)
======================  ======================================================================================

Each has a ``reference`` (plain differentiable torch, what ``torch.compile`` is given), and three parts for
:class:`HyperStep`, which runs the whole step with gradients by hand. There no normalised copy of the streams
is ever made: a score is a product with the raw streams times a reciprocal root mean square. Streams are seen as rows,
one for each norm that f takes (n a token of D, or one of nD), and

* ``weight(*parameters)`` is the matrix ``[row length, K]`` that rows are multiplied with,
* ``coefficients(raw, norms, *parameters)`` makes C of the products ``[rows, K]`` and the norms ``[rows]``, and
  what the backward pass needs,
* ``backward(grad, parameters, kept)``, given the gradient ``[n + 2, n, N]`` of C, returns the gradient of ``raw``, the
  factors ``[rows]`` of each row in its own gradient (that of its norm), and a function that makes the
  parameters' gradients of the matrix's.

On a CPU, in fp32, the passes over the streams are those of :mod:`depthmix.ops.native` where it can be used.

Kept for the backward pass, per token and step: y (D) and the streams (nD), which the steps before and
behind share; C (n(n + 2)), one number for each score that f is made of, and one per norm (two for a LayerNorm).

Shapes inside this file: ``N`` tokens; streams ``[N, n, D]``, coefficients ``[N, n + 2, n]``. Coefficients and
all arithmetic are fp32 (fp64 for fp64 streams); streams are rounded to their dtype once, and f and the
read take the rounded ones.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .eager import _plain, _to, _weighted_sum
from .reference import compute_dtype, rms
from .sinkhorn import sinkhorn, sinkhorn_backward, sinkhorn_forward

# --- the three parts as they read -------------------------------------------------------------


def mix_reference(layer_output: Tensor, streams: Tensor, carry: Tensor, depth: Tensor) -> Tensor:
    """``A_r^T H + B (x) y``: ``[..., D], [..., n, D], A_r [..., n, n], B [..., n]`` -> ``[..., n, D]``.

    In the compute dtype of ``streams``, rounded to their dtype.
    """
    dtype = compute_dtype(streams.dtype)
    y, s = layer_output.to(dtype).unsqueeze(-2), streams.to(dtype)
    with _plain(streams.device):
        new = carry.to(dtype).transpose(-1, -2) @ s + depth.to(dtype).unsqueeze(-1) * y
    return new.to(streams.dtype)


def read(streams: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i H_i``: ``[..., n, D], [..., n]`` -> ``[..., D]`` in the streams' dtype."""
    n, width = streams.shape[-2:]
    dtype = compute_dtype(streams.dtype)
    s, w = streams.reshape(-1, n, width).to(dtype), weights.to(dtype).reshape(-1, n)
    return _weighted_sum(w, s).to(streams.dtype).view(*streams.shape[:-2], width)


def merge(streams: Tensor, how: str) -> Tensor:
    """The trunk's output: sum or mean of the streams ``[..., n, D] -> [..., D]``, taken in the compute dtype."""
    dtype = compute_dtype(streams.dtype)
    total = streams.sum(-2, dtype=dtype) if how == "sum" else streams.mean(-2, dtype=dtype)
    return total.to(streams.dtype)


# --- f of Hyper-Connections -------------------------------------------------------------------


class HyperDynamic:
    """``[A_m | A_r | B]_i = s tanh(norm(H_i) W) + [A_m | A_r | B]^0_i``: one norm for each stream i.

    Parameters, in this order: ``projection [D, n + 2]`` (W), ``static [n, n + 2]`` (the last term), ``scale [2]``
    (of A and of B), ``norm_weight [D]``, ``norm_bias [D]`` (``None`` for RMSNorm).
    """

    def __init__(self, n_streams: int, norm: str, tanh: bool, eps: float):
        self.n, self.norm, self.tanh, self.eps = n_streams, norm, tanh, eps

    def columns(self, scale: Tensor) -> Tensor:
        """``scale [2]`` laid out over the columns ``[A_m | A_r | B]``."""
        return torch.cat([scale[:1].expand(self.n + 1), scale[1:]])

    def reference(self, streams, projection, static, scale, norm_weight, norm_bias):
        dtype = compute_dtype(streams.dtype)
        s = streams.to(dtype)
        if self.norm == "layer":
            s = s - s.mean(-1, keepdim=True)
        normed = rms(s, self.eps) * norm_weight.to(dtype)
        if norm_bias is not None:
            normed = normed + norm_bias.to(dtype)
        score = normed @ projection.to(dtype)
        if self.tanh:
            score = torch.tanh(score)
        width, carry, depth = (self.columns(scale.to(dtype)) * score + static.to(dtype)).split(
            [1, self.n, 1], -1
        )
        return torch.cat([carry, depth.mT, width.mT], -2)

    def weight(self, projection, static, scale, norm_weight, norm_bias):
        weight = projection * norm_weight.unsqueeze(-1)
        if self.norm == "rms":
            return weight
        # A centred copy of the streams would cost a pass: the mean is taken off the weight's columns instead, and
        # the variance is that of the raw streams less the mean's square. Both lose digits only where a stream's
        # mean is many times its spread. The mean is one more column of the product.
        mean = weight.new_full((len(weight), 1), 1 / len(weight))
        return torch.cat([weight - weight.mean(0), mean], 1)

    def coefficients(self, raw, norms, projection, static, scale, norm_weight, norm_bias):
        n = self.n
        square = _tokens_last(norms.view(-1, n)).square_().div_(projection.shape[0])
        N, K = len(raw) // n, raw.shape[1]
        raw = _tokens_last(raw.view(N, n * K)).view(n, K, N)
        mean = None
        if self.norm == "layer":
            mean = raw[:, n + 2].clone()
            variance = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0.0)
            r = variance.add_(self.eps).rsqrt_().masked_fill_(square.isinf(), 0.0)
        else:
            r = square.add_(self.eps).rsqrt_()
        score = raw[:, : n + 2] * r.unsqueeze(1)
        # 0 * inf: where the mean square overflowed the normalised vector is 0, and so is its score.
        score.masked_fill_((r == 0).unsqueeze(1), 0.0)
        value = self._value(score, projection, norm_bias)
        value = torch.addcmul(static.unsqueeze(-1), value, self.columns(scale).unsqueeze(-1))
        laid_out = torch.cat([value[:, 1 : n + 1], value[None, :, n + 1], value[None, :, 0]])
        return _tokens_first(laid_out).view(N, n + 2, n), (score, r, mean)

    def _value(self, score, projection, norm_bias):
        """``score [n, n + 2, N]``, of the norm without its bias, to what the scale multiplies."""
        value = score if norm_bias is None else score + (norm_bias @ projection).unsqueeze(-1)
        return torch.tanh(value) if self.tanh else value

    def backward(self, grad, parameters, kept):
        projection, _, scale, norm_weight, norm_bias = parameters
        score, r, mean = kept
        n, columns, N = score.shape
        width = projection.shape[0]
        # One column more than f has scores, for the mean.
        d_raw = score.new_empty(n, columns + (mean is not None), N)
        of_score = d_raw[:, :columns]
        of_score[:, 1 : n + 1] = grad[:n]
        of_score[:, n + 1] = grad[n]
        of_score[:, 0] = grad[n + 1]
        d_static = of_score.sum(-1)
        value = self._value(score, projection, norm_bias)
        d_columns = (value * of_score).sum(-1).sum(0)
        d_scale = torch.stack([d_columns[:-1].sum(), d_columns[-1]])
        if self.tanh:
            of_score.mul_(torch.addcmul(_one(score), value, value, value=-1))
        of_score.mul_(self.columns(scale).unsqueeze(-1))
        d_bias = None if norm_bias is None else of_score.sum(-1).sum(0)
        along = (of_score * score).sum(1).mul_(r).mul_(r).div_(-width)
        of_score.mul_(r.unsqueeze(1))
        mean_part = None
        if mean is not None:
            # A score's r depends on the mean too: variance is mean square less mean^2. The mean's own column of
            # the weight is 1 / D, so what it is given here is D times the gradient of each feature.
            mean_part = (of_score * mean.unsqueeze(1)).sum(-1).sum(0)
            torch.mul(along, mean, out=d_raw[:, columns]).mul_(-width)
        d_raw = _tokens_first(d_raw).view(N * n, d_raw.shape[1])

        def of_parameters(d_weight):
            d_weight = d_weight[:, :columns]
            if mean_part is not None:
                # The product was with raw streams; the score was of centred ones.
                d_weight = d_weight - mean_part
            d_projection = d_weight * norm_weight.unsqueeze(-1)
            d_norm_weight = (d_weight * projection).sum(-1)
            if norm_bias is None:
                return d_projection, d_static, d_scale, d_norm_weight, None
            d_projection.addmm_(norm_bias.unsqueeze(-1), d_bias.unsqueeze(0))
            return d_projection, d_static, d_scale, d_norm_weight, projection @ d_bias

        return d_raw, _tokens_first(along).view(-1), of_parameters


def _one(like: Tensor) -> Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device)


def _tokens_last(x: Tensor) -> Tensor:
    """A copy, ``[N, k] -> [k, N]``: operations on a few numbers per token run over the tokens."""
    # With a dimension more the library does not take its way for matrices, which uses one core only.
    return x.t().unsqueeze(0).clone(memory_format=torch.contiguous_format)[0]


def _tokens_first(x: Tensor) -> Tensor:
    """A copy, ``[..., N] -> [N, k]``."""
    return x.flatten(0, -2).unsqueeze(0).mT.clone(memory_format=torch.contiguous_format)[0]


# --- f on the manifold ------------------------------------------------------------------------


def permutations(n: int, like: Tensor) -> Tensor:
    """All n! permutation matrices as rows ``[n!, n * n]`` in the order of ``itertools``, the identity first."""
    indices = torch.tensor(list(itertools.permutations(range(n))), device=like.device)
    return torch.nn.functional.one_hot(indices, n).to(like.dtype).view(-1, n * n)


class Manifold:
    """``A_m = sigmoid(z_pre)``, ``B = 2 sigmoid(z_post)``, ``A_r^T`` doubly stochastic, of ``z_res``.

    ``z = [z_pre (n) | z_post (n) | z_res] = alpha * (rms(vec(H)) phi) + b``. ``z_res`` has n * n entries for
    ``iterations`` of Sinkhorn, n! for ``iterations=None``: then ``A_r^T = sum_r softmax(z_res)_r P_r``.
    With n = 1 it has none, and ``A_r`` is 1.

    Parameters, in this order: ``projection [nD, K]`` (phi), ``bias [K]``, ``alpha [3]`` (of pre, post, res; ``[2]``
    for n = 1), where K = 2n + the size of ``z_res``.
    """

    def __init__(self, n_streams: int, iterations: int | None, eps: float):
        self.n, self.iterations, self.eps = n_streams, iterations, eps
        self.residual_size = self.size(n_streams, iterations)

    @staticmethod
    def size(n: int, iterations: int | None) -> int:
        """Entries of ``z_res``."""
        if n == 1:
            return 0
        return math.factorial(n) if iterations is None else n * n

    def columns(self, alpha: Tensor) -> Tensor:
        """``alpha`` laid out over the columns of phi."""
        sizes = [self.n, self.n, self.residual_size][: alpha.shape[0]]
        return torch.cat([a.expand(size) for a, size in zip(alpha, sizes, strict=True)])

    def residual_matrix(self, logits: Tensor) -> Tensor:
        """``H_res [..., n, n]`` of ``z_res``, to be applied as ``H_res @ streams``; rows sum to 1."""
        n = self.n
        if n == 1:
            return logits.new_ones(*logits.shape[:-1], 1, 1)
        if self.iterations is not None:
            return sinkhorn(logits.unflatten(-1, (n, n)), self.iterations)
        return (torch.softmax(logits, -1) @ permutations(n, logits)).unflatten(-1, (n, n))

    def reference(self, streams, projection, bias, alpha):
        dtype, n = compute_dtype(streams.dtype), self.n
        normed = rms(streams.to(dtype).flatten(-2), self.eps)
        z = self.columns(alpha.to(dtype)) * (normed @ projection.to(dtype)) + bias.to(dtype)
        pre, post = torch.sigmoid(z[..., :n]), 2 * torch.sigmoid(z[..., n : 2 * n])
        carry = self.residual_matrix(z[..., 2 * n :]).mT
        return torch.cat([carry, post.unsqueeze(-2), pre.unsqueeze(-2)], -2)

    def weight(self, projection, bias, alpha):
        return projection

    def coefficients(self, raw, norms, projection, bias, alpha):
        n, N = self.n, len(raw)
        r = norms.square().div_(projection.shape[0]).add_(self.eps).rsqrt_()
        score = _tokens_last(raw).mul_(r).masked_fill_(r == 0, 0.0)
        z = torch.addcmul(bias.unsqueeze(-1), score, self.columns(alpha).unsqueeze(-1))
        laid_out = z.new_empty(n + 2, n, N)
        torch.sigmoid(z[:n], out=laid_out[n + 1])
        torch.sigmoid(z[n : 2 * n], out=laid_out[n]).mul_(2)
        if n == 1:
            laid_out[0] = 1.0
        elif self.iterations is not None:
            matrix = sinkhorn_forward(z[2 * n :].view(n, n, N), self.iterations)
            laid_out[:n] = matrix.transpose(0, 1)
        else:
            matrix = permutations(n, z).t() @ _softmax_of_rows(z[2 * n :])
            laid_out[:n] = matrix.view(n, n, N).transpose(0, 1)
        return _tokens_first(laid_out).view(N, n + 2, n), (score, r)

    def backward(self, grad, parameters, kept):
        projection, bias, alpha = parameters
        score, r = kept
        n, N = self.n, len(r)
        scale = self.columns(alpha).unsqueeze(-1)
        z = torch.addcmul(bias.unsqueeze(-1), score, scale)
        d_z = torch.empty_like(z)
        gates = torch.sigmoid(z[: 2 * n])
        slope = torch.addcmul(gates, gates, gates, value=-1)
        torch.mul(grad[n + 1], slope[:n], out=d_z[:n])
        torch.mul(grad[n], slope[n:], out=d_z[n : 2 * n]).mul_(2)
        if n > 1:
            d_matrix = grad[:n].transpose(0, 1)
            if self.iterations is not None:
                logits = z[2 * n :].view(n, n, N)
                d_z[2 * n :] = sinkhorn_backward(d_matrix, logits, self.iterations).view(n * n, N)
            else:
                weights = _softmax_of_rows(z[2 * n :])
                d_weights = (permutations(n, z) @ d_matrix.reshape(n * n, N)).mul_(weights)
                torch.addcmul(d_weights, weights, d_weights.sum(0), value=-1, out=d_z[2 * n :])
        d_bias = d_z.sum(1)
        d_raw = d_z * scale
        along = d_z.mul_(score)
        sizes = [n, n, self.residual_size][: alpha.shape[0]]
        d_alpha = torch.stack([part.sum() for part in along.sum(1).split(sizes)])
        along = torch.mm(scale.t(), along).view(N).mul_(r).mul_(r).div_(-projection.shape[0])
        return _tokens_first(d_raw.mul_(r)), along, lambda d_weight: (d_weight, d_bias, d_alpha)


def _softmax_of_rows(logits: Tensor) -> Tensor:
    """``[k, N] -> [k, N]``, over the first dimension, where the library's kernel is slow."""
    weights = (logits - logits.amax(0)).exp_()
    return weights.div_(weights.sum(0))


# --- the whole step, gradients by hand --------------------------------------------------------


def _write(y: Tensor, streams: Tensor, coefficients: Tensor, per_token: int) -> tuple[Tensor, Tensor | None]:
    """``A_r^T H + B (x) y``, rounded to the streams' dtype; and the norms of its rows, where those cost nothing."""
    N, n, width = streams.shape
    if native.usable(y, streams, coefficients, n=n):
        y, streams, coefficients = y.contiguous(), streams.contiguous(), coefficients.contiguous()
        new, norms = torch.empty_like(streams), streams.new_empty(N * per_token)
        native.call(
            "hyper_write", N, n, width, per_token, torch.get_num_threads(), y, streams, coefficients, new, norms
        )  # fmt: skip
        return new, norms
    dtype = coefficients.dtype
    new = torch.bmm(coefficients[:, :n].mT, streams.to(dtype))
    new.addcmul_(coefficients[:, n].unsqueeze(-1), y.to(dtype).unsqueeze(1))
    return new.to(streams.dtype), None


def _read(streams: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i H_i``: ``[N, n, D]``, and ``[N, n]`` in the compute dtype -> ``[N, D]``."""
    N, n, width = streams.shape
    if native.usable(streams, weights, n=n) and weights.stride(1) == 1:
        h, streams = streams.new_empty(N, width), streams.contiguous()
        native.call(
            "hyper_read", N, n, width, torch.get_num_threads(), streams, weights, weights.stride(0), h
        )
        return h
    return _weighted_sum(weights, streams.to(weights.dtype)).to(streams.dtype)


def _add_inner(into: Tensor, streams: Tensor, x: Tensor) -> None:
    """``into[i, t] += H_i . x`` of token t: ``[n, N], [N, n, D], [N, D]``."""
    N, n, width = streams.shape
    if native.usable(into, streams, x, n=n) and into.is_contiguous():
        streams, x = streams.contiguous(), x.contiguous()
        native.call("hyper_add_dots", N, n, width, torch.get_num_threads(), streams, x, into)
    else:
        into += torch.bmm(streams.to(into.dtype), x.to(into.dtype).unsqueeze(-1)).squeeze(-1).t()


def _written_backward(grad, y, streams, coefficients):
    """Gradients ``(y, H, C)`` given ``grad [N, n, D]``, in the compute dtype, of the new streams."""
    n = streams.shape[1]
    d_coefficients = torch.empty_like(coefficients)
    d_coefficients[:, :n] = torch.bmm(streams.to(grad.dtype), grad.mT)
    d_coefficients[:, n] = torch.bmm(grad, y.to(grad.dtype).unsqueeze(-1)).squeeze(-1)
    d_coefficients[:, n + 1] = 0
    # The rows of A_r and B give the gradients of the streams and of y.
    both = torch.bmm(coefficients[:, : n + 1], grad)
    return both[:, n].to(y.dtype), both[:, :n].to(streams.dtype), d_coefficients


FUSED_WEIGHT = 1 << 13
"""Numbers in the weight of f, at most, for a CPU kernel to multiply with it: it must stay in the fastest cache."""


def _streams_backward(of_f, grad_h, grad_new, new, made, layer_output, streams, coefficients):
    """Gradients ``(y, H, C)`` of a step, or ``(None, H, None)`` where nothing was written.

    The gradient of the new streams has up to three parts: that of f, ``of_f = (d_raw [rows, K], along [rows],
    weight [row length, K])``, which is ``d_raw weight^T + along row``; that of the read, made of ``grad_h [N, D]``;
    and ``grad_new [N, n, D]``.
    """
    N, n, width = new.shape
    d_raw, along, weight = of_f or (None, None, None)
    tensors = (d_raw, along, weight, made, new, grad_h, grad_new, layer_output, streams, coefficients)
    if native.usable(*tensors, n=n):
        grad_h, layer_output, streams, coefficients, new = (
            None if x is None else x.contiguous() for x in (grad_h, layer_output, streams, coefficients, new)
        )
        if grad_new is not None and (grad_new.stride(2) != 1 or grad_new.stride(1) != width):
            grad_new = grad_new.contiguous()
        d_streams = torch.empty_like(streams)
        d_y, d_coefficients = (
            None if x is None else torch.empty_like(x) for x in (layer_output, coefficients)
        )
        K, per_token = 0, 1
        if of_f is not None:
            K, per_token = d_raw.shape[1], n * width // len(weight)
            if weight.numel() <= FUSED_WEIGHT:
                weight = weight.t().contiguous()
            else:
                d_raw, K = torch.mm(d_raw, weight.t()), 0
        native.call(
            "hyper_backward", N, n, width, per_token, torch.get_num_threads(), K, d_raw, weight, along, made, new,
            grad_h, grad_new, 0 if grad_new is None else grad_new.stride(0),
            layer_output, streams, coefficients, d_y, d_streams, d_coefficients,
        )  # fmt: skip
        return d_y, d_streams, d_coefficients
    into = None if grad_new is None else grad_new.to(compute_dtype(streams.dtype))
    if grad_h is not None:
        weights = made[:, n + 1].unsqueeze(-1)
        g = grad_h.to(made.dtype).unsqueeze(1)
        into = weights * g if into is None else torch.addcmul(into, weights, g)
    if of_f is not None:
        rows = new.to(along.dtype).reshape(len(along), -1)
        product = torch.mm(d_raw, weight.t()).addcmul_(along.unsqueeze(-1), rows).view(new.shape)
        into = product if into is None else product.add_(into)
    if layer_output is None:
        return None, into.to(streams.dtype), None
    return _written_backward(into, layer_output, streams, coefficients)


class HyperStep(torch.autograd.Function):
    """``(y [N, D], H [N, n, D], C [N, n + 2, n], family, *parameters) -> (h [N, D], H', C')``.

    ``y`` and ``C`` are ``None`` where nothing is written: then f and the read are those of H, and ``H'`` is
    not returned. ``family`` is a :class:`HyperDynamic` or a :class:`Manifold`, with its parameters.
    """

    @staticmethod
    def forward(ctx, layer_output, streams, coefficients, family, *parameters):
        dtype = compute_dtype(streams.dtype)
        with _plain(streams.device):
            given = [_to(p, dtype) for p in parameters]
            weight = family.weight(*given)
            new, norms = streams, None
            if layer_output is not None:
                per_token = streams.shape[1] * streams.shape[2] // len(weight)
                new, norms = _write(layer_output, streams, coefficients, per_token)
            rows = new.to(dtype).reshape(-1, len(weight))
            if norms is None:
                norms = torch.linalg.vector_norm(rows, dim=-1)
            made, kept = family.coefficients(rows @ weight, norms, *given)
            h = _read(new, made[:, -1])
        ctx.save_for_backward(layer_output, streams, coefficients, new, made, *parameters, *kept)
        ctx.family, ctx.n_parameters = family, len(parameters)
        ctx.set_materialize_grads(False)
        return (h, made) if layer_output is None else (h, new, made)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, *grads):
        layer_output, streams, coefficients, new, made, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.n_parameters], rest[ctx.n_parameters :]
        grad_new, grad_made = grads if layer_output is not None else (None, *grads)
        dtype = made.dtype
        N, n, _ = streams.shape
        with _plain(streams.device):
            given = [_to(p, dtype) for p in parameters]
            if grad_made is None:
                d_made = made.new_zeros(n + 2, n, N)
            else:
                d_made = _tokens_last(grad_made.flatten(1)).view(n + 2, n, N)
            if grad_h is not None:
                _add_inner(d_made[n + 1], new, grad_h)
            d_raw, along, of_parameters = ctx.family.backward(d_made, given, kept)
            weight = ctx.family.weight(*given)
            rows = new.to(dtype).reshape(-1, len(weight))
            d_parameters = of_parameters((d_raw.t() @ rows).t())
            d_y, d_streams, d_coefficients = _streams_backward(
                (d_raw, along, weight), grad_h, grad_new, new, made, layer_output, streams, coefficients
            )
        return (
            d_y,
            d_streams,
            d_coefficients,
            None,
            *(None if d is None else d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)),
        )


class HyperWrite(torch.autograd.Function):
    """``(y [N, D], H [N, n, D], C [N, n + 2, n]) -> H' [N, n, D]``: what the last sublayer is followed by."""

    @staticmethod
    def forward(ctx, layer_output, streams, coefficients):
        ctx.save_for_backward(layer_output, streams, coefficients)
        with _plain(streams.device):
            return _write(layer_output, streams, coefficients, 1)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        layer_output, streams, coefficients = ctx.saved_tensors
        with _plain(streams.device):
            return _streams_backward(None, None, grad, streams, None, layer_output, streams, coefficients)


class StaticStep(torch.autograd.Function):
    """Coefficients that no token changes: ``(y [N, D], H [N, n, D], A_r [n, n], B [n], weights [n])`` ->
    ``(h [N, D], H')`` with ``h = sum_i weights_i H'_i``; keeps y, H and H'."""

    @staticmethod
    def forward(ctx, layer_output, streams, carry, depth, weights):
        dtype = compute_dtype(streams.dtype)
        with _plain(streams.device):
            y, s = layer_output.to(dtype), streams.to(dtype)
            N, n, _ = s.shape
            new = torch.bmm(carry.to(dtype).t().expand(N, n, n), s)
            new = new.addcmul_(depth.to(dtype).unsqueeze(-1), y.unsqueeze(1)).to(streams.dtype)
            h = _weighted_sum(weights.to(dtype).expand(N, n), new.to(dtype)).to(streams.dtype)
        ctx.save_for_backward(layer_output, streams, new, carry, depth, weights)
        ctx.set_materialize_grads(False)
        return h, new

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_new):
        layer_output, streams, new, carry, depth, weights = ctx.saved_tensors
        dtype = compute_dtype(streams.dtype)
        with _plain(streams.device):
            y, s, t = layer_output.to(dtype), streams.to(dtype), new.to(dtype)
            N, n, _ = s.shape
            into = torch.zeros_like(t) if grad_new is None else grad_new.to(dtype)
            if grad_h is None:
                d_weights = torch.zeros_like(weights)
            else:
                g = grad_h.to(dtype)
                into = torch.addcmul(into, weights.to(dtype).unsqueeze(-1), g.unsqueeze(1))
                d_weights = torch.stack([torch.dot(g.flatten(), t[:, i].flatten()) for i in range(n)])
            by_stream = into.transpose(0, 1).reshape(n, -1)
            d_carry = s.transpose(0, 1).reshape(n, -1) @ by_stream.t()
            d_depth = by_stream @ y.reshape(-1)
            d_y = _weighted_sum(depth.to(dtype).expand(N, n), into)
            d_streams = torch.bmm(carry.to(dtype).expand(N, n, n), into)
        return (
            d_y.to(layer_output.dtype), d_streams.to(streams.dtype), d_carry.to(carry.dtype),
            d_depth.to(depth.dtype), d_weights.to(weights.dtype),
        )  # fmt: skip


# --- what the residual connections call -------------------------------------------------------


def begin(streams: Tensor, family, parameters: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """``(h [..., D], C [..., n + 2, n])`` of ``streams [..., n, D]``: f and the read, with nothing to write."""
    if torch.compiler.is_compiling():
        with _plain(streams.device):
            made = family.reference(streams, *parameters)
        return read(streams, made[..., -1, :]), made
    leading, (n, width) = streams.shape[:-2], streams.shape[-2:]
    h, made = HyperStep.apply(None, streams.reshape(-1, n, width), None, family, *parameters)
    return h.view(*leading, width), made.view(*leading, n + 2, n)


def step(layer_output, streams, coefficients, family, parameters) -> tuple[Tensor, Tensor, Tensor]:
    """``(h [..., D], H' [..., n, D], C' [..., n + 2, n])`` of ``y [..., D]``, H and C."""
    if torch.compiler.is_compiling():
        new = write(layer_output, streams, coefficients)
        with _plain(streams.device):
            made = family.reference(new, *parameters)
        return read(new, made[..., -1, :]), new, made
    n, width = streams.shape[-2:]
    h, new, made = HyperStep.apply(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width), coefficients.reshape(-1, n + 2, n),
        family, *parameters,
    )  # fmt: skip
    return h.view(layer_output.shape), new.view(streams.shape), made.view(*streams.shape[:-2], n + 2, n)


def write(layer_output: Tensor, streams: Tensor, coefficients: Tensor) -> Tensor:
    """``H' [..., n, D]`` alone, of ``y [..., D]``, H and C."""
    if torch.compiler.is_compiling():
        return mix_reference(layer_output, streams, coefficients[..., :-2, :], coefficients[..., -2, :])
    n, width = streams.shape[-2:]
    new = HyperWrite.apply(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width), coefficients.reshape(-1, n + 2, n)
    )
    return new.view(streams.shape)


def static_step(layer_output, streams, carry, depth, weights) -> tuple[Tensor, Tensor]:
    """``(h [..., D], H' [..., n, D])`` with ``A_r [n, n]``, ``B [n]`` and the weights of the read ``[n]``."""
    if torch.compiler.is_compiling():
        new = mix_reference(layer_output, streams, carry, depth)
        return read(new, weights.expand(new.shape[:-1])), new
    n, width = streams.shape[-2:]
    h, new = StaticStep.apply(
        layer_output.reshape(-1, width), streams.reshape(-1, n, width), carry, depth, weights
    )
    return h.view(layer_output.shape), new.view(streams.shape)
