r"""One stream, one gate per channel: Highway and Review in their additive and convex forms.

With state :math:`x`, update :math:`u`, gate matrix :math:`W` and bias :math:`b`:

.. math::
    g = \sigma(W_x\, \nu(x) + W_u\, \nu(u) + b), \qquad
    x' = x + g \odot u \quad\text{or}\quad x' = (1 - g) \odot x + g \odot u

where :math:`\nu` is :math:`\mathrm{rms}(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}` or nothing, and
:math:`[W_x, W_u] = W` is ``[D, 2D]``, or ``[D, D]`` for a gate that does not see the update.

The gate is fp32 whatever the stream dtype, its matrix product included, also under autocast (fp64 for
fp64). The result has the dtype of ``x``.

Normalisation is a factor for each row, :math:`W_x \mathrm{rms}(x) = r_x\, (W_x x)`, and so it waits until behind the
matrix product, which is torch's and takes x as it is. Everything else is three pointwise passes, in C++, in Triton or
by torch operations (:mod:`depthmix.ops.backend`), each of which reads and writes a row once:

forward
    from both products, b, x and u: :math:`r_x`, :math:`r_u`, the logit of g and :math:`x'`.
logits
    backwards, from x, u, the logit and :math:`\partial x'`: :math:`r_x \delta`, :math:`r_u \delta` and
    :math:`\partial b = \sum \delta`, with :math:`\delta` the gradient of the logit.
inputs
    behind the products :math:`q = r\, W^\top \delta`: the gradients of x and u.

.. math:: \partial L / \partial W_x = \textstyle\sum (r \delta)\, x^\top, \qquad
          \partial L / \partial x = q - (r^2 / D)\,(q \cdot x)\, x + \text{the direct part}.

Kept for the backward pass are x, u, the logit and one number for each normed row. A mean square that overflows gives
r = 0: what would be read there is 0, also where the product with W is infinite.

Shapes inside this file: ``N`` tokens, ``D`` features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .eager import _plain, _reciprocal_rms
from .native import channel_gate as native
from .reference import compute_dtype, rms
from .registration import register, register_differentiable


def channel_gate(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, normalise: bool, eps: float
) -> Tensor:
    """``g [..., D]`` in the compute dtype, as its equation stands.

    ``x, update [..., D]``; ``weight [D, D]`` or ``[D, 2D]``; ``bias [D]``. Without ``normalise`` the gate
    reads ``x`` as it is.
    """
    dtype = compute_dtype(x.dtype)
    seen = [x.to(dtype)]
    if weight.shape[1] == 2 * x.shape[-1]:
        seen.append(update.to(dtype))
    if normalise:
        seen = [rms(source, eps) for source in seen]
    with _plain(x.device):
        return torch.sigmoid(F.linear(torch.cat(seen, -1), weight.to(dtype), bias.to(dtype)))


def admit(x: Tensor, update: Tensor, gate: Tensor, convex: bool) -> Tensor:
    """``x + g u``, or ``(1 - g) x + g u``: a convex sum that cannot overflow. Linear in ``(x, update)``."""
    return torch.addcmul((1 - gate) * x if convex else x, gate, update)


def gated_update(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    convex: bool,
    normalise: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """``x'`` in the dtype of ``x``; arguments as for :func:`channel_gate`. Gradients are of first order."""
    width = x.shape[-1]
    new, *_ = run_gate(
        x.reshape(-1, width),
        update.reshape(-1, width),
        weight,
        bias,
        bool(convex),
        bool(normalise),
        float(eps),
    )
    return new.view(x.shape)


# --- what runs where --------------------------------------------------------------------------


def _kernels(x: Tensor, update: Tensor):
    """The module whose ``forward``, ``logits`` and ``inputs`` run on these."""
    choice = backend.choose(x)
    if torch.float64 not in (x.dtype, update.dtype):
        if choice == "triton":
            from .triton import channel_gate

            return channel_gate
        if choice == "native" and native.usable(x, update):
            return native
    return TorchKernels


class TorchKernels:
    """The three passes by torch operations: any device, any dtype."""

    @staticmethod
    def forward(product_x, product_u, bias, x, update, convex, normalise, eps):
        """``(x', r_x [N], r_u [N])``, r empty where there is none; ``product_x [N, D]`` becomes the logit."""
        dtype = product_x.dtype
        x_c, u_c = x.to(dtype), update.to(dtype)
        r_x, r_u = product_x.new_empty(0), product_x.new_empty(0)
        if normalise:
            r_x = _reciprocal_rms(x_c, eps)
            _scale_rows(product_x, r_x)
        product_x += bias.to(dtype)
        if product_u is not None:
            if normalise:
                r_u = _reciprocal_rms(u_c, eps)
                _scale_rows(product_u, r_u)
            product_x += product_u
        return admit(x_c, u_c, torch.sigmoid(product_x), convex).to(x.dtype), r_x, r_u

    @staticmethod
    def logits(grad, logit, x, update, r_x, r_u, convex, see_update):
        """``(r_x delta [N, D], r_u delta or None if not see_update, sum of delta [D])``."""
        dtype = logit.dtype
        gate, u_c = torch.sigmoid(logit), update.to(dtype)
        delta = (u_c - x.to(dtype)).mul_(grad) if convex else u_c * grad
        delta = torch.ops.aten.sigmoid_backward(delta, gate)
        scaled_x = delta * r_x.unsqueeze(-1) if len(r_x) else delta
        scaled_u = None
        if see_update:
            scaled_u = delta * r_u.unsqueeze(-1) if len(r_u) else delta
        return scaled_x, scaled_u, delta.sum(0)

    @staticmethod
    def inputs(grad, logit, x, update, r_x, r_u, through_x, through_u, convex):
        """Gradients of ``x`` and ``update`` from ``through``, the products of the logits' gradient with W."""
        grad = grad.to(logit.dtype)
        d_update = torch.sigmoid(logit).mul_(grad)
        d_x = _with_source(grad - d_update if convex else grad, x, through_x, r_x)
        if through_u is not None:
            d_update = _with_source(d_update, update, through_u, r_u)
        return d_x.to(x.dtype), d_update.to(update.dtype)


def _scale_rows(product: Tensor, r: Tensor) -> None:
    """In place; where r = 0 the product may be infinite."""
    r = r.unsqueeze(-1)
    product.mul_(r).masked_fill_(r == 0, 0.0)


def _with_source(direct: Tensor, source: Tensor, through: Tensor, r: Tensor) -> Tensor:
    """The gradient of one source; overwrites ``through``."""
    if not len(r):
        return through.add_(direct)
    source, r = source.to(through.dtype), r.unsqueeze(-1)
    # r^2 times the dot product could leave fp32 where each of r and r times the dot does not.
    along = (through * source).sum(-1, keepdim=True).mul_(r).mul_(r).div_(-source.shape[-1])
    return through.add_(direct).addcmul_(source, along)


def _forward(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, convex: bool, normalise: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x' [N, D], logit [N, D], r_x, r_u)``, r ``[N]`` or empty where there is none; only x' has a gradient."""
    width, dtype = x.shape[1], compute_dtype(x.dtype)
    with _plain(x.device):
        x, update, w = x.contiguous(), update.contiguous(), weight.to(dtype)
        logit = x.to(dtype) @ w[:, :width].t()
        product_u = update.to(dtype) @ w[:, width:].t() if w.shape[1] == 2 * width else None
        kernels = _kernels(x, update)
        new, r_x, r_u = kernels.forward(logit, product_u, bias, x, update, convex, normalise, eps)
    return new, logit, r_x, r_u


def _backward(
    grad: Tensor,
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    logit: Tensor,
    r_x: Tensor,
    r_u: Tensor,
    convex: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``(x, update, weight, bias)``, each in its dtype."""
    width, dtype = x.shape[1], logit.dtype
    see_update = weight.shape[1] == 2 * width
    with _plain(x.device):
        kernels = _kernels(x, update)
        grad, x, update, w = grad.contiguous(), x.contiguous(), update.contiguous(), weight.to(dtype)
        scaled_x, scaled_u, d_bias = kernels.logits(grad, logit, x, update, r_x, r_u, convex, see_update)
        through_u = None
        d_weight = torch.empty(weight.shape, dtype=dtype, device=x.device)
        torch.mm(scaled_x.t(), x.to(dtype), out=d_weight[:, :width])
        if see_update:
            torch.mm(scaled_u.t(), update.to(dtype), out=d_weight[:, width:])
            through_u = scaled_u @ w[:, width:]
        through_x = scaled_x @ w[:, :width]
        d_x, d_update = kernels.inputs(grad, logit, x, update, r_x, r_u, through_x, through_u, convex)
    return d_x, d_update, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _fake_forward(x, update, weight, bias, convex, normalise, eps):
    dtype, see_update = compute_dtype(x.dtype), weight.shape[1] == 2 * x.shape[1]
    new = lambda *shape: x.new_empty(shape, dtype=dtype)  # noqa: E731
    rows = x.shape[0]
    return (
        x.new_empty(x.shape),
        new(*x.shape),
        new(rows if normalise else 0),
        new(rows if normalise and see_update else 0),
    )


def _fake_backward(grad, x, update, weight, bias, *_):
    return tuple(t.new_empty(t.shape) for t in (x, update, weight, bias))


def _keep(ctx, inputs, output):
    x, update, weight, bias, convex, *_ = inputs
    ctx.save_for_backward(x, update, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.convex = convex


def _differentiate(run_backward, ctx, grad, *_):
    return *run_backward(grad, *ctx.saved_tensors, ctx.convex), None, None, None


registered_backward = register("channel_gate_backward", _backward, _fake_backward)
run_gate = register_differentiable(
    "channel_gate", _forward, _fake_forward, _keep, _differentiate, _backward, registered_backward
)
