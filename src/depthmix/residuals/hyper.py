r"""Hyper-Connections (Zhu et al. 2024, arXiv 2409.19606): n streams and learned matrices between them.

The trunk begins with n copies of the embedding, :math:`H_0 = [x, \dots, x]`. Around sublayer k = 0 .. L - 1

.. math::
    h = A_m^\top H, \qquad y = F(h), \qquad H \leftarrow A_r^\top H + B \otimes y

with :math:`A_m \in R^{n \times 1}`, :math:`A_r \in R^{n \times n}`, :math:`B \in R^n`; behind the last
sublayer the streams are summed.

* ``hc-static``: :math:`A = [A_m | A_r]` and B are parameters, which start as
  :math:`A_m = e_{k \bmod n}`, :math:`A_r = I`, :math:`B = 1`.
* ``hc``: these plus a dynamic part, computed from the streams before the sublayer, for each stream i

  .. math:: \alpha_i = s_\alpha \tanh(\mathrm{norm}(H_i) W_\alpha) + A_i, \qquad
            \beta_i = s_\beta \tanh(\mathrm{norm}(H_i) W_\beta) + B_i

  with :math:`W = 0` and both scales .01 at the start, all of them learned. Per sublayer that is
  n (n + 2) + D (n + 2) + 2 parameters and those of the norm.

**At the start** every stream is PreNorm's running sum, so the inputs of all sublayers are PreNorm's and the
trunk's output is n times PreNorm's. The model's final norm takes the factor n off again, up to its
epsilon: it adds ``norm_eps`` to :math:`n^2` times the mean square. With ``merge=mean`` nothing differs.

Identical streams do not stay identical, although nothing has told them apart yet: sublayer k reads stream
k mod n alone, so its :math:`A_m`, and with it the gradient of each :math:`A_r` and B, differs per stream.

**Where others differ.** The paper writes norm(H); its listing is a LayerNorm with weight and bias, which
``norm=layer`` (default) is. The hyper-connections package and the restatement in the mHC report
(arXiv 2512.24880, Eq. 5) use RMSNorm with a learned weight: ``norm=rms``. The package also leaves the tanh to
choice (``tanh``), and draws the first stream of a connection at random where no layer index is
given; here it is always k mod n. Some merge by the mean (``merge``). The paper decays the dynamic part
and not the static one, and so does the optimiser here.

**Here.** Site l stands behind sublayer l and reads for the next: it owns the A and B of sublayer k = l, and
the connection those of sublayer 0. In ``hc`` the coefficients are computed when the streams are, and
travel in the state to the write that uses them. In ``hc-static`` no token changes them, so each
parameter is owned where it is used: :math:`A_r` and B of sublayer l - 1 behind it, :math:`A_m` of the next.
The last site reads the sum of the streams and has no matrix for it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops import hyper
from .base import Gates, Residual, Scaling, Site, State, write_nothing
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig

Merge = Literal["sum", "mean"]


def copies(x: Tensor, n: int) -> Tensor:
    """``[..., D] -> [..., n, D]``, every stream the same."""
    return x.unsqueeze(-2).repeat(*(1,) * (x.dim() - 1), n, 1)


def mixed(streams: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i H_i`` by broadcasting: ``[..., n, W], [..., n] -> [..., W]``."""
    return (weights.unsqueeze(-1) * streams).sum(-2)


def scaling_of_copies(n: int, merge: Merge, sublayers: int) -> Scaling:
    """Where every stream is PreNorm's sum: what is left to scale is how they merge."""
    return Scaling(1.0, (1.0,) * (sublayers - 1) + (1.0 if merge == "mean" else 1 / n,))


class Coefficients(nn.Module):
    """What computes the coefficients of one sublayer: ``family`` does, from ``values()``.

    Their layout, ``C [n + 2, n]``, is said in :mod:`depthmix.ops.hyper`.
    """

    family: hyper.HyperDynamic | hyper.Manifold
    decayed: tuple[str, ...] = ()
    """Parameters with weight decay."""

    @abstractmethod
    def values(self) -> tuple[Tensor | None, ...]:
        """The parameters in the order ``family`` takes them."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set the parameters to where training starts."""

    def start_as_prenorm(self) -> None:
        """Set the parameters so that n equal streams stay equal, and PreNorm's."""
        self.reset_parameters()

    def reference(self, streams: Tensor) -> Tensor:
        """``C [..., n + 2, n]`` of ``streams [..., n, D]``, in the compute dtype."""
        return self.family.reference(streams, *self.values())


class HyperSite(Site):
    """Writes with the coefficients in the state, computes those of the next sublayer, and reads with them.

    State: ``(H [B, T, n, D], C [B, T, n + 2, n])``; behind the last sublayer ``(H,)``.
    """

    gate_names = (None, "gate", "pool")
    gate_range = (-1.0, 3.0)
    received = ("following",)

    def __init__(self, following: Coefficients | None, merge: Merge):
        super().__init__()
        self.following, self.merge = following, merge

    def write(self, layer_output: Tensor, state: State) -> State:
        if self.following is None:
            return (hyper.write(layer_output, *state),)
        return self.forward(layer_output, state)[1]

    def read(self, state: State) -> Tensor:
        if self.following is None:
            return hyper.merge(state[0], self.merge)
        return hyper.read(state[0], state[1][..., -1, :])

    def send(self, layer_output: Tensor, state: State) -> State:
        return (hyper.write(layer_output, *state),)

    def receive(self, crossed: State) -> tuple[Tensor, State]:
        following = self.following
        if following is None:
            return super().receive(crossed)
        (streams,) = crossed
        h, coefficients = hyper.begin(streams, following.family, following.values())
        return h, (streams, coefficients)

    def forward(self, layer_output: Tensor, state: State) -> tuple[Tensor, State]:
        following = self.following
        if following is None:
            state = self.write(layer_output, state)
            return self.read(state), state
        streams, coefficients = state
        h, streams, coefficients = hyper.step(
            layer_output, streams, coefficients, following.family, following.values()
        )
        return h, (streams, coefficients)

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        """``A_r [B, T, n, n]`` and ``B [B, T, n]`` of the write, ``A_m [B, T, n]`` of the read."""
        streams, coefficients = state
        carry, depth = coefficients[..., :-2, :], coefficients[..., -2, :]
        if self.following is None:
            return carry, depth
        new = hyper.mix_reference(layer_output, streams, carry, depth)
        return carry, depth, self.following.reference(new)[..., -1, :]

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        carry, depth = gates[:2]
        streams = carry.mT @ state[0] + depth.unsqueeze(-1) * layer_output.unsqueeze(-2)
        if self.following is None:
            return hyper.merge(streams, self.merge), (streams,)
        return mixed(streams, gates[2]), (streams,)

    def streams(self, state: State) -> tuple[Tensor, ...] | None:
        return state[0].unbind(-2)

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        # Behind the last sublayer there are no parameters.
        return "adamw_no_decay" if self.following is None else decayed_group(self.following, name)


def decayed_group(coefficients: Coefficients, name: str) -> str:
    """Projections decay; what is static, and every scale and norm, does not."""
    return "adamw" if name.split(".")[-1] in coefficients.decayed else "adamw_no_decay"


class HyperResidual(Residual):
    """n copies at the beginning, a :class:`HyperSite` behind every sublayer; ``coefficients`` makes the rest."""

    not_prenorm = None

    def __init__(self, config: "GPTConfig", options: Any):
        super().__init__(config)
        self.d_model, self.n_streams, self.eps = config.d_model, config.n_streams, config.norm_eps
        self.n_sublayers, self.options = config.n_sublayers, options
        self.first = self.coefficients(0)

    def coefficients(self, sublayer: int) -> Coefficients:
        """Those of sublayer ``sublayer``, counted from 0."""
        raise NotImplementedError

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        streams = copies(x, self.n_streams)
        h, coefficients = hyper.begin(streams, self.first.family, self.first.values())
        return h, (streams, coefficients)

    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        for coefficients in (self.first, *(site.following for site in sites[:-1])):
            coefficients.start_as_prenorm()
        return scaling_of_copies(self.n_streams, self.options.merge, len(sites))

    def begin_gates(self, x: Tensor) -> Gates:
        return (self.first.reference(copies(x, self.n_streams))[..., -1, :],)

    def begin_mix(self, x: Tensor, gates: Gates) -> tuple[Tensor, State]:
        streams = copies(x, self.n_streams)
        return mixed(streams, gates[0]), (streams,)

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        return write_nothing(sites, state, state[0][..., 0, :])

    def site(self, index: int) -> Site:
        last = index == self.n_sublayers
        return HyperSite(None if last else self.coefficients(index), self.options.merge)

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        return decayed_group(self.first, name)


# --- static -----------------------------------------------------------------------------------


def identity_init(n: int, sublayer: int, like: Tensor) -> Tensor:
    """``[A_m | A_r | B] = [e_(k mod n) | I | 1]``, ``[n, n + 2]``."""
    start = torch.zeros(n, n + 2, dtype=like.dtype, device=like.device)
    start[sublayer % n, 0] = 1
    start[:, 1 : n + 1].fill_diagonal_(1)
    start[:, n + 1] = 1
    return start


class StaticSite(Site):
    """``A_r [n, n]`` and ``B [n]`` of the sublayer before; ``A_m [n]`` of the next, if there is one.

    State: ``(H [B, T, n, D],)``.
    """

    gate_names = (None, "gate", "pool")
    gate_range = (-1.0, 3.0)
    received = ("width",)

    def __init__(self, n_streams: int, index: int, last: bool, merge: Merge):
        super().__init__()
        self.index, self.last, self.merge = index, last, merge
        self.carry = nn.Parameter(torch.empty(n_streams, n_streams))
        self.depth = nn.Parameter(torch.empty(n_streams))
        self.width = None if last else nn.Parameter(torch.empty(n_streams))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = len(self.depth)
        start = identity_init(n, self.index, self.carry)
        self.carry.copy_(start[:, 1 : n + 1])
        self.depth.copy_(start[:, n + 1])
        if self.width is not None:
            self.width.copy_(start[:, 0])

    def _weights(self, like: Tensor) -> Tensor:
        width = self.width
        if width is not None:
            return width
        n = len(self.depth)
        return torch.full(
            (n,), 1 / n if self.merge == "mean" else 1.0, dtype=self.depth.dtype, device=like.device
        )

    def write(self, layer_output: Tensor, state: State) -> State:
        return self.forward(layer_output, state)[1]

    def send(self, layer_output: Tensor, state: State) -> State:
        dtype = hyper.compute_dtype(state[0].dtype)
        mixed = hyper.mix_reference(layer_output, state[0], self.carry.to(dtype), self.depth.to(dtype))
        return (mixed,)

    def read(self, state: State) -> Tensor:
        return hyper.read(state[0], self._weights(state[0]).expand(state[0].shape[:-1]))

    def forward(self, layer_output: Tensor, state: State) -> tuple[Tensor, State]:
        h, streams = hyper.static_step(
            layer_output, state[0], self.carry, self.depth, self._weights(state[0])
        )
        return h, (streams,)

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        """``A_r [B, T, n, n]``, ``B [B, T, n]`` and the read's weights ``[B, T, n]``: the same for every token."""
        streams = state[0]
        dtype = hyper.compute_dtype(streams.dtype)
        parts = self.carry, self.depth, self._weights(streams)
        return tuple(part.to(dtype).expand(*streams.shape[:-2], *part.shape) for part in parts)

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        carry, depth, weights = gates
        streams = carry.mT @ state[0] + depth.unsqueeze(-1) * layer_output.unsqueeze(-2)
        return mixed(streams, weights), (streams,)

    def streams(self, state: State) -> tuple[Tensor, ...] | None:
        return state[0].unbind(-2)

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        return "adamw_no_decay"


@dataclass(frozen=True)
class StaticOptions:
    """Options of ``hc-static``."""

    merge: Merge = "sum"
    """How the streams become the trunk's output: sum (paper) or mean."""


@register("hc-static", "n streams mixed by learned matrices", options=StaticOptions, fields=("n_streams",))
class StaticHyperConnections(Residual):
    not_prenorm = None

    def __init__(self, config: "GPTConfig", options: Any):
        super().__init__(config)
        self.n_streams, self.n_sublayers, self.options = config.n_streams, config.n_sublayers, options
        self.width = nn.Parameter(torch.empty(config.n_streams))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.width.copy_(identity_init(self.n_streams, 0, self.width)[:, 0])

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        streams = copies(x, self.n_streams)
        return hyper.read(streams, self.width.expand(streams.shape[:-1])), (streams,)

    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        for module in (self, *sites):
            module.reset_parameters()
        return scaling_of_copies(self.n_streams, self.options.merge, len(sites))

    def begin_gates(self, x: Tensor) -> Gates:
        dtype = hyper.compute_dtype(x.dtype)
        return (self.width.to(dtype).expand(*x.shape[:-1], self.n_streams),)

    def begin_mix(self, x: Tensor, gates: Gates) -> tuple[Tensor, State]:
        streams = copies(x, self.n_streams)
        return mixed(streams, gates[0]), (streams,)

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        return write_nothing(sites, state, state[0][..., 0, :])

    def site(self, index: int) -> Site:
        return StaticSite(self.n_streams, index, index == self.n_sublayers, self.options.merge)

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        return "adamw_no_decay"


# --- dynamic ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DynamicOptions:
    """Options of ``hc``."""

    norm: Literal["layer", "rms"] = "layer"
    """Norm in front of the dynamic part: LayerNorm with weight and bias (paper) or RMSNorm with weight."""
    tanh: bool = True
    """Whether the dynamic part is bounded by a tanh."""
    dynamic_scale: float = 0.01
    """Initial value of both learned scales of the dynamic part."""
    merge: Merge = "sum"
    """How the streams become the trunk's output: sum (paper) or mean."""

    def __post_init__(self) -> None:
        if self.dynamic_scale == 0:
            raise UserError(
                "residual hc: dynamic_scale must not be 0, got 0: projections and scales would both stay zero "
                "for ever. Use hc-static for no dynamic part"
            )


class DynamicCoefficients(Coefficients):
    """A, B and the dynamic part of one sublayer; parameters as :class:`depthmix.ops.hyper.HyperDynamic` says."""

    decayed = ("projection",)

    def __init__(self, d_model: int, n_streams: int, sublayer: int, options: DynamicOptions, eps: float):
        super().__init__()
        self.sublayer, self.options = sublayer, options
        self.family = hyper.HyperDynamic(n_streams, options.norm, options.tanh, eps)
        self.projection = nn.Parameter(torch.empty(d_model, n_streams + 2))
        self.static = nn.Parameter(torch.empty(n_streams, n_streams + 2))
        self.scale = nn.Parameter(torch.empty(2))
        self.norm_weight = nn.Parameter(torch.empty(d_model))
        self.norm_bias = nn.Parameter(torch.empty(d_model)) if options.norm == "layer" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.projection.zero_()
        self.static.copy_(identity_init(len(self.static), self.sublayer, self.static))
        self.scale.fill_(self.options.dynamic_scale)
        self.norm_weight.fill_(1.0)
        if self.norm_bias is not None:
            self.norm_bias.zero_()

    def values(self):
        return self.projection, self.static, self.scale, self.norm_weight, self.norm_bias


@register(
    "hc",
    "n streams mixed by matrices that the streams themselves correct",
    options=DynamicOptions,
    fields=("n_streams",),
)
class HyperConnections(HyperResidual):
    def coefficients(self, sublayer):
        return DynamicCoefficients(self.d_model, self.n_streams, sublayer, self.options, self.eps)
