r"""The MGR step that keeps no streams: anchors, and recomputation that repeats the same bits.

Lerping sites are grouped into *windows* of m. A window keeps the streams that enter it (its
*anchor* :math:`S_0`) and, of every step, ``y`` and ``beta``. Its backward pass first computes
:math:`S_1 \dots S_m` again, by the same :func:`depthmix.ops.eager.lerp` in the same order, and every
step of the window then works on streams that are bit for bit those of the forward pass.
Kept per step: n D / m numbers for the anchor, D for ``y``, and a few per stream.

No state outlives the pass and nothing is shared behind autograd's back. Forwards, the window's
anchor, outputs and gates travel in the connection's state. Backwards, the recomputed streams travel
as the *gradient of a token*: step j hands the next a tensor of shape ``[j, N, n, D]`` whose storage is
a single number, and receives in its gradient slot the streams :math:`S_1 \dots S_j` that it left.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager import _plain, lerp, step_backward, step_forward
from .reference import compute_dtype


class ReplayStep(torch.autograd.Function):
    """Step j = 1 .. m of a window.

    ``(y [N, D], streams [N, n, D], token or None, parameters, last, history)`` ->
    ``(h [N, D], new_streams [N, n, D], next token, beta [N, n])``; ``history`` is
    ``(anchor, y_1, beta_1, ...)`` of the steps before. The first step keeps its anchor and the last
    step all of it; these are the tensors the steps before keep anyway.
    """

    @staticmethod
    def forward(
        ctx, layer_output, streams, token, gate_weight, gate_bias, pool_weight, update_weight,
        gate, scale, eps, last, *history,
    ):  # fmt: skip
        h, new_streams, kept = step_forward(
            layer_output, streams, gate_weight, gate_bias, pool_weight, update_weight, gate, scale, eps
        )
        beta = kept[0]
        ctx.save_for_backward(
            layer_output, gate_weight, gate_bias, pool_weight, update_weight, *kept,
            *(history if last or token is None else ()),
        )  # fmt: skip
        ctx.gate, ctx.scale, ctx.last, ctx.first = gate, scale, last, token is None
        steps = 1 if token is None else token.shape[0] + 1
        next_token = streams.new_zeros(1).expand(steps, *streams.shape)
        ctx.mark_non_differentiable(beta)
        ctx.set_materialize_grads(False)
        return h, new_streams, next_token, beta

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_new, replayed, _):
        (
            layer_output, gate_weight, gate_bias, pool_weight, update_weight,
            beta, r, g, r_y, g_y, alpha, r_new, a, *history,
        ) = ctx.saved_tensors  # fmt: skip
        if ctx.last:
            replayed = replay(*history, layer_output, beta)
        elif replayed is None:
            raise RuntimeError(
                "a replay window was left before its last step, so its streams cannot be recomputed; "
                "run whole windows, or build the model with stream_memory='store'"
            )
        streams = history[0] if ctx.first else replayed[-2]
        grads = step_backward(
            grad_h, grad_new, layer_output, streams, replayed[-1], gate_weight, gate_bias, pool_weight,
            update_weight, beta, r, g, r_y, g_y, alpha, r_new, a, ctx.gate, ctx.scale,
        )  # fmt: skip
        d_output, d_streams, *d_parameters = grads
        d_token = None if ctx.first else replayed[:-1]
        # gate, scale, eps, last; then the anchor and two tensors for each earlier step
        without_gradient = 4 + 1 + 2 * (replayed.shape[0] - 1)
        return d_output, d_streams, d_token, *d_parameters, *(None,) * without_gradient


@torch.no_grad()
def replay(anchor: Tensor, *outputs_and_gates: Tensor) -> Tensor:
    """Streams ``[j, N, n, D]``: what each of j steps makes of the anchor ``[N, n, D]``, one after another.

    ``outputs_and_gates`` are ``y_1 [N, D], beta_1 [N, n], y_2, beta_2, ...``
    """
    steps = len(outputs_and_gates) // 2
    streams = anchor.new_empty(steps, *anchor.shape)
    dtype = compute_dtype(anchor.dtype)
    with _plain(anchor.device):
        for j in range(steps):
            y, beta = outputs_and_gates[2 * j : 2 * j + 2]
            before = streams[j - 1] if j else anchor
            lerp(y.to(dtype), before.to(dtype), beta, anchor.dtype, out=streams[j])
    return streams
