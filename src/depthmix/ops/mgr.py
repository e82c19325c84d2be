r"""The MGR step as registered operations: gate, lerp, pool and the next norm in one pass, whatever runs them.

``depthmix::mgr_step`` is :func:`depthmix.ops.reference.multi_gate_residual` followed, where a norm's weight is
given, by the RMSNorm of h. Its backward, ``depthmix::mgr_step_backward``, computes scores, weights, the new streams
and h again from what entered, on chip, so that a step keeps its inputs and ``beta`` and nothing else. Elements of D
that a token moves, with its n x D tile on chip: forward n + 1 read and n + 1 written, backward 2n + 2 and n + 1.

**Window.** ``depthmix::mgr_window_step`` is the same step for streams that were never kept: an *anchor* and the outputs
and gates of the steps behind it say what they are, and advancing it by k lerps on chip repeats their bits exactly.

* Backward, every step of a window starts from the anchor: n + k read in place of n. Kept per step: D for ``y`` and a
  few numbers; per window: the anchor.
* Forward, a step need not write its streams at all, if the next one starts from an earlier tensor too. Step j behind
  the last streams written (j = 1, 2, ...) reads n + j and writes 1, where the plain step reads n + 1 and writes
  n + 1; the j-th writes n more if it writes. :func:`steps_between_writes` chooses j by that count. A tensor of
  streams that was not written is a handle: of the right shape, filled with NaN from a single number of storage, so that
  the gradient of the streams has somewhere to travel and a mistake shows.

Both operations are of first order. Shapes inside this file: ``N`` tokens, ``n`` streams, ``D`` features; streams
``[N, n, D]``, in fp32, bf16, fp16 or (torch operations only) fp64; ``layer_output [N, D]`` and weights may have a dtype
of their own. Arithmetic is fp32, fp64 for fp64 streams.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import backend, mgr_eager
from .reference import compute_dtype
from .registration import register, register_differentiable

HANDLE_VALUE = float("nan")


def steps_between_writes(n: int) -> int:
    """After how many steps of a window the streams are written: the fewest elements moved per step."""

    def moved(steps: int) -> float:
        """Per step: n + j read and 1 written by step j, and n more by the last."""
        return sum(n + j + 1 for j in range(1, steps + 1)) / steps + n / steps

    return min(range(1, 2 * n + 2), key=moved)


def _kernels(streams: Tensor, layer_output: Tensor) -> ModuleType:
    """The module whose ``step_forward`` and ``step_backward`` run on these."""
    choice = backend.choose(streams)
    if streams.dtype == torch.float64:
        return mgr_eager
    if choice == "triton":
        from .triton import mgr as triton_mgr

        return triton_mgr
    if choice == "native":
        from .native import mgr as native_mgr

        if native_mgr.usable(streams, layer_output):
            return native_mgr
    return mgr_eager


def _unwritten(streams: Tensor) -> Tensor:
    """A handle of the shape of ``streams``."""
    return streams.new_full((1,), HANDLE_VALUE).expand(streams.shape)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _forward(layer_output, streams, outputs, gates, parameters, gate, scale, eps, norm_eps, write):
    kernels = _kernels(streams, layer_output)
    layer_output, streams, *parameters = _contiguous(layer_output, streams, *parameters)
    h, new_streams, beta = kernels.step_forward(
        layer_output, streams, outputs, gates, *parameters, gate, scale, eps, norm_eps, write
    )
    return h, _unwritten(streams) if new_streams is None else new_streams, beta


def _step(
    layer_output: Tensor,
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    update_weight: Tensor | None,
    norm_weight: Tensor | None,
    gate: str,
    scale: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(h [N, D], new_streams [N, n, D], beta [N, n])``; ``beta`` has no gradient of its own."""
    parameters = gate_weight, gate_bias, pool_weight, update_weight, norm_weight
    return _forward(layer_output, streams, [], [], parameters, gate, scale, eps, norm_eps, True)


def _window_step(
    layer_output: Tensor,
    streams: Tensor,
    written: Tensor,
    since: int,
    anchor: Tensor,
    outputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    write: bool,
    gate_weight: Tensor,
    gate_bias: Tensor,
    pool_weight: Tensor | None,
    update_weight: Tensor | None,
    norm_weight: Tensor | None,
    gate: str,
    scale: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of a window; arguments beyond those of ``mgr_step``:

    ``streams``: the streams entering, perhaps a handle: never read, but theirs is the gradient. ``written``: the
    streams last written, ``since`` steps ago. ``anchor``: those that entered the window; ``outputs`` and ``gates``: of
    every step of the window before this one. ``write``: whether the new streams are written; otherwise a handle is
    returned.
    """
    parameters = gate_weight, gate_bias, pool_weight, update_weight, norm_weight
    first = len(outputs) - since
    return _forward(
        layer_output, written, outputs[first:], gates[first:], parameters, gate, scale, eps, norm_eps, write
    )


def step_backward(
    grad_h: Tensor | None,
    grad_streams: Tensor | None,
    layer_output: Tensor,
    anchor: Tensor,
    outputs: Sequence[Tensor],
    gates: Sequence[Tensor],
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
) -> list[Tensor]:
    """Gradients of ``layer_output``, of the streams entering, of ``gate_weight``, ``gate_bias`` and of those of
    ``pool_weight``, ``update_weight`` and ``norm_weight`` that there are, each in its tensor's dtype."""
    kernels = _kernels(anchor, layer_output)
    parameters = _contiguous(gate_weight, gate_bias, pool_weight, update_weight, norm_weight)
    grad_h, grad_streams = _contiguous(grad_h, grad_streams)
    layer_output, anchor, beta = layer_output.contiguous(), anchor.contiguous(), beta.contiguous()
    if grad_h is None and grad_streams is None:
        grad_streams = torch.zeros_like(anchor)
    gradients = kernels.step_backward(
        grad_h, grad_streams, layer_output, anchor, list(outputs), list(gates), beta, *parameters, gate, scale,
        eps, norm_eps,
    )  # fmt: skip
    return [gradient for gradient in gradients if gradient is not None]


def _fake_step(layer_output, streams):
    beta = streams.new_empty(streams.shape[:-1], dtype=compute_dtype(streams.dtype))
    return layer_output.new_empty(layer_output.shape, dtype=streams.dtype), beta


def _fake_plain_step(layer_output, streams, *_):
    h, beta = _fake_step(layer_output, streams)
    return h, streams.new_empty(streams.shape), beta


def _fake_window_step(layer_output, streams, written, since, anchor, outputs, gates, write, *_):
    h, beta = _fake_step(layer_output, streams)
    return h, streams.new_empty(streams.shape) if write else _unwritten(streams), beta


def _fake_backward(grad_h, grad_streams, layer_output, anchor, outputs, gates, beta, *rest):
    return [x.new_empty(x.shape) for x in (layer_output, anchor, *rest[:5]) if x is not None]


def _keep_step(ctx, inputs, output):
    layer_output, streams, *parameters, gate, scale, eps, norm_eps = inputs
    ctx.save_for_backward(layer_output, streams, output[2], *parameters)
    ctx.steps, ctx.rest = 0, (gate, scale, eps, norm_eps)
    ctx.set_materialize_grads(False)


def _keep_window_step(ctx, inputs, output):
    layer_output, _, _, _, anchor, outputs, gates, _, *parameters, gate, scale, eps, norm_eps = inputs
    ctx.save_for_backward(layer_output, anchor, output[2], *parameters, *outputs, *gates)
    ctx.steps, ctx.rest = len(outputs), (gate, scale, eps, norm_eps)
    ctx.set_materialize_grads(False)


def _gradients(run_backward, ctx, grad_h, grad_streams) -> list[Tensor | None]:
    """Of ``layer_output``, ``streams`` and the five parameters."""
    layer_output, anchor, beta, *rest = ctx.saved_tensors
    parameters, outputs, gates = rest[:5], rest[5 : 5 + ctx.steps], rest[5 + ctx.steps :]
    found = iter(
        run_backward(grad_h, grad_streams, layer_output, anchor, outputs, gates, beta, *parameters, *ctx.rest)
    )
    return [None if x is None else next(found) for x in (layer_output, anchor, *parameters)]


def _differentiate_step(run_backward, ctx, grad_h, grad_streams, _):
    return *_gradients(run_backward, ctx, grad_h, grad_streams), None, None, None, None


def _differentiate_window_step(run_backward, ctx, grad_h, grad_streams, _):
    d_output, d_streams, *d_parameters = _gradients(run_backward, ctx, grad_h, grad_streams)
    nothing = [None] * ctx.steps
    return (
        d_output, d_streams, None, None, None, nothing, list(nothing), None, *d_parameters, None, None, None, None,
    )  # fmt: skip


mgr_step_backward = register("mgr_step_backward", step_backward, _fake_backward)
mgr_step = register_differentiable(
    "mgr_step", _step, _fake_plain_step, _keep_step, _differentiate_step, step_backward, mgr_step_backward
)
mgr_window_step = register_differentiable(
    "mgr_window_step", _window_step, _fake_window_step, _keep_window_step, _differentiate_window_step,
    step_backward, mgr_step_backward,
)  # fmt: skip


def step_values(streams: Tensor, outputs: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    """What a handle stands for: ``streams [..., n, D]`` advanced by ``outputs [..., D]`` and ``gates [..., n]``."""
    n, width = streams.shape[-2:]
    values = mgr_eager.entering_streams(
        streams.detach().reshape(-1, n, width),
        [y.detach().reshape(-1, width) for y in outputs],
        [beta.reshape(-1, n) for beta in gates],
    )
    return values.view(streams.shape)
