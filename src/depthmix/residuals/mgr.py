r"""Multi-Gate Residuals (Zheng et al. 2026, arXiv 2605.23259): n parallel streams, gated and pooled.

Stream 1 is the embedding. While fewer than n streams exist (the *ramp*), a sublayer's output is
appended as a new stream; from then on it is blended into every stream by a gate (*lerp*):

.. math::
    s'_i = (1 - \beta_i)\, s_i + \beta_i\, y, \qquad
    h = \sum_i \alpha_i s'_i

with gate :math:`\beta` and pool :math:`\alpha` as in :mod:`depthmix.ops.reference`. So n - 1
sublayers append and M = L - (n - 1) lerp. Copies of one stream never fill up the ramp: identical
streams receive identical gates and gradients and stay identical for ever.

**Bias (Eq. 14).** :math:`b_{init}(M, n) = \ln(\sqrt{M / 21}\,(e^3 + 1) - n)`: the competitive gate
gets it as :math:`b_0`, which makes every :math:`\beta_i = \sigma(-3)` at M = 21 for any n. The
independent gate gets :math:`-b_{init}` in every :math:`b_i`. As printed, with n inside, that is
:math:`\sigma(-2.838)` at n = 4, M = 21; with n = 1 it is exactly :math:`\sigma(-3)`. Default: as
printed; ``independent_init="sigmoid"`` is the other reading.

**Gate that sees the update** (``mgr-review``, ours). The Review paper's gate reads the update it admits;
here each score becomes :math:`g_i + w_3 \cdot \mathrm{rms}(y) / \sqrt D`, with :math:`w_3 = 0` at the start,
so that it starts as the gate it extends. It reads nothing that the lerp does not read anyway.

**Separate streams** (``separate_streams``, ours). n is even. Sublayers of odd number (attentions, in a GPT) write to
streams 2, 4, ..., n alone, those of even number (MLPs) to streams 1, 3, ..., n - 1, of which the first is the
embedding; a gate sees and weighs the n/2 streams that its sublayer writes, and every read is the pool of all n. The
ramp is that above: sublayer l < n appends stream l + 1, whose kind is its own. So that a stream takes in as much as
Eq. 14 means, M is the number of lerps that reach one stream, half of them all (the larger half), and n the number of
streams that share a gate, n/2.

**Precision.** Streams have the dtype of the embedding's output, or the one that ``stream_dtype`` names; a sublayer's
output is cast to it when it is written. With a dtype of their own, what is read is rounded to it, then
converted to the dtype of the connection's parameters, and the next sublayer's norm is computed in that: everything but
the streams stays as the run's precision has it.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import UserError, suggest
from ..ops import reference
from ..ops.inversion import Fallback
from ..ops.mgr import mgr_step, step_values, steps_between_writes
from .base import Gates, Residual, Scaling, Site, State
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


def gate_bias_init(
    lerp_depth: int, n_streams: int, *, base_depth: int = 21, base_bias: float = -3.0
) -> float:
    """Eq. 14: ``ln(sqrt(lerp_depth / base_depth) * (exp(-base_bias) + 1) - n_streams)``.

    Args:
        lerp_depth: M, the number of lerping sublayers, L - (n - 1).
        n_streams: n.
        base_depth, base_bias: the depth for which a sigmoid gate with this bias is right;
            21 and -3 in the paper (12 blocks, n = 4).

    Raises:
        ValueError: the logarithm's argument is not positive (many streams, few layers); the
            message names M, n and the largest n that works.
    """
    for name, value in (("lerp_depth", lerp_depth), ("n_streams", n_streams), ("base_depth", base_depth)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    margin = math.sqrt(lerp_depth / base_depth) * (math.exp(-base_bias) + 1)
    if margin <= n_streams:
        largest = math.ceil(margin) - 1
        raise UserError(
            f"Eq. 14 has no bias for M = {lerp_depth} lerping sublayers and n = {n_streams} streams: "
            f"sqrt(M / {base_depth}) * (exp({-base_bias:g}) + 1) = {margin:.3f} must exceed n. "
            + (
                f"The largest n for this M is {largest}; use fewer streams, more layers or a lower base_bias"
                if largest >= 1
                else "No n works for this M; use more layers or a lower base_bias"
            )
        )
    return math.log(margin - n_streams)


class MultiGateResidual(nn.Module):
    """One lerping step with its own parameters: for those who write their own loop.

    Args:
        d_model: D.
        n_streams: n, 1 to 64.
        gate: ``"competitive"`` or ``"independent"``.
        init_bias: put into ``b_0`` (competitive) or into every ``b_i`` (independent);
            :func:`gate_bias_init` computes it (negate it for the independent gate).
        eps: added to the mean square inside every score.
        update_gate: the gate also scores the update (``update_weight [D]``, zero init).
        scale: of gate and pool scores; ``None`` is 1/sqrt(D).
        pool: whether there is a ``pool_weight``; without, the streams' mean is read. ``None``: where n > 1.

    Parameters: ``gate_weight [D]`` and ``pool_weight [D]``, zero; ``gate_bias [n + 1]``
    (competitive) or ``[n]`` (independent). A pool over one stream has no weight: with n = 1,
    ``pool_weight`` is ``None``.
    """

    def __init__(
        self,
        d_model: int,
        n_streams: int,
        gate: str = "competitive",
        init_bias: float = 0.0,
        eps: float = 1e-6,
        *,
        update_gate: bool = False,
        scale: float | None = None,
        pool: bool | None = None,
    ):
        super().__init__()
        if gate not in functional.GATES:
            raise UserError(suggest(str(gate), functional.GATES, "gate"))
        if d_model < 1:
            raise UserError(f"d_model must be at least 1, got {d_model}")
        if not 1 <= n_streams <= 64:
            raise UserError(f"n_streams must be between 1 and 64, got {n_streams}")
        self.d_model, self.n_streams, self.gate = d_model, n_streams, gate
        self.init_bias, self.eps, self.scale = init_bias, eps, scale
        self.gate_weight = nn.Parameter(torch.empty(d_model))
        self.gate_bias = nn.Parameter(torch.empty(n_streams + (gate == "competitive")))
        pool = n_streams > 1 if pool is None else pool
        self.pool_weight = nn.Parameter(torch.empty(d_model)) if pool else None
        self.update_weight = nn.Parameter(torch.empty(d_model)) if update_gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights to zero, the bias to ``init_bias``."""
        for weight in (self.gate_weight, self.gate_bias, self.pool_weight, self.update_weight):
            if weight is not None:
                weight.zero_()
        if self.gate == "competitive":
            self.gate_bias[:1].fill_(self.init_bias)
        else:
            self.gate_bias.fill_(self.init_bias)

    def forward(self, layer_output: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """``layer_output [B, T, D]``, ``streams [B, T, n, D]`` -> ``(h [B, T, D], new_streams [B, T, n, D])``.

        Any leading shape; fp32, bf16 or fp16. Raises ``ValueError`` for shapes that do not fit.
        """
        if streams.dim() >= 2 and streams.shape[-2] != self.n_streams:
            raise UserError(
                f"streams must hold n = {self.n_streams} streams in dimension -2, got shape {list(streams.shape)}"
            )
        return functional.multi_gate_residual(layer_output, streams, **self._arguments())

    if TYPE_CHECKING:
        __call__ = forward

    def _arguments(self, norm: Any = None) -> dict[str, Any]:
        """What :func:`depthmix.functional.multi_gate_residual` takes besides tensors; with a norm, fused."""
        arguments: dict[str, Any] = dict(
            gate_weight=self.gate_weight,
            gate_bias=self.gate_bias,
            pool_weight=self.pool_weight,
            gate=self.gate,
            update_weight=self.update_weight,
            eps=self.eps,
            scale=self.scale,
        )
        if norm is not None:
            arguments |= dict(norm_weight=norm.weight, norm_eps=norm.eps)
        return arguments

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_streams={self.n_streams}, gate={self.gate!r}"


def _pool_weights(streams: Tensor, pool_weight: Tensor | None, scale: float | None, eps: float) -> Tensor:
    """``alpha [..., n]``."""
    scale = streams.shape[-1] ** -0.5 if scale is None else scale
    return reference.pool_weights(streams, pool_weight, scale, eps)


def _pooled(streams: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
    """``sum_i alpha_i s_i`` for streams ``[..., B, T, W]`` and ``alpha [B, T, n]``."""
    total = alpha[..., 0, None] * streams[0]
    for i, stream in enumerate(streams[1:], 1):
        total = total + alpha[..., i, None] * stream
    return total


def _alternating(halves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Streams 1 .. n of the halves ``[..., n/2, D]`` that sublayers of even and of odd number write."""
    return tuple(
        stream for pair in zip(*(half.unbind(-2) for half in halves), strict=True) for stream in pair
    )


class StreamSite(Site):
    """A site whose streams may have a dtype of their own (``own_dtype``); the others return what they read as it is."""

    fuses_norm = True
    received = ("pool_weight",)
    own_dtype = False

    @abstractmethod
    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        """:meth:`forward`, with what is read in the dtype of the streams."""

    @abstractmethod
    def pool(self, state: State) -> Tensor:
        """:meth:`read`, in the dtype of the streams."""

    def forward(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        dtype = self._read_dtype(layer_output.dtype)
        if dtype in (None, state[0].dtype):
            return self.step(layer_output, state, norm)
        h, state = self.step(layer_output, state)
        h = h.to(dtype)
        return h if norm is None else norm(h), state

    def read(self, state: State) -> Tensor:
        h, dtype = self.pool(state), self._read_dtype(state[0].dtype)
        return h if dtype is None else h.to(dtype)

    def _read_dtype(self, without_parameters: torch.dtype) -> torch.dtype | None:
        """What reads are converted to; ``None``: to nothing."""
        if not self.own_dtype:
            return None
        parameter = next(self.parameters(), None)
        return without_parameters if parameter is None else parameter.dtype


class RampSite(StreamSite):
    """Appends the output as stream ``n_after``; the streams stay separate tensors until all are there.

    State: the streams so far, ``n_after - 1`` tensors ``[B, T, D]``. At the last site of the ramp they
    are laid side by side, once, into ``[B, T, n, D]``, or, ``separate``, into two halves (:class:`SeparateSite`).
    """

    gate_names = ("pool",)

    def __init__(
        self,
        d_model: int,
        n_after: int,
        complete: bool,
        eps: float,
        scale: float | None,
        *,
        pool: bool = True,
        separate: bool = False,
    ):
        super().__init__()
        self.complete, self.eps, self.scale, self.separate = complete, eps, scale, separate
        self.pool_weight = nn.Parameter(torch.empty(d_model)) if pool else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.pool_weight is not None:
            self.pool_weight.zero_()

    def write(self, layer_output: Tensor, state: State) -> State:
        streams = (*state, layer_output.to(state[0].dtype))
        if not self.complete:
            return streams
        if self.separate:
            return torch.stack(streams[::2], -2), torch.stack(streams[1::2], -2)
        return (torch.stack(streams, -2),)

    def pool(self, state: State, norm: Any = None) -> Tensor:
        arguments: dict[str, Any] = dict(scale=self.scale, eps=self.eps)
        if norm is not None:
            arguments |= dict(norm_weight=norm.weight, norm_eps=norm.eps)
        if self.complete and not self.separate:
            return functional.attention_pool(state[0], self.pool_weight, **arguments)
        sources = _alternating(state) if self.complete else state
        return functional.source_pool(sources, self.pool_weight, **arguments)

    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        state = self.write(layer_output, state)
        return self.pool(state, norm), state

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        streams = torch.stack([*state, layer_output.to(state[0].dtype)], -2)
        return (_pool_weights(streams, self.pool_weight, self.scale, self.eps),)

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        state = self.write(layer_output, state)
        return _pooled(self.streams(state), *gates), state

    def streams(self, state: State) -> tuple[Tensor, ...]:
        if not self.complete:
            return state
        return _alternating(state) if self.separate else state[0].unbind(-2)


class LerpSite(StreamSite, MultiGateResidual):  # type: ignore[misc]  # a site has a state where the module has streams
    """State: ``(streams [B, T, n, D],)``. The backward pass finds the streams where autograd stored them."""

    gate_names = ("gate", "pool")
    convex = True

    def write(self, layer_output: Tensor, state: State) -> State:
        return self.step(layer_output, state)[1]

    def send(self, layer_output: Tensor, state: State) -> State:
        return self.write(layer_output, state)[:1]

    def pool(self, state: State) -> Tensor:
        return functional.attention_pool(state[0], self.pool_weight, scale=self.scale, eps=self.eps)

    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        h, streams = functional.multi_gate_residual(layer_output, state[0], **self._arguments(norm))
        return h, (streams,)

    def gate_values(self, layer_output: Tensor, streams: Tensor) -> Tensor:
        """``beta [N, n]`` as the step computes it, to the last bit, for ``[N, D]`` and ``[N, n, D]``."""
        scale = streams.shape[-1] ** -0.5 if self.scale is None else self.scale
        parameters = self.gate_weight, self.gate_bias, self.pool_weight, self.update_weight, None
        return mgr_step(layer_output, streams, *parameters, self.gate, scale, self.eps, self.eps)[2]

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        streams = state[0]
        scale = streams.shape[-1] ** -0.5 if self.scale is None else self.scale
        beta = reference.gate_values(
            layer_output, streams, self.gate_weight, self.gate_bias, self.gate, self.update_weight, scale,
            self.eps,
        )  # fmt: skip
        written = reference.lerp(layer_output, streams, beta)
        return beta, _pool_weights(written, self.pool_weight, self.scale, self.eps)

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        beta, alpha = gates
        streams = torch.lerp(state[0], layer_output.unsqueeze(-2), beta.unsqueeze(-1))
        return _pooled(streams.unbind(-2), alpha), (streams,)

    def streams(self, state: State) -> tuple[Tensor, ...]:
        return state[0].unbind(-2)


class ReplaySite(LerpSite):
    """A lerp at place 0, 1, ... of a replay window (:mod:`depthmix.ops.mgr`); the last place ends it.

    State inside a window: ``(streams, written, anchor, y_1, beta_1, y_2, beta_2, ...)``, with streams that are a handle
    where they were not written; between windows ``(streams,)``. Without gradients this is a plain :class:`LerpSite`.
    """

    def __init__(self, *args: Any, place: int, last: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.place, self.last = place, last
        between = steps_between_writes(self.n_streams)
        self.since = place % between
        self.writes = last or self.since == between - 1

    def write(self, layer_output: Tensor, state: State) -> State:
        """Unlike :meth:`step` this always writes the streams: a read is to follow."""
        if not torch.is_grad_enabled():
            return super().write(layer_output, state)
        return self._step(layer_output, state, None, True)[1]

    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        if not torch.is_grad_enabled():
            return super().step(layer_output, state, norm)
        return self._step(layer_output, state, norm, self.writes)

    def _step(self, layer_output: Tensor, state: State, norm: Any, write: bool) -> tuple[Tensor, State]:
        streams, *window = state if self.place else (state[0],) * 3
        h, streams, beta = functional.multi_gate_window_step(
            layer_output, streams, tuple(window), self.since, write, **self._arguments(norm)
        )
        if self.last:
            return h, (streams,)
        written, *kept = window
        if self.writes:  # values alone: autograd must find nothing behind them
            written = streams.detach()
        return h, (streams, written, *kept, layer_output.detach(), beta)

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        return super().gates(layer_output, _with_values(state, self.since))

    def streams(self, state: State) -> tuple[Tensor, ...]:
        return super().streams(_with_values(state, 0 if self.writes else self.since + 1))


def _with_values(state: State, since: int) -> State:
    """``(streams,)`` for a state of a window, last written ``since`` steps ago."""
    if len(state) == 1:
        return state
    _, written, _, *steps = state
    first = len(steps) - 2 * since
    return (step_values(written, steps[first::2], steps[first + 1 :: 2]),)


class InversionSite(LerpSite):
    """A lerp whose backward pass undoes it (:mod:`depthmix.ops.inversion`).

    State between the first of these sites and the last: ``(streams, token, row norms, W, R)``; outside ``(streams,)``.
    Without gradients this is a plain :class:`LerpSite`.
    """

    _untraced: Callable[..., tuple[Tensor, State]]

    def __init__(self, *args: Any, fallback: Fallback, first: bool, last: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fallback, self.first, self.last = fallback, first, last
        # Here and not where the class is made: it imports the compiler, which takes seconds.
        InversionSite._untraced = torch.compiler.disable(
            InversionSite._step, reason="what inversion keeps depends on the gates"
        )

    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        if not torch.is_grad_enabled():
            return super().step(layer_output, state, norm)
        return self._untraced(layer_output, state, norm)

    def _step(self, layer_output: Tensor, state: Any, norm: Any) -> tuple[Tensor, State]:
        if self.first:
            state = (*state, None, *functional.inversion_budget(state[0]))
        h, *state = functional.multi_gate_inversion_step(
            layer_output, *state, fallback=self.fallback, last=self.last, **self._arguments(norm)
        )
        return h, tuple(state[:1] if self.last else state)


class SeparateSite(StreamSite, MultiGateResidual):  # type: ignore[misc]  # as LerpSite
    """A lerp into every second stream, read with all others (``separate_streams``).

    State: two halves ``[B, T, n/2, D]``, the streams that sublayers of even number write and those of odd number.
    ``side``: which is this site's, 0 or 1. The inherited ``n_streams`` is that of the half.
    """

    gate_names = ("gate", "pool")
    convex = True

    def __init__(self, *args: Any, side: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.side = side
        self.gated_streams = tuple(range(side, 2 * self.n_streams, 2))

    def write(self, layer_output: Tensor, state: State) -> State:
        # The op's own read, of this half alone, is not used.
        arguments = self._arguments() | {"pool_weight": None}
        return self._put(
            functional.multi_gate_residual(layer_output, state[self.side], **arguments)[1], state
        )

    def _put(self, written: Tensor, state: State) -> State:
        return (written, state[1]) if self.side == 0 else (state[0], written)

    def pool(self, state: State, norm: Any = None) -> Tensor:
        arguments: dict[str, Any] = dict(scale=self.scale, eps=self.eps)
        if norm is not None:
            arguments |= dict(norm_weight=norm.weight, norm_eps=norm.eps)
        return functional.source_pool(_alternating(state), self.pool_weight, **arguments)

    def step(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        state = self.write(layer_output, state)
        return self.pool(state, norm), state

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        scale = layer_output.shape[-1] ** -0.5 if self.scale is None else self.scale
        beta = reference.gate_values(
            layer_output, state[self.side], self.gate_weight, self.gate_bias, self.gate, self.update_weight,
            scale, self.eps,
        )  # fmt: skip
        written = self._put(reference.lerp(layer_output, state[self.side], beta), state)
        alpha = _pool_weights(torch.stack(_alternating(written), -2), self.pool_weight, self.scale, self.eps)
        return beta, alpha

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        beta, alpha = gates
        state = self._put(torch.lerp(state[self.side], layer_output.unsqueeze(-2), beta.unsqueeze(-1)), state)
        return _pooled(self.streams(state), alpha), state

    def streams(self, state: State) -> tuple[Tensor, ...]:
        return _alternating(state)


class MultiGateResiduals(Residual):
    """The ramp, then lerps; ``gate`` as in :class:`MultiGateResidual`, ``options`` an :class:`Options`.

    Raises ``UserError`` for options that do not go together with each other or with ``config``.
    """

    not_prenorm: str | None = None

    def __init__(self, config: "GPTConfig", gate: str, options: "Options", update_gate: bool = False):
        super().__init__(config)
        self.update_gate, self.separate = update_gate, options.separate_streams
        self.stream_dtype = _DTYPES[options.stream_dtype]
        self.mean_at_the_end = options.last_read == "mean"
        if self.separate:
            _check_separate(config)
            self.not_prenorm = (
                "separate_streams reads both halves alike, and behind an MLP one holds one output more"
            )
        bias = options.bias
        self.d_model, self.n_streams, self.gate = config.d_model, config.n_streams, gate
        self.eps = config.norm_eps
        self.scale = None if config.score_scale == "paper" else 1.0
        self.n_sublayers = config.n_sublayers
        self.memory, self.replay_window = config.stream_memory, config.replay_window
        self.fallback = Fallback(
            config.inversion_top_p, config.inversion_tolerance if config.inversion == "anchored" else None
        )
        self.lerp_depth = config.n_sublayers - (self.n_streams - 1)
        self.n_gates = self.n_streams // 2 if self.separate else self.n_streams
        self.init_bias: float | None = None
        if self.lerp_depth >= 1:
            in_formula = 1 if gate == "independent" and config.independent_init == "sigmoid" else self.n_gates
            if bias is None:
                bias = -gate_bias_init(
                    -(-self.lerp_depth // 2) if self.separate else self.lerp_depth,
                    in_formula,
                    base_depth=config.gate_base_depth,
                    base_bias=config.gate_base_bias,
                )
            self.init_bias = -bias if gate == "competitive" else bias
        else:
            warnings.warn(
                f"{config.n_sublayers} sublayers never fill n = {self.n_streams} streams: every sublayer "
                f"appends and no gate exists. Use n_streams <= {config.n_sublayers}",
                stacklevel=2,
            )

    def gate_summary(self) -> dict[str, Any]:
        """Sublayers that append and that lerp, and what Eq. 14 gives for them."""
        ramp = min(self.n_streams - 1, self.n_sublayers)
        summary: dict[str, Any] = {"n_streams": self.n_streams, "ramp": ramp, "lerp": self.n_sublayers - ramp}
        if self.init_bias is not None:
            if self.gate == "competitive":
                beta = 1 / (math.exp(self.init_bias) + self.n_gates)
            else:
                beta = 1 / (1 + math.exp(-self.init_bias))
            summary |= {"bias": self.init_bias, "initial_beta": beta}
        return summary

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        stream = x if self.stream_dtype is None else x.to(self.stream_dtype)
        return x, (stream.unsqueeze(-2) if self.n_streams == 1 else stream,)

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        return None if first < self.n_streams else state  # the ramp's outputs are the streams

    @torch.no_grad()
    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        """Gates of 1 / (l + 1) and pools that are means: every read is the mean of embedding and outputs."""
        super().start_as_prenorm(sites)  # raises where there is no such start
        for index, site in enumerate(sites, start=1):
            site.reset_parameters()
            if isinstance(site, LerpSite):
                if site.gate == "competitive":
                    # softmax over exp(b_0) and n ones
                    site.gate_bias[0] = math.log(index + 1 - self.n_streams)
                else:
                    site.gate_bias.fill_(-math.log(index))
        return Scaling(1.0, tuple(float(index + 1) for index in range(1, len(sites) + 1)))

    def unchanged(self, earlier: int, later: int) -> int:
        return earlier + 1 if later + 1 < self.n_streams else 0  # in the ramp, streams are separate tensors

    def site(self, index: int) -> Site:
        made = self._site(index)
        made.own_dtype = self.stream_dtype is not None
        if made.own_dtype and self.n_streams == 1 and self.cuts:
            raise UserError(
                "stream_dtype cannot be set for n_streams = 1 under a pipeline (pp): what is read behind a cut would "
                "have to be converted to the dtype of parameters, and a pool of one stream has none; leave out pp or "
                "stream_dtype, or use n_streams of at least 2"
            )
        return made

    def _site(self, index: int) -> Any:
        pool = not (self.mean_at_the_end and index == self.n_sublayers)
        if index < self.n_streams:
            complete = index + 1 == self.n_streams
            return RampSite(
                self.d_model, index + 1, complete, self.eps, self.scale, pool=pool, separate=self.separate
            )
        arguments: tuple[Any, ...] = (self.d_model, self.n_gates, self.gate, self.init_bias, self.eps)
        keywords: dict[str, Any] = {"update_gate": self.update_gate, "scale": self.scale}
        keywords["pool"] = pool and self.n_streams > 1
        if self.separate:
            return SeparateSite(*arguments, **keywords, side=index % 2)
        # What is kept for the backward pass begins anew behind a cut and ends in front of one.
        first = max(self.n_streams, *(cut + 1 for cut in self.cuts if cut < index), 0)
        place, last = index - first, index in (*self.cuts, self.n_sublayers)
        if self.memory == "replay":
            place %= self.replay_window
            last = last or place == self.replay_window - 1
            return ReplaySite(*arguments, **keywords, place=place, last=last)
        if self.memory == "inversion":
            keywords |= {"fallback": self.fallback, "first": place == 0, "last": last}
            return InversionSite(*arguments, **keywords)
        return LerpSite(*arguments, **keywords)


def _check_separate(config: "GPTConfig") -> None:
    if config.n_streams % 2:
        raise UserError(
            f"residual {config.residual}: separate_streams divides the streams into two halves, so n_streams must be "
            f"even, got {config.n_streams}"
        )
    if config.stream_memory != "store":
        raise UserError(
            f"residual {config.residual}: separate_streams reads halves that are written in turn, and needs both in "
            f"the backward pass: stream_memory must be store, got {config.stream_memory}; set stream_memory=store"
        )


_DTYPES = {"model": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Options of the two gates."""

    bias: float | None = None
    """Initial bias of a sigmoid gate, at every depth; the competitive gate keeps with minus this. None: Eq. 14."""
    stream_dtype: Literal["model", "fp32", "bf16"] = "model"
    """Dtype of the streams, whatever the precision; model: that of the embedding's output."""
    last_read: Literal["pool", "mean"] = "pool"
    """What the trunk returns of its streams: a pool, as every sublayer reads, or their mean."""
    separate_streams: bool = False
    """Attentions write to one half of the streams, MLPs to the other, and all read both. Needs stream_memory=store."""


@dataclass(frozen=True)
class ReviewGateOptions(Options):
    """Options of ``mgr-review``."""

    gate: Literal["competitive", "independent"] = "competitive"
    """Which of the two gates the update's score is added to."""


_FIELDS = (
    "n_streams",
    "stream_memory",
    "replay_window",
    "inversion",
    "inversion_top_p",
    "inversion_tolerance",
    "score_scale",
    "gate_base_depth",
    "gate_base_bias",
)


@register(
    "mgr-independent",
    "n streams, each gated by its own sigmoid, read by a softmax pool",
    options=Options,
    fields=(*_FIELDS, "independent_init"),
)
def _independent(config: "GPTConfig", options: Options) -> MultiGateResiduals:
    return MultiGateResiduals(config, "independent", options)


@register(
    "mgr-competitive",
    "n streams that compete for each update in a softmax, read by a softmax pool",
    options=Options,
    fields=_FIELDS,
)
def _competitive(config: "GPTConfig", options: Options) -> MultiGateResiduals:
    return MultiGateResiduals(config, "competitive", options)


@register(
    "mgr-review",
    "Multi-Gate Residuals whose gates also see the update they admit",
    options=ReviewGateOptions,
    fields=(*_FIELDS, "independent_init"),
)
def _review(config: "GPTConfig", options: ReviewGateOptions) -> MultiGateResiduals:
    return MultiGateResiduals(config, options.gate, options, update_gate=True)
