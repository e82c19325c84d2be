r"""Mixture-of-Depths Attention (Zhu et al. 2026, arXiv 2603.15619): attention that also reads depth.

The residual stream is PreNorm's. What an attention reads besides its own sequence is its *depth
memory*: at the same token, keys and values of every earlier sublayer. With the query :math:`q_t` of one
head, in one softmax (Algorithm 1):

.. math::
    o_t = \mathrm{softmax}\big( \tfrac{1}{\sqrt d} [\, q_t \cdot k_u \,]_{u \le t} \,\Vert\,
          \tfrac{1}{\sqrt d} [\, q_t \cdot \kappa_{i,t} \,]_{i < l} \big)
          \, \big[ [\, v_u \,]_{u \le t} \,\Vert\, [\, \nu_{i,t} \,]_{i < l} \big]

An attention hands down the keys and values it has for its own sequence; an MLP has none and hands down
:math:`[\kappa_i, \nu_i] = W_i x_i`, where :math:`x_i` is what its own matrices read, the normed input, and
:math:`W_i` is :math:`2D \times D`. This is the setting the paper calls its default (Table 3, row 4). Nothing
is handed down that nobody reads: not by the last attention, nor by the last MLP, which has no :math:`W`.

**Initial behaviour.** Depth weights compete with the sequence from the first step on. At the start all
scores are near zero, so an attention with S sources gives depth :math:`S / (S + t)` of the weight at token
t = 1, 2, ...: the model does not start equal to PreNorm. Only the first attention always is PreNorm's.

**Where public code disagrees.**

- *Rotation.* The authors' language model rotates the query by its position and stores depth keys not
  rotated, so that a depth score depends on where in the sequence the token stands. A rotary score depends on
  the distance alone, which is 0 here: with query and key turned by the same angle,
  :math:`(R_t q) \cdot (R_t \kappa) = q \cdot \kappa`. So we score depth with query and key both not rotated.
- *What an MLP projects.* The authors' blocks are post-norm, where "the FFN's input" is normed; a pre-norm
  block's counterpart is the normed input. (Their pre-norm vision model hands down attentions' keys and values
  alone.) The package moda-attention projects the stream *behind* the MLP, and gives every attention a second
  pair of projections for depth (Table 3, row 5: hardly better, and dearer); its models also let layers that
  have not run yet take weight (``tests/peers/test_moda_attention.py``).
- *The own key.* All agree: a sublayer's own key and value enter its own softmax once, as the sequence's.

The matrices :math:`W_i` start as normal(0, .02), as the key and value rows of an attention do, and like
those are Muon's.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..functional import extend_depth_memory
from .base import Residual, Site, State
from .prenorm import AddSite
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


class LastSite(AddSite):
    """Behind the last attention or the last MLP: adds; nobody reads the depth memory any more."""

    def depth_memory(self, state: State) -> tuple[Tensor, ...] | None:
        return state[1:]

    def passing(self, state: State) -> State:
        return ()

    def remember(self, shown: tuple[Any, ...], state: State) -> State:
        return state

    def send(self, layer_output: Tensor, state: State) -> State:
        """Keys and values, oldest first, then x: the memory's token is for gradients inside of one process."""
        x, *memory = self.write(layer_output, state)
        return (*memory[1:], x)

    def receive(self, crossed: State) -> tuple[Tensor, State]:
        *sources, x = crossed
        memory: tuple[Tensor, ...] = ()
        for key, value in zip(sources[::2], sources[1::2], strict=True):
            memory = extend_depth_memory(memory, key, value)
        return x, (x, *memory)


class AttentionSite(LastSite):
    """Behind an attention, whose own keys and values join the memory: state ``(x, *memory)``."""

    def passing(self, state: State) -> State:
        return state[1:]

    def remember(self, shown: tuple[Any, ...], state: State) -> State:
        memory, key, value = shown
        return (state[0], *extend_depth_memory(memory, key, value))


class MLPSite(AttentionSite):
    """Behind an MLP, whose input is projected to keys and values that join the memory."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        # Rows are ordered head by head, as an attention's.
        self.kv = nn.Linear(config.d_model, 2 * config.attention_width, bias=False)

    def remember(self, shown: tuple[Any, ...], state: State) -> State:
        (x,) = shown
        kv = self.kv(x).unflatten(-1, (-1, 2, self.head_dim))  # [B, T, H, 2, d]
        return (state[0], *extend_depth_memory(state[1:], *kv.transpose(1, 2).unbind(3)))

    def drawn_weights(self) -> tuple[nn.Parameter, ...]:
        return (self.kv.weight,)

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        return "muon"


@register("moda", "PreNorm whose attentions also read the keys and values of earlier sublayers")
class MixtureOfDepthsAttention(Residual):
    crosses_by_head = True
    not_wrapped = (
        "moda's attentions read keys and values of earlier sublayers inside their softmax, which a module that maps "
        "[*, D] to [*, D] has no place for. depthmix.GPT has such attentions"
    )
    not_prenorm = "depth takes part of the attention's weight from the first step on"
    not_linear = (
        "moda reads earlier layers through keys and values inside each attention: a sublayer's output depends "
        "on them beyond its input, so what earlier outputs contribute is not a linear mixture of outputs"
    )

    def __init__(self, config: "GPTConfig", options: Any = None):
        super().__init__(config)
        self.config = config

    def unchanged(self, earlier: int, later: int) -> int:
        return 2 * earlier  # every sublayer so far handed down a key and a value

    def site(self, index) -> Site:
        if index >= self.config.n_sublayers - 1:
            return LastSite()
        return AttentionSite() if index % 2 else MLPSite(self.config)
