r"""The MGR step in C++ (``mgr.cpp``): what :mod:`depthmix.ops.mgr_eager` computes, one pass over memory each way.

Streams in fp32, bf16 or fp16; layer outputs and the gradient of ``h`` in any of these; parameters are few numbers and
become fp32 here. ``N`` tokens, ``n`` streams, ``D`` features. Tensors are contiguous, those of
a window need not be.
"""

import torch
from torch import Tensor

from . import call
from .storage import DTYPES, fp32, storable

LARGEST_N = 64


def usable(streams: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take ``streams [N, n, D]`` and the outputs, gradients and weights that go with them."""
    return (
        all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in (streams, *others))
        and 1 <= streams.shape[-2] <= LARGEST_N
        and storable(streams, *others)
    )


def _window(outputs: list[Tensor], gates: list[Tensor]):
    """Arguments that describe a window, and the tensors they point into."""
    outputs, gates = [y.contiguous() for y in outputs], [beta.contiguous() for beta in gates]
    return len(outputs), outputs, [DTYPES[y.dtype] for y in outputs], gates


def step_forward(
    layer_output: Tensor,
    streams: Tensor,
    outputs: list[Tensor],
    gates: list[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    update_weight: Tensor | None,
    norm_weight: Tensor | None,
    gate: str,
    scale: float,
    eps: float,
    norm_eps: float,
    write: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(h [N, D], new_streams [N, n, D] or None, beta [N, n])``.

    ``streams`` is the anchor into which the k earlier ``outputs [N, D]`` are lerped with their ``gates [N, n]``.
    """
    tokens, n, width = streams.shape
    weights = [fp32(w) for w in (gate_weight, gate_bias, pool_weight, update_weight, norm_weight)]
    h = torch.empty(tokens, width, dtype=streams.dtype, device=streams.device)
    new_streams = torch.empty_like(streams) if write else None
    beta = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    call(
        "mgr_forward", tokens, n, width, torch.get_num_threads(), DTYPES[streams.dtype],
        layer_output, DTYPES[layer_output.dtype], streams, *_window(outputs, gates), *weights,
        gate == "competitive", float(scale), float(eps), float(norm_eps), h, new_streams, beta,
    )  # fmt: skip
    return h, new_streams, beta


def step_backward(
    grad_h: Tensor | None,
    grad_streams: Tensor | None,
    layer_output: Tensor,
    streams: Tensor,
    outputs: list[Tensor],
    gates: list[Tensor],
    beta: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    update_weight: Tensor | None,
    norm_weight: Tensor | None,
    gate: str,
    scale: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``(layer_output, streams, gate_weight, gate_bias, pool_weight, update_weight, norm_weight)``.

    That of ``streams`` is the gradient of the streams that enter this step, behind the window.
    """
    tokens, n, width = streams.shape
    grad_streams = None if grad_streams is None else grad_streams.to(streams.dtype)
    parameters = (gate_weight, gate_bias, pool_weight, update_weight, norm_weight)
    d_output, d_streams = torch.empty_like(layer_output), torch.empty_like(streams)
    totals = [
        None if w is None else torch.empty(w.shape, dtype=torch.float32, device=w.device) for w in parameters
    ]
    call(
        "mgr_backward", tokens, n, width, torch.get_num_threads(), DTYPES[streams.dtype],
        grad_h, DTYPES[torch.float32 if grad_h is None else grad_h.dtype], grad_streams,
        layer_output, DTYPES[layer_output.dtype], streams, *_window(outputs, gates), beta,
        *map(fp32, parameters), gate == "competitive", float(scale), float(eps), float(norm_eps),
        d_output, d_streams, *totals,
    )  # fmt: skip
    return (
        d_output,
        d_streams,
        *(
            None if w is None or total is None else total.to(w.dtype)
            for w, total in zip(parameters, totals, strict=True)
        ),
    )
