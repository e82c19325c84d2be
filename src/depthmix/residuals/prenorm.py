r"""PreNorm: :math:`x \leftarrow x + F(x)` with the norm inside F (Xiong et al. 2020).

The baseline. The state is the running sum alone, and every read returns it.
"""

from typing import Any

from torch import Tensor

from ..functional import add_rms_norm
from .base import Residual, Site, State
from .registry import register


class AddSite(Site):
    """State ``(x, whatever passes by)``."""

    fuses_norm = True

    def passing(self, state: State) -> State:
        """What follows x in the next state."""
        return state[1:]

    def write(self, layer_output: Tensor, state: State) -> State:
        return (state[0] + layer_output, *self.passing(state))

    def read(self, state: State) -> Tensor:
        return state[0]

    def forward(self, layer_output: Tensor, state: State, norm: Any = None) -> tuple[Tensor, State]:
        if norm is None:
            return super().forward(layer_output, state)
        h, x = add_rms_norm(state[0], layer_output, norm.weight, norm.eps)
        return h, (x, *self.passing(state))


@register("prenorm", "x <- x + F(x): the baseline")
class PreNorm(Residual):
    not_prenorm = None

    def site(self, index: int) -> Site:
        return AddSite()
