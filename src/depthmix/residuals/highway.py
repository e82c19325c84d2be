r"""Highway connections (Srivastava, Greff and Schmidhuber 2015, arXiv 1505.00387): a gate that reads the state.

``highway`` is the convex form of the paper, carry gate :math:`1 - T`, for every sublayer:

.. math:: g = \sigma(W\, \mathrm{rms}(x) + b), \qquad x \leftarrow (1 - g) \odot x + g \odot F(x)

with ``W [D, D]`` and ``b [D]``. What the paper has for its plain feed-forward layers is fitted to a
transformer's sublayers as follows.

* The gate reads :math:`\mathrm{rms}(x)`, the paper's reads x itself. Here F holds a pre-norm and does not
  see the size of the stream; nor should its gate rest or saturate with it.
* W starts at zero, so that every gate starts at :math:`\sigma(b)` whatever the input. The paper draws it.
* The paper starts b negative (-1, -3), so that a deep network begins by carrying. Here b follows the
  rule that scales the bias of Multi-Gate Residuals, Eq. 14 for a single sigmoid gate:
  :math:`b = -b_{init}(M, 1) = -\ln(\sqrt{M / 21}\,(e^3 + 1) - 1)`, which is -3 at M = 21 and close to
  :math:`-\tfrac12 \ln M - 1.5`. M = L: without a ramp every sublayer blends. ``bias`` sets b itself.

``highway-additive`` is what the Review Residuals paper (:mod:`depthmix.residuals.review`) calls Highway
and compares itself with at equal parameters:

.. math:: x \leftarrow x + \sigma(W x + b) \odot F(x)

on the raw state, with the identity kept. It starts at a gate of .5: W = b = 0. That paper's script has
b = 0 too but draws W from normal(0, .02). ``init="normal"`` does so, from a generator of each sublayer's
own: the model's generator must give the same sublayers whatever the connection. That draw depends on the
index of the sublayer alone, not on the model's seed.

The convex form is bounded: a channel of x stays between its old value and the update's. The price is
the gradient of the identity path, :math:`\prod (1 - g)`.

The trunk's output is x. The gates' matrices are AdamW's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..ops.channel_gate import admit, channel_gate, gated_update
from ..ops.reference import compute_dtype
from .base import Gates, Residual, Scaling, Site, State
from .mgr import gate_bias_init
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


class ChannelGateSite(Site):
    """``x <- x + g u`` or ``(1 - g) x + g u``; state ``(x [B, T, D],)``, read as it is.

    Args:
        d_model: D.
        convex: the second form.
        see_update: the gate also reads the update; its matrix is ``[D, 2D]`` then.
        normalise: the gate reads ``rms`` of what it sees.
        bias: every entry of the initial ``gate_bias``.
        eps: added to the mean square inside ``rms``.
        draw: seed of an initial ``gate_weight`` from normal(0, .02); ``None`` starts at zero.

    Parameters: ``gate_weight [D, D]`` or ``[D, 2D]``, ``gate_bias [D]``.
    """

    per_channel = True
    gate_names = ("gate",)

    def __init__(
        self,
        d_model: int,
        *,
        convex: bool,
        see_update: bool,
        normalise: bool,
        bias: float,
        eps: float,
        draw: int | None = None,
    ):
        super().__init__()
        self.convex, self.normalise, self.eps = convex, normalise, eps
        self.bias, self.draw = bias, draw
        self.gate_weight = nn.Parameter(torch.empty(d_model, d_model * (1 + see_update)))
        self.gate_bias = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.gate_bias.fill_(self.bias)
        if self.draw is None:
            self.gate_weight.zero_()
        else:
            generator = torch.Generator().manual_seed(self.draw)
            drawn = torch.empty(self.gate_weight.shape, dtype=torch.float32, device="cpu")
            self.gate_weight.copy_(drawn.normal_(0.0, 0.02, generator=generator))

    def write(self, layer_output: Tensor, state: State) -> State:
        (x,) = state
        return (
            gated_update(
                x, layer_output, self.gate_weight, self.gate_bias,
                convex=self.convex, normalise=self.normalise, eps=self.eps,
            ),
        )  # fmt: skip

    def read(self, state: State) -> Tensor:
        return state[0]

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        return (
            channel_gate(state[0], layer_output, self.gate_weight, self.gate_bias, self.normalise, self.eps),
        )

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        dtype = compute_dtype(state[0].dtype)
        x = admit(state[0].to(dtype), layer_output.to(dtype), gates[0], self.convex).to(state[0].dtype)
        return x, (x,)


class ChannelGates(Residual):
    """The same gate behind every sublayer; ``draw`` draws each from its own index."""

    not_prenorm = None

    def __init__(
        self,
        config,
        *,
        convex: bool,
        see_update: bool,
        normalise: bool,
        bias: float,
        draw: bool = False,
    ):
        super().__init__(config)
        self.d_model, self.draw = config.d_model, draw
        self.bias = bias
        self.keywords = dict(
            convex=convex, see_update=see_update, normalise=normalise, bias=bias, eps=config.norm_eps
        )

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        return state  # as with a shut gate

    @torch.no_grad()
    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        """Convex: gates of 1 / (l + 1), so that x is the mean of embedding and outputs. Else gates of one half."""
        for index, site in enumerate(sites, start=1):
            site.gate_weight.zero_()
            site.gate_bias.fill_(-math.log(index) if self.keywords["convex"] else 0.0)
        if not self.keywords["convex"]:
            return Scaling(2.0, (1.0,) * len(sites))
        return Scaling(1.0, tuple(float(index + 1) for index in range(1, len(sites) + 1)))

    def site(self, index: int) -> Site:
        return ChannelGateSite(self.d_model, **self.keywords, draw=index if self.draw else None)


@dataclass(frozen=True)
class HighwayOptions:
    """Options of ``highway``."""

    bias: float | None = None
    """Initial bias of every gate; none scales it with depth: -3 at 21 sublayers, lower beyond."""


@register(
    "highway",
    "x <- (1 - g) x + g F(x), a gate per channel that reads x",
    options=HighwayOptions,
    fields=("gate_base_depth", "gate_base_bias"),
)
def _highway(config: "GPTConfig", options: Any) -> Residual:
    bias = options.bias
    if bias is None:
        bias = -gate_bias_init(
            config.n_sublayers, 1, base_depth=config.gate_base_depth, base_bias=config.gate_base_bias
        )
    return ChannelGates(config, convex=True, see_update=False, normalise=True, bias=bias)


@dataclass(frozen=True)
class AdditiveHighwayOptions:
    """Options of ``highway-additive``."""

    bias: float = 0.0
    """Initial bias of every gate; 0 admits half of every update."""
    init: Literal["zero", "normal"] = "zero"
    """Initial gate matrix: zero, or normal(0, .02) drawn from the index of the sublayer."""


@register(
    "highway-additive",
    "x <- x + g F(x), a gate per channel that reads the raw x",
    options=AdditiveHighwayOptions,
)
def _additive(config: "GPTConfig", options: Any) -> Residual:
    return ChannelGates(
        config,
        convex=False,
        see_update=False,
        normalise=False,
        bias=options.bias,
        draw=options.init == "normal",
    )
