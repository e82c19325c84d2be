"""The pointwise passes of the channel gate in C++ (``channel_gate.cpp``): fp32, bf16 and fp16 on a CPU."""

import torch
from torch import Tensor

from . import call
from .storage import chunks, fp32, storable, typed


def usable(*tensors: Tensor) -> bool:
    """Whether these kernels take such tensors."""
    return storable(*tensors)


def _rows(r: Tensor) -> Tensor | None:
    return r if len(r) else None


def forward(product_x, product_u, bias, x, update, convex, normalise, eps):
    N, D = x.shape
    out = torch.empty_like(x)
    r_x = torch.empty(N if normalise else 0)
    r_u = torch.empty(N if normalise and product_u is not None else 0)
    call(
        "channel_gate_forward", N, D, convex, float(eps), torch.get_num_threads(), product_x, product_u,
        fp32(bias), *typed(x), *typed(update), out, _rows(r_x), _rows(r_u),
    )  # fmt: skip
    return out, r_x, r_u


def logits(grad, logit, x, update, r_x, r_u, convex, see_update):
    N, D = x.shape
    scaled_x = torch.empty_like(logit)
    # Without a norm both are the same.
    scaled_u = torch.empty_like(logit) if see_update and len(r_u) else None
    parts = torch.empty((chunks(N), D))
    call(
        "channel_gate_logits", N, D, convex, torch.get_num_threads(), *typed(grad), logit, *typed(x),
        *typed(update), _rows(r_x), _rows(r_u), scaled_x, scaled_u, parts,
    )  # fmt: skip
    return scaled_x, scaled_x if see_update and scaled_u is None else scaled_u, parts.sum(0)


def inputs(grad, logit, x, update, r_x, r_u, through_x, through_u, convex):
    N, D = x.shape
    d_x, d_update = torch.empty_like(x), torch.empty_like(update)
    call(
        "channel_gate_inputs", N, D, convex, torch.get_num_threads(), *typed(grad), logit, *typed(x),
        *typed(update), _rows(r_x), _rows(r_u), through_x, through_u, d_x, d_update,
    )  # fmt: skip
    return d_x, d_update
