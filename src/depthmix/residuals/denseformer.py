r"""DenseFormer: a weighted average over depth after each block (Pagliardini et al. 2024, arXiv 2402.02622).

With :math:`X_0` the embedding and :math:`B_i` a whole block, attention and MLP with their own residual
additions,

.. math:: X_i = B_i(Y_{i-1}), \qquad Y_i = \sum_{j \le i} \alpha_{ij} X_j, \qquad Y_0 = X_0 ,

i = 1 .. N; the trunk's output is :math:`Y_N`. The weights are scalars, free in sign and sum; they start
one-hot on j = i, where DenseFormer is PreNorm to the last bit.

**Dilation k and period p** (a "k x p DenseFormer"): block i averages only over
:math:`j \equiv i \pmod k`, and only blocks with :math:`p \mid i` average at all; elsewhere
:math:`Y_i = X_i`. Both count blocks and every :math:`X_j` is a source, as in the paper and its package
``denseformer``. The authors' own training script counts otherwise: it makes p blocks one group, whose
output alone is a source, and dilates over groups. We follow the paper. A block i < k has one source,
itself, and one weight, a gain.

The weights of a block are one vector ``[i // k + 1]``, oldest source first, on the site behind its MLP;
the site behind its attention is a plain addition. A source is kept while a later block will read it,
once, and never copied.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.reference import compute_dtype
from ..ops.weighted_sum import total, weighted_sum
from .base import Gates, Residual, Scaling, Site, State
from .prenorm import AddSite
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


@dataclass(frozen=True)
class DenseFormerOptions:
    """Options of ``denseformer``."""

    dilation: int = 1
    """k: a block averages over every k-th block before it, counted back from itself."""
    period: int = 1
    """p: every p-th block averages."""

    def __post_init__(self) -> None:
        for name in ("dilation", "period"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"residual denseformer: {name} must be at least 1, got {value}")


class DepthAverageSite(Site):
    """The end of block i: its own addition, then the average.

    State before: ``(x, the kept sources ...)``; after: ``(Y_i, the sources still wanted ...)``, each
    ``[B, T, D]``.

    Args:
        n_sources: how many sources there are, :math:`X_i` being the last.
        read: positions, among the sources before and :math:`X_i` itself, that the average reads; ``None`` where the
            block does not average.
        keep: positions that a later block wants.
    """

    gate_names = ("pool",)
    received = ("depth_weight",)

    def __init__(self, n_sources: int, read: tuple[int, ...] | None, keep: tuple[int, ...]):
        super().__init__()
        self.n_sources = n_sources
        self.sources_read, self.sources_kept = read, keep
        self.depth_weight = None
        if read is not None:
            self.depth_weight = nn.Parameter(torch.empty(len(read)))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.depth_weight is not None:
            self.depth_weight.zero_()
            self.depth_weight[-1:].fill_(1.0)

    def _written(self, layer_output, state):
        x, *sources = state
        return [*sources, x + layer_output]

    def _averaged(self, sources):
        """The state, of ``sources`` by position; those that nobody wants need not be there."""
        x = sources[self.n_sources - 1] if self.sources_read is None else None
        if x is None:
            x = weighted_sum(self.depth_weight, [sources[j] for j in self.sources_read])
        return (x, *(sources[j] for j in self.sources_kept))

    def write(self, layer_output: Tensor, state: State) -> State:
        return self._averaged(self._written(layer_output, state))

    def read(self, state: State) -> Tensor:
        return state[0]

    def crossing(self) -> list[int]:
        """Positions of the sources that somebody behind this site reads."""
        read = (self.n_sources - 1,) if self.sources_read is None else self.sources_read
        return sorted({*read, *self.sources_kept})

    def send(self, layer_output: Tensor, state: State) -> State:
        """The sources alone: their average is taken behind the cut."""
        sources = self._written(layer_output, state)
        return tuple(sources[j] for j in self.crossing())

    def receive(self, crossed: State) -> tuple[Tensor, State]:
        state = self._averaged(dict(zip(self.crossing(), crossed, strict=True)))
        return state[0], state

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        if self.depth_weight is None:
            return ()
        weights = self.depth_weight.to(compute_dtype(state[0].dtype))
        return (weights.expand(*layer_output.shape[:-1], -1),)

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        x, *sources = state
        x = x + layer_output
        sources.append(x)
        if self.sources_read is not None:
            (weights,) = gates
            terms = [weights[..., m, None] * sources[j] for m, j in enumerate(self.sources_read)]
            x = total(terms).to(x.dtype)
        return x, (x, *(sources[j] for j in self.sources_kept))


@register(
    "denseformer",
    "after each block a learned weighted average of all block outputs",
    options=DenseFormerOptions,
)
class DenseFormer(Residual):
    counts_blocks = True
    not_prenorm = None

    def __init__(self, config: "GPTConfig", options: Any):
        super().__init__(config)
        self.per_block = config.n_sublayers // config.n_layer
        self.n_layer, self.dilation, self.period = config.n_layer, options.dilation, options.period
        last = self.n_layer // self.period * self.period
        if last < self.dilation:
            raise UserError(
                f"residual denseformer: with dilation = {self.dilation} and period = {self.period} none of "
                f"{self.n_layer} blocks averages over an earlier one. Use a period of at most {self.n_layer} and a "
                f"dilation of at most the last multiple of it within {self.n_layer} blocks"
            )

    def _wanted(self, block: int) -> list[int]:
        """Which of :math:`X_0 .. X_{block}` the averages behind later blocks read, in order."""
        later = range(block + 1, self.n_layer + 1)
        phases = {i % self.dilation for i in later if i % self.period == 0}
        return [j for j in range(block + 1) if j % self.dilation in phases]

    def _sources(self, block: int) -> list[int]:
        """The blocks whose outputs are at hand behind ``block``'s addition."""
        return [*self._wanted(block - 1), block]

    def unchanged(self, earlier: int, later: int) -> int:
        if earlier % self.per_block or later % self.per_block:
            return 0
        first, second = (
            [self._sources(block)[j] for j in self._average(block).crossing()]
            for block in (earlier // self.per_block, later // self.per_block)
        )
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return len(list(same))

    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        for site in sites:
            if isinstance(site, DepthAverageSite):
                site.reset_parameters()
        return super().start_as_prenorm(sites)

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        return x, (x, x) if self._wanted(0) else (x,)

    def site(self, index: int) -> Site:
        block, inside = divmod(index, self.per_block)
        return AddSite() if inside else self._average(block)

    def _average(self, block: int) -> DepthAverageSite:
        """The site at the end of ``block``."""
        sources = self._sources(block)
        read = None
        if block % self.period == 0:
            read = tuple(m for m, j in enumerate(sources) if j % self.dilation == block % self.dilation)
        return DepthAverageSite(len(sources), read, tuple(sources.index(j) for j in self._wanted(block)))
