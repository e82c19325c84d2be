r"""Attention Residuals (Kimi Team 2026, arXiv 2603.15031): each sublayer attends over what was written before it.

**Full** (``attnres``, section 3.1). Sources are the embedding :math:`v_0` and the single outputs
:math:`v_i = y_i`. The input of sublayer l, and in the end the trunk's output, is

.. math::
    h = \sum_i \alpha_i v_i, \qquad \alpha = \mathrm{softmax}_i\bigl(w \cdot (\mathrm{rms}(v_i)\, \gamma)\bigr)

with a query :math:`w` and a key norm weight :math:`\gamma` of its own, in :math:`R^D`. w = 0 at the start
(section 5): the mean of the sources, which is PreNorm's state over their number, and a following norm removes that
factor. The first sublayer has one source, h is the embedding, and there is nothing to learn.

**Block** (``attnres-block``, section 3.2). The L sublayers (an attention and an MLP count one each) are divided
into N blocks. Sources are the embedding, the sums of the finished blocks and the running sum of the current
one; behind the last sublayer of a block its running sum is the finished sum, so that it is never a source twice.
N = L is the full form, N = 1 a residual connection with the embedding apart.

Where public versions disagree, and what is done here:

====================  ====================================================================================
scale of the logits   none. Some divide by sqrt(D); the report (Eq. 2, Fig. 2) does not.
recency bias          none. Some add one to the newest source's logit; not in the report.
sources               single outputs (full). Some attend over running sums, which are other vectors.
first sublayer        the embedding itself (section 3.2). Some mix there, over one source: the same value, and
                      parameters that never get a gradient.
trunk's output        one more mix (section 3.2). Some sum all sources.
key norm              RMSNorm with a weight (section 5 counts one per layer), ``key_norm="learned"``; some have
                      none, ``key_norm="plain"``. Either has the same functions, since only the product of w and
                      gamma enters; they train differently.
eps                   ``GPTConfig.norm_eps``, 1e-6, inside the mean square. Others: the dtype's machine epsilon
                      (2^-23 for fp32), torch's default.
block                 sublayers, as in the report. Some count whole transformer blocks.
L not N blocks of S   given N, exactly N blocks whose sizes differ by one at most, larger first (S = ceil(L / N) with a
                      shorter last block, as the report words it, can give fewer than N); given S, a
                      shorter last block. Equal where it divides.
====================  ====================================================================================

**Two phases** (section 4). Queries are parameters, so a *group* of readers that follow each other meets the sources
finished before it at once (:func:`depthmix.functional.source_pool_many`, each source read once for all of them),
and each reader then adds the sources begun since to its own softmax. A group is one block or several whole ones:
the running sums are its fresh sources. The first writer of a group computes the means of all its readers, so it needs
the queries of sites in other transformer blocks, whose parameters may be sharded away by then:
:meth:`Residual.foresee` puts all queries, L times D numbers, into the state, through which their gradients go back.

Group size: with k sources finished, a group of m blocks of S sublayers moves, in units of [N, D] forwards and
backwards (a source's gradient is written, then added to the one it already has: 4), about 6k for the finished
sources, 3 S m (m + 1) for fresh ones and 7 S m for means and mixtures. Over all L / (S m) groups that is least at
m = sqrt(blocks / S): 6 sublayers of 32 in the full form, 3 L^2 / m instead of 3 L^2 for the finished sources, and one
block of the block form with 8.

**Memory.** A source is kept once, however many sublayers read it, and running sums are added up once. Over PreNorm
the backward pass keeps one [N, D] tensor per sublayer (its output, or the running sum it ends in; the mixture h is
what PreNorm's sublayer also keeps as the input of its norm) and one number per token of every read. The means live
from the first write of their group to their read, one [N, D] in fp32 for each reader ahead, and are not kept; where
blocks are checkpointed, those that cross from one to the next are.

**Precision.** Sources have the dtype of the embedding's output; scores, softmax and mean are fp32. In bf16 and fp16 the
gradient takes h as it was rounded (:mod:`depthmix.ops.pool`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import UserError
from ..ops import reference
from ..ops.weighted_sum import total
from .base import Gates, Residual, Scaling, Site, State
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig


class SourceSite(Site):
    """Writes a source, or adds to the newest, then mixes all of them.

    State: k sources ``[B, T, D]``. After :meth:`AttentionResiduals.foresee` also, for this reader and those behind it
    in its group, the mean of the finished sources ``[B, T, D]`` and its log-sum-exp ``[B, T]``, in the compute dtype;
    then the queries ``[R, D]`` of the R readers of later groups. A state of sources alone is accepted everywhere, one
    of fewer sources too (:meth:`AttentionResiduals.without`).

    Args:
        n_sources: k before the write.
        new_source: whether the output is a source of its own; otherwise it is added to the last.
        key_norm: ``"learned"`` or ``"plain"``.
        n_finished: sources before the group's first write, which no reader of the group sees changed.
        group: readers from this one to the last of its group, if this is the first; else 0.
    """

    gate_names = ("pool",)
    received = ("query", "key_norm_weight")

    def __init__(
        self,
        d_model: int,
        n_sources: int,
        new_source: bool,
        key_norm: str,
        eps: float,
        n_finished: int,
        group: int,
    ):
        super().__init__()
        self.n_sources, self.new_source, self.eps = n_sources, new_source, eps
        self.n_finished, self.group = n_finished, group
        self.query = nn.Parameter(torch.empty(d_model))
        self.key_norm_weight = nn.Parameter(torch.empty(d_model)) if key_norm == "learned" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.query.zero_()
        if self.key_norm_weight is not None:
            self.key_norm_weight.fill_(1.0)

    def extra_repr(self) -> str:
        return f"n_sources={self.n_sources}, new_source={self.new_source}"

    def scoring_query(self, dtype: torch.dtype) -> Tensor:
        """``w * gamma [D]``: ``w . (rms(v) gamma) = (w gamma) . rms(v)``, and no source is scaled for it."""
        dtype = reference.compute_dtype(dtype)
        query = self.query.to(dtype)
        return query if self.key_norm_weight is None else query * self.key_norm_weight.to(dtype)

    def _written(self, layer_output: Tensor, sources: State) -> State:
        """The sources after the write, given those before it."""
        layer_output = layer_output.to(sources[0].dtype)
        if self.new_source:
            return (*sources, layer_output)
        return (*sources[:-1], self._added(sources[-1], layer_output))

    @staticmethod
    def _added(running: Tensor | None, layer_output: Tensor) -> Tensor:
        return layer_output if running is None else running + layer_output

    def write(self, layer_output: Tensor, state: State) -> State:
        sources, foreseen = state[: self.n_sources], state[self.n_sources :]
        written = self._written(layer_output, sources)
        if not foreseen:
            return written
        made, queries = foreseen[:-1], foreseen[-1]
        if self.group:
            # Behind the last of them there may be a cut.
            readers = min(self.group, len(queries))
            mine, queries = queries.split([readers, len(queries) - readers])
            means, lses = functional.source_pool_many(sources, mine, scale=1.0, eps=self.eps)
        else:  # what the reader before this one has read
            means, lses = made[1 : len(made) // 2], made[len(made) // 2 + 1 :]
        return (*written, *means, *lses, queries)

    def read(self, state: State) -> Tensor:
        n_sources = self.n_sources + self.new_source
        sources, made = state[:n_sources], state[n_sources:-1]
        query = self.scoring_query(sources[0].dtype)
        if not made:
            return functional.source_pool(self._begun(sources), query, scale=1.0, eps=self.eps)
        carried = made[0], made[len(made) // 2]
        return functional.source_pool(
            sources[self.n_finished :], query, scale=1.0, eps=self.eps, carried=carried
        )

    @staticmethod
    def _begun(sources: Sequence[Tensor | None]) -> list[Tensor]:
        return [v for v in sources if v is not None]

    def send(self, layer_output: Tensor, state: State) -> State:
        """The sources alone: what was foreseen is for readers in front of the cut."""
        return self._written(layer_output, state[: self.n_sources])

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        written = torch.stack(self._written(layer_output, state[: self.n_sources]), -2)
        return (reference.pool_weights(written, self.scoring_query(written.dtype), 1.0, self.eps),)

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        written = self._written(layer_output, state[: self.n_sources])
        (alpha,) = gates
        return total([alpha[..., i, None] * v for i, v in enumerate(written)]), written


class AttentionResiduals(Residual):
    """Sublayer l starts a new source where ``starts[l - 1]`` is true, and adds to the newest elsewhere."""

    not_prenorm = None

    def __init__(self, config, starts: list[bool], key_norm: str):
        super().__init__(config)
        self.d_model, self.eps = config.d_model, config.norm_eps
        self.starts, self.key_norm = starts, key_norm
        self.groups = reader_groups(starts)

    def foresee(self, state: State, sites: Sequence[Any]) -> State:
        """With ``sites`` that begin inside of a group, behind a cut, its readers get their means here."""
        queries = torch.stack([site.scoring_query(state[0].dtype) for site in sites])
        if sites[0].group:
            return *state, queries
        readers = next((i for i, site in enumerate(sites) if site.group), len(sites))
        mine, queries = queries.split([readers, len(sites) - readers])
        means, lses = functional.source_pool_many(state[: sites[0].n_finished], mine, scale=1.0, eps=self.eps)
        # The first of each is of a reader in front of these, and dropped.
        return *state, means[0], *means, lses[0], *lses, queries

    def start_as_prenorm(self, sites: Sequence[Any]) -> Scaling:
        """The mean of the sources, which sum up to PreNorm's state."""
        for site in sites:
            site.reset_parameters()
        return Scaling(1.0, tuple(float(1 + n) for n in itertools.accumulate(self.starts)))

    def unchanged(self, earlier: int, later: int) -> int:
        begun = sum(self.starts[:earlier])
        # The newest source is still added to, unless the next sublayer begins another.
        return 1 + begun - (not self.starts[earlier])

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        """Sources alone, without those that the sublayers begin. ``None`` is one that a later sublayer adds to."""
        before, behind = first - 1, first - 1 + len(sites)
        sources = state[: 1 + sum(self.starts[:before])]
        added_to = behind < len(self.starts) and not self.starts[behind]
        if added_to and any(self.starts[before:behind]):
            # The sites of this file look for it; no other state holds anything but tensors.
            return cast(State, (*sources, None))
        return sources

    def site(self, index: int) -> Site:
        first, size = next((i, n) for i, n in self.groups if i < index <= i + n)
        return SourceSite(
            self.d_model,
            n_sources=1 + sum(self.starts[: index - 1]),
            new_source=self.starts[index - 1],
            key_norm=self.key_norm,
            eps=self.eps,
            n_finished=1 + sum(self.starts[:first]),
            group=size if index == first + 1 else 0,
        )


def reader_groups(starts: list[bool]) -> list[tuple[int, int]]:
    """``(sublayers before it, readers)`` of every group; one begins where a block does."""
    begun = [i for i, start in enumerate(starts) if start]
    blocks = max(1, round(len(begun) / math.sqrt(len(starts))))
    bounds = [*begun[::blocks], len(starts)]
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class AttnResOptions:
    """Options of ``attnres``."""

    key_norm: Literal["learned", "plain"] = "learned"
    """Whether the RMSNorm of the keys has a weight."""


@register("attnres", "softmax attention over the embedding and all earlier outputs", options=AttnResOptions)
def _full(config: "GPTConfig", options: Any) -> Residual:
    return AttentionResiduals(config, [True] * config.n_sublayers, options.key_norm)


@dataclass(frozen=True)
class BlockAttnResOptions(AttnResOptions):
    """Options of ``attnres-block``; ``blocks`` or ``block_size`` or neither."""

    blocks: int | None = None
    """N, the number of blocks. Neither given: 8, or L where there are fewer sublayers."""
    block_size: int | None = None
    """S, sublayers in a block (an attention and an MLP count one each); the last block may be shorter."""

    def __post_init__(self) -> None:
        for name in ("blocks", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"residual attnres-block: {name} must be at least 1, got {value}")
        if self.blocks is not None and self.block_size is not None:
            raise UserError(
                f"residual attnres-block takes blocks or block_size, got both: blocks = {self.blocks} and "
                f"block_size = {self.block_size}. Leave one out"
            )


def block_starts(n_sublayers: int, blocks: int | None, block_size: int | None) -> list[bool]:
    """Whether each of the ``n_sublayers`` begins a block, given their number, their size, or neither (8 blocks).

    Raises:
        ValueError: more blocks, or a larger block, than there are sublayers.
    """
    for name, value in (("blocks", blocks), ("block_size", block_size)):
        if value is not None and value > n_sublayers:
            raise UserError(
                f"residual attnres-block: {name} = {value} is more than the model's {n_sublayers} sublayers "
                f"(two per layer). Use 1 to {n_sublayers}"
            )
    if block_size is not None:
        return [i % block_size == 0 for i in range(n_sublayers)]
    blocks = min(8, n_sublayers) if blocks is None else blocks
    size, larger = divmod(n_sublayers, blocks)
    return [i == 0 for b in range(blocks) for i in range(size + (b < larger))]


@register(
    "attnres-block",
    "softmax attention over the embedding and the sums of blocks of outputs",
    options=BlockAttnResOptions,
)
def _block(config: "GPTConfig", options: Any) -> Residual:
    starts = block_starts(config.n_sublayers, options.blocks, options.block_size)
    return AttentionResiduals(config, starts, options.key_norm)
