r"""A model cut into stages, run by the schedules of ``torch.distributed.pipelining``.

A cut lies between the write and the read behind a block's MLP (:mod:`depthmix.residuals.base`), so what is sent is the
connection's state there and nothing else: for one token, in numbers,

====================================  =====================================================================
``prenorm``, ``highway``, ``review``  D
``mgr-*``                             n D; k D while k < n streams exist
``hc``, ``hc-static``, ``mhc*``       n D
``siamese``                           2 D
``attnres``                           one D for the embedding and for each sublayer so far
``attnres-block``                     one D for the embedding and for each block begun so far
``denseformer``                       one D for the embedding and for each block output that is still read
``moda``                              D, and the keys and values of every sublayer so far
====================================  =====================================================================

forwards, and as much backwards, in the dtype that the state has. What a connection keeps for its backward pass (anchors
of replay, budgets of inversion) stays in its stage: a window begins behind a cut and ends in front of the next.

**Cache.** With the interleaved schedule a process runs several stages, the first of them on the same micro-batch
earlier than the others. Sources it has seen there and that have not changed since (:meth:`Residual.unchanged`) are
taken from a :class:`Cache` and not sent again (Attention Residuals report, section 4): a boundary then carries what the
pp - 1 stages since then have added. Their gradients go the same way back: a later stage leaves them in the cache, where
the backward pass of the earlier stage, which is always behind it, adds them to its own.

**Tied embedding.** The first stage embeds and the last projects onto the same matrix. Both hold it, with the same
initial values; their gradients are summed (:func:`depthmix.parallel.shard.sum_over_tied`), so both take the same steps.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..config import GPTConfig
from ..model import GPT, Block, own_part, rotary_part
from ..residuals.base import Residual, Site
from .plan import ParallelPlan, cuts, stage_blocks
from .world import ManyProcesses


class GPTStage(nn.Module):
    """The blocks ``blocks`` of ``model``, with the embedding in front or the head behind where it is an end.

    ``forward`` takes token ids ``[B, T]`` in the first stage and what crossed the cut in the others, and returns what
    crosses the next cut, logits ``[B, T, V]`` in the last. Parameters keep the names they have in ``model``.

    A model is taken apart by making all of its stages, or those that are wanted; it cannot be used whole afterwards.

    ``exchange``: how crossings are cached, ``None`` for not at all.
    """

    blocks: Mapping[str, Block]
    """Those of ``numbers``; of the one in front of them, the site behind its MLP alone."""
    residual: Residual
    rope_cos: Tensor
    rope_sin: Tensor

    sequence_part = (0, 1)
    blocks_apart = False

    def __init__(self, model: GPT, blocks: range, exchange: "Exchange | None" = None):
        super().__init__()
        config = self.config = model.config
        self.numbers = blocks
        self.first, self.last = blocks.start == 0, blocks.stop == config.n_layer
        self.exchange = exchange
        if self.first or self.last:
            self.embed = model.embed
        if self.first:
            self.residual = model.residual
        else:  # for what it knows, not for its parameters, which are the beginning's
            object.__setattr__(self, "residual", model.residual)
        held: Any = nn.ModuleDict({str(i): model.blocks[i] for i in blocks})
        self.blocks = held
        if not self.first:
            entrance: Any = nn.Module()
            entrance.mlp_site = _receiving(model.blocks[blocks.start - 1].mlp_site)
            held[str(blocks.start - 1)] = entrance
        if self.last:
            self.norm = model.norm
        else:
            exit_block = copy.copy(model.blocks[blocks.stop - 1])
            exit_block._modules = dict(exit_block._modules)
            exit_block.mlp_site = _sending(exit_block.mlp_site)
            held[str(blocks.stop - 1)] = exit_block
        for name in ("rope_cos", "rope_sin"):
            self.register_buffer(name, getattr(model, name), persistent=False)

    def whole_blocks(self) -> list[Block]:
        """Without the entrance, which is a site alone."""
        return [self.blocks[str(i)] for i in self.numbers]

    def forward(self, *inputs: Tensor):
        if self.first:
            (ids,) = inputs
            h, state = self.residual.begin(self.embed(own_part(ids, self.sequence_part)))
            length = ids.shape[1]
        else:
            crossed = inputs if self.exchange is None else self.exchange.received(inputs)
            h, state = self.blocks[str(self.numbers.start - 1)].mlp_site.receive(crossed)
            length = self.config.seq_len
        cos, sin = rotary_part(self.rope_cos, self.rope_sin, 0, length, h)
        blocks = self.whole_blocks()
        if not self.blocks_apart:
            sites = [site for block in blocks for site in (block.attn_site, block.mlp_site)]
            # In front of a cut nothing is read.
            state = self.residual.foresee(state, sites if self.last else sites[:-1])
        for i, block in zip(self.numbers, blocks, strict=True):
            if i == self.numbers.stop - 1 and not self.last:
                crossed = tuple(x.contiguous() for x in block(h, state, cos, sin, cut=True))
                return crossed if self.exchange is None else self.exchange.to_send(crossed)
            h, state = block(h, state, cos, sin)
        return F.linear(self.norm(self.residual.finish(h, state)), self.embed.weight)


def _receiving(site: Site) -> Site:
    """A copy of ``site`` with what :meth:`Site.receive` needs alone."""
    return _with(site, lambda name: name in site.received)


def _sending(site: Site) -> Site:
    """A copy of ``site`` with what :meth:`Site.send` needs alone."""
    return _with(site, lambda name: name not in site.received)


def _with(site: Site, wanted) -> Site:
    made = copy.copy(site)
    made._parameters = {k: v if wanted(k) else None for k, v in site._parameters.items()}
    made._modules = {k: v if wanted(k) else None for k, v in site._modules.items()}
    return made


# --- cache ----------------------------------------------------------------------------------------


class Cache:
    """What this process's stages have seen of each micro-batch, and the gradients that later stages have for it.

    Stages run a micro-batch one after the other, each of them all micro-batches in their order; ``start`` begins a new
    set of them.
    """

    def __init__(self):
        self.seen: dict[int, tuple[Tensor, ...]] = {}
        self.gradients: dict[int, list[Tensor | None]] = {}

    def start(self) -> None:
        self.seen.clear()
        self.gradients.clear()


class _Leave(torch.autograd.Function):
    """Sources as they are; the backward pass adds the gradients that a later stage of this process has left."""

    @staticmethod
    def forward(ctx, cache, micro_batch, *sources):
        ctx.cache, ctx.micro_batch = cache, micro_batch
        return tuple(source.view_as(source) for source in sources)

    @staticmethod
    def backward(ctx, *gradients):
        left = ctx.cache.gradients.pop(ctx.micro_batch, [None] * len(gradients))
        assert len(left) <= len(gradients), "a later stage takes no more than the earlier one left"
        left = left + [None] * (len(gradients) - len(left))
        return None, None, *(_sum(a, b) for a, b in zip(gradients, left, strict=True))


class _Take(torch.autograd.Function):
    """Sources that an earlier stage of this process has left, for a later one; their gradients go into the cache.

    ``anchor``: a tensor of the later stage's graph, so that there is a graph at all.
    """

    @staticmethod
    def forward(ctx, cache, micro_batch, anchor, *sources):
        ctx.cache, ctx.micro_batch = cache, micro_batch
        return tuple(source.clone() for source in sources)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.cache.gradients[ctx.micro_batch] = list(gradients)
        return None, None, None, *(None for _ in gradients)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Exchange:
    """What one stage sends, given what the receiving process has already, and what it makes of what it gets.

    Args:
        cache: of this process.
        known_before: how many of the tensors that enter are in the cache.
        known_behind: how many of those that leave the next process has.
        keep: how many of the tensors that leave a later stage of this process takes from the cache.
    """

    def __init__(self, cache: Cache, known_before: int, known_behind: int, keep: int):
        self.cache, self.known_before, self.known_behind, self.keep = cache, known_before, known_behind, keep
        self._received = self._sent = 0

    def start(self) -> None:
        """A new set of micro-batches."""
        self._received = self._sent = 0

    def received(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        micro_batch, self._received = self._received, self._received + 1
        if not self.known_before:
            return inputs
        kept = self.cache.seen[micro_batch][: self.known_before]
        return (*_Take.apply(self.cache, micro_batch, inputs[0], *kept), *inputs)

    def to_send(self, crossed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        micro_batch, self._sent = self._sent, self._sent + 1
        if self.keep:
            # All of them: at least one is sent, so the backward pass comes by.
            crossed = _Leave.apply(self.cache, micro_batch, *crossed)
            self.cache.seen[micro_batch] = tuple(x.detach() for x in crossed[: self.keep])
        return crossed[self.known_behind :]


# --- building -------------------------------------------------------------------------------------


class Pipeline:
    """The stages of one process and what they exchange.

    Args:
        model: whole, with the plan's ``cuts``; taken apart.
        plan, pp_rank: which stages.
        cache: whether unchanged sources are sent once (the interleaved schedule).
    """

    def __init__(self, model: GPT, plan: ParallelPlan, pp_rank: int, *, cache: bool = True):
        self.plan, self.config = plan, model.config
        self.cache = Cache()
        blocks = stage_blocks(model.config.n_layer, plan.stages)
        self.numbers = list(plan.stages_of(pp_rank))
        known = known_tensors(model, plan) if cache else [0] * (plan.stages - 1)
        self.stages: list[GPTStage] = []
        for number in self.numbers:
            exchange = None
            if any(known):
                # Cut i lies behind stage i; a later stage of this process is entered by cut number + pp - 1.
                later = number + plan.pp - 1
                exchange = Exchange(
                    self.cache,
                    known_before=known[number - 1] if number else 0,
                    known_behind=known[number] if number < plan.stages - 1 else 0,
                    keep=known[later] if later < plan.stages - 1 else 0,
                )
            self.stages.append(GPTStage(model, blocks[number], exchange))

    def start(self) -> None:
        """Before each set of micro-batches."""
        self.cache.start()
        for stage in self.stages:
            if stage.exchange is not None:
                stage.exchange.start()


def known_tensors(model: GPT, plan: ParallelPlan) -> list[int]:
    """For each cut, how many of the tensors that cross it the receiving process has seen already.

    The process of stage s + 1 ran stage s + 1 - pp, and has what left that: what crosses cut s + 1 - pp.
    """
    sublayers = cuts(model.config, plan)
    return [
        model.residual.unchanged(sublayers[cut + 1 - plan.pp], sublayers[cut]) if cut + 1 >= plan.pp else 0
        for cut in range(len(sublayers))
    ]


def crossing_examples(
    config: GPTConfig,
    plan: ParallelPlan,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    device: str = "cpu",
    cache: bool = True,
) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Tensors on the meta device of what is sent over each cut for a micro-batch of ``rows``, and of the logits.

    Found by running the model on fake tensors; under tp with the shapes of one process.
    """
    part = config.seq_len // plan.tp
    examples = []
    with (
        FakeTensorMode(),
        torch.no_grad(),
        torch.autocast(device, torch.bfloat16, enabled=autocast),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # said of the real model
        model = GPT(config, seed=0, cuts=cuts(config, plan))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        known = known_tensors(model, plan) if cache else [0] * (plan.stages - 1)
        stages = [GPTStage(model, blocks) for blocks in stage_blocks(config.n_layer, plan.stages)]
        crossed: tuple[Tensor, ...] = (torch.zeros(rows, part, dtype=torch.int64),)
        for stage in stages:
            stage.config = dataclasses.replace(config, seq_len=part)
        for stage, held in zip(stages[:-1], known, strict=True):
            crossed = stage(*crossed)
            examples.append(crossed[held:])
        logits = stages[-1](*crossed)
    by_heads = model.residual.crosses_by_head
    made = [tuple(_example(x, plan.tp if by_heads else 1) for x in crossing) for crossing in examples]
    return made, _example(logits, 1)


def _example(x: Tensor, tp: int) -> Tensor:
    shape = list(x.shape)
    if len(shape) == 4 and tp > 1:  # [B, H, T, d]: a process has all tokens of its heads
        shape[1], shape[2] = shape[1] // tp, shape[2] * tp
    return torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=True)


def build_schedule(
    pipeline: Pipeline,
    called: Sequence[nn.Module],
    world: ManyProcesses,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    micro_batches: int,
    rows: int,
    device: torch.device,
    **examples: Any,
) -> Any:
    """The schedule that runs ``called`` (the stages, perhaps wrapped) of this process."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

    plan, config = pipeline.plan, pipeline.config
    crossing, logits = crossing_examples(config, plan, rows, device=device.type, **examples)
    ids = torch.empty(rows, config.seq_len, dtype=torch.int64, device="meta")
    entering, leaving = [(ids,), *crossing], [*crossing, (logits,)]
    stages = [
        PipelineStage(
            module, number, plan.stages, device, input_args=entering[number], output_args=leaving[number],
            group=world.group("pp"),
        )
        for number, module in zip(pipeline.numbers, called, strict=True)
    ]  # fmt: skip
    if plan.schedule == "interleaved":
        return ScheduleInterleaved1F1B([*stages], micro_batches, loss_fn)
    single = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[plan.schedule]
    return single(stages[0], micro_batches, loss_fn)
