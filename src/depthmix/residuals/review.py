r"""Review Residuals (Kramer 2026): a gate per channel that reads the state and the update it admits.

.. math::
    u = F(x), \qquad r = \sigma(W\,[\mathrm{rms}(x), \mathrm{rms}(u)] + c), \qquad
    x \leftarrow x + r \odot u

with ``W [D, 2D]`` (columns of x first) and ``c [D]`` for every sublayer, both zero at the start: r = .5.

``review-convex`` has the same gate and :math:`x \leftarrow (1 - r) \odot x + r \odot u`, of which the
paper reports that it does not train beyond about 20 sublayers and stalls near a loss of 6.0 at 40 and 48.
At r = .5 the gradient of the identity path is :math:`2^{-L}`; with ``bias=-3`` it starts at
:math:`.953^L`. So ``bias``, the initial c, tells a failure of the form from one of its initialisation.

Where the paper and its published script (SixSigmaEngineer/review-residuals, ``src/train.py``) differ or
leave a choice:

* the paper's equation has no c, the script has it, zero at the start: so have we;
* neither has weights in the gate's norms. In the script every norm of the model has one eps, 1e-5; here
  every norm has one eps too, ``norm_eps``, 1e-6 by default;
* the script's projections into the trunk start divided by :math:`\sqrt L`, as in every model here.

**What the gate costs.** :math:`L (2 D^2 + D)` parameters: :math:`4 D^2` a block beside the
:math:`12 D^2` of attention and MLP, and a third more matrix products in the trunk. The paper says about 7 % of
parameters. Its script's own dimensions (vocabulary 50257, 256 positions, biases everywhere, tied head)
give, in millions, with the totals of its own table of results:

=====  =====  =======  =======  =======  ===================  ===================
size   D      blocks   gates    total    gates / total        gates / the rest
=====  =====  =======  =======  =======  ===================  ===================
60 M   512    8        8.40     59.47    14.1 %               16.4 %
150 M  768    12       28.33    152.16   18.6 %               22.9 %
320 M  1024   16       67.14    320.37   21.0 %               26.5 %
590 M  1280   20       131.12   589.28   22.3 %               28.6 %
1 B    1536   24       226.57   984.04   23.0 %               29.9 %
=====  =====  =======  =======  =======  ===================  ===================

14 to 23 %: a comparison at equal parameters has to widen the others by that much.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Residual
from .highway import ChannelGates
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


@dataclass(frozen=True)
class ReviewOptions:
    """Options of ``review`` and ``review-convex``."""

    bias: float = 0.0
    """Initial bias c of every gate; 0 admits half of every update."""


@register(
    "review",
    "x <- x + r F(x), a gate per channel that reads x and F(x)",
    options=ReviewOptions,
)
def _review(config: "GPTConfig", options: Any) -> Residual:
    return ChannelGates(config, convex=False, see_update=True, normalise=True, bias=options.bias)


@register(
    "review-convex",
    "x <- (1 - r) x + r F(x), a gate per channel that reads x and F(x)",
    options=ReviewOptions,
)
def _review_convex(config: "GPTConfig", options: Any) -> Residual:
    return ChannelGates(config, convex=True, see_update=True, normalise=True, bias=options.bias)
