r"""PreNorm: :math:`x \leftarrow x + F(x)` with the norm inside F (Xiong et al. 2020).

The baseline. The state is the running sum alone, and every read returns it.
"""

from ..functional import add_rms_norm
from .base import Residual, Site
from .registry import register


class AddSite(Site):
    """State ``(x, whatever passes by)``."""

    fuses_norm = True

    def passing(self, state):
        """What follows x in the next state."""
        return state[1:]

    def write(self, layer_output, state):
        return (state[0] + layer_output, *self.passing(state))

    def read(self, state):
        return state[0]

    def forward(self, layer_output, state, norm=None):
        if norm is None:
            return super().forward(layer_output, state)
        h, x = add_rms_norm(state[0], layer_output, norm.weight, norm.eps)
        return h, (x, *self.passing(state))


@register("prenorm", "x <- x + F(x): the baseline")
class PreNorm(Residual):
    not_prenorm = None

    def site(self, index):
        return AddSite()
