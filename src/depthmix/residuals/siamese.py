r"""SiameseNorm: a post-norm and a pre-norm stream that share their sublayers (Li et al. 2026, arXiv 2602.08064).

Both streams start as the embedding, x = y = e. For every sublayer F, in block i counted from 0:

.. math::
    x \leftarrow N_{post}(x), \qquad z = F(N_{in}(x + N_{pre}(y))), \qquad
    x \leftarrow x + z / \sqrt{2 (i + 1)}, \qquad y \leftarrow y + z

and the trunk ends in :math:`N(N_x(x) + N_y(y))`. In all three published models (language, DeiT, DiT) i is
the block, and its attention and MLP share the scale, :math:`2 (i + 1)` being the number of sublayers
up to the end of the block.

* :math:`N_{in}` is the pre-norm that every F here holds, N at the end is the model's final norm.
* The published language model has no :math:`N_{in}` before its attention, whose queries, keys and values it
  norms instead (its "hybrid"); DeiT and DiT have it before both, and so have we.
* All norms are RMSNorm with a learned weight and the model's eps, as every norm here; DeiT and DiT have
  LayerNorm.

Behind sublayer l stand the two norms in front of sublayer l + 1; behind the last one, the two of the
end; the first two belong to no site. That makes 2 (L + 1) vectors ``[D]``, each of them read. State:
``(N_post(x), y)``.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import rms_norm
from .base import Residual, Site, State
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


class SiameseSite(Site):
    """Adds the update to both streams, norms x for good and y for the read.

    Parameters: ``post_weight [D]`` of the norm of x, ``pre_weight [D]`` of the norm of y; ones.
    """

    received = ("pre_weight",)

    def __init__(self, d_model: int, scale: float, eps: float):
        super().__init__()
        self.scale, self.eps = scale, eps
        self.post_weight = nn.Parameter(torch.empty(d_model))
        self.pre_weight = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.post_weight.fill_(1.0)
        self.pre_weight.fill_(1.0)

    def write(self, layer_output: Tensor, state: State) -> State:
        x, y = state
        z = layer_output.to(y.dtype)
        return rms_norm(torch.add(x, z, alpha=self.scale), self.post_weight, self.eps), y + z

    def read(self, state: State) -> Tensor:
        x, y = state
        return x + rms_norm(y, self.pre_weight, self.eps)

    def streams(self, state: State) -> tuple[Tensor, ...] | None:
        return state


@register("siamese", "a post-norm and a pre-norm stream that share every sublayer")
class SiameseNorm(Residual):
    counts_blocks = True
    not_prenorm = "its post-norm divides one of the two streams by its own size behind every sublayer"
    not_linear = (
        "a post-norm divides the x stream by its own size after every sublayer, so the inputs of sublayers are no "
        "linear mixture of the embedding and earlier outputs"
    )

    def __init__(self, config: "GPTConfig", options: Any = None):
        super().__init__(config)
        self.d_model, self.eps = config.d_model, config.norm_eps
        self.per_block = config.n_sublayers // config.n_layer
        self.post_weight = nn.Parameter(torch.empty(config.d_model))
        self.pre_weight = nn.Parameter(torch.empty(config.d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.post_weight.fill_(1.0)
        self.pre_weight.fill_(1.0)

    def begin(self, embedding: Tensor) -> tuple[Tensor, State]:
        x = rms_norm(embedding, self.post_weight, self.eps)
        return x + rms_norm(embedding, self.pre_weight, self.eps), (x, embedding)

    def site(self, index: int) -> Site:
        through = -(-index // self.per_block) * self.per_block  # sublayers up to the end of the block
        return SiameseSite(self.d_model, 1 / math.sqrt(through), self.eps)
