r"""How many bytes a plan makes the processes exchange in one optimiser step: formulas, nothing is run.

What crosses a pipeline's cut behind sublayer l, in numbers per token, for D features, n streams and heads that are W
wide together:

===========================================  =================================================================
``prenorm``, ``highway*``, ``review*``       D
``mgr-*``                                    min(l + 1, n) D
``hc``, ``hc-static``, ``mhc*``              n D
``siamese``                                  2 D
``attnres``                                  (l + 1) D
``attnres-block``                            (1 + blocks begun by l) D
``denseformer``                              D for each output :math:`X_j` that an average behind the cut reads
``moda``                                     D + 2 W l
===========================================  =================================================================

and as much backwards, of gradients. Their dtype is that of the run (fp32 under autocast), of the streams of ``mgr-*``
the one that ``stream_dtype`` names. Each is written here as the *values* that cross, by name
(:func:`crossing_values`), from the connection's equations and not from its code, so that counting what does cross tests
both. With the interleaved schedule's cache, values that the receiving process has by the same name are not sent again.

**Payloads.** ``Volume.bytes`` is what one process hands to the group, or gets from it, in one optimiser step: of an
all-gather the gathered result, of a reduce-scatter the whole input, of an all-reduce and a broadcast the tensor, of an
all-to-all this process's input, of point-to-point what is sent. :func:`wire_bytes` says what of it a process has to
send where collectives run as rings.

**What is sent**, for M micro-batches a step of b rows and T tokens:

===================  ===================================================================================================
gradients, dp alone  all-reduce of all of a stage's parameters, once a step; with bf16 every micro-batch, without pp
parameters, fsdp     all-gather of a unit's (a block, or small ones together) before its forward and before its backward
                     pass: 2 M times a step. Under pp M + 1 times: a forward pass gives them back, of the backward
                     passes the last one alone. What is in no unit, once every micro-batch; under pp once a step
gradients, fsdp      reduce-scatter of the same, every micro-batch; under pp once a step. With dp too, an all-reduce of
                     the parts over dp
sequence, tp         all-gather and reduce-scatter of b T D numbers for each sublayer, pass and micro-batch, whatever
                     the residual connection. moda's projections of what MLPs read: one all-gather forwards, one
                     reduce-scatter backwards
gradients, tp        all-reduce of those of parameters that no process has a part of alone: embedding, norms, the
                     connection's own; once a step
state, pp            point-to-point, each cut, forwards and backwards
gradients, tied      all-reduce of the embedding's between the first and the last stage, once a step
updates              Muon's: each matrix goes whole to one process, and its update comes back: all-to-alls over fsdp and
                     tp, an all-gather of the updates over dp
loss, norm           scalars
===================  ===================================================================================================

Activation checkpointing repeats what tp sends forwards. What evaluation, checkpoints and the loop's decisions send is
not part of a step here.
"""

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config import GPTConfig, TrainConfig
from ..errors import UserError
from ..optim import BATCH_ELEMENTS, matrix_batches
from .plan import ParallelPlan, cuts, stage_blocks, units
from .updates import batch_elements, local_shape, owners

Values = list[tuple[tuple[Any, ...], int]]
"""Name and numbers per token of each."""
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "point-to-point")


@dataclass(frozen=True)
class Volume:
    """One kind of traffic of one process in one optimiser step."""

    kind: str
    """One of ``KINDS``."""
    axis: str
    """Among whom: ``dp``, ``fsdp``, ``tp``, ``pp``; ``tied``, the stages that hold the embedding; ``world``, all."""
    what: str
    """parameters, gradients, sequence, state, updates, norm or loss."""
    bytes: int
    """Payload of one process, as the module says; the largest of all processes."""
    calls: int
    """Collectives, or tensors sent."""
    group: int
    """Processes in the collective; 2 for point-to-point."""
    boundary: int | None = None
    """Point-to-point: the cut, 0 between the first two stages."""
    direction: str = ""
    """Point-to-point: ``forward``, states, or ``backward``, their gradients."""


# --- what crosses a cut ---------------------------------------------------------------------------


def crossing_values(model: GPTConfig, sublayer: int) -> Values:
    """What is read behind ``sublayer`` (1 .. L - 1) of what was before: ``(name, numbers per token)`` of each value.

    Equal names are equal values. Raises ``UserError`` for a connection without a formula.
    """
    if model.residual not in _CROSSINGS:
        raise UserError(
            f"no formula says what crosses a cut of residual {model.residual!r}; add one to "
            f"depthmix.parallel.volume._CROSSINGS"
        )
    return _CROSSINGS[model.residual](model, sublayer)


def crossing_numbers(model: GPTConfig, sublayer: int) -> int:
    """Numbers per token that cross a cut behind ``sublayer`` (1 .. L - 1), one way."""
    return sum(numbers for _, numbers in crossing_values(model, sublayer))


def sent_values(model: GPTConfig, plan: ParallelPlan, cut: int, cache: bool = True) -> Values:
    """:func:`crossing_values` of ``cut`` (0 is behind the first stage) without those that the receiver has.

    The process that receives there has run the stage pp - 1 before, and has what crossed behind that. Of both lists the
    common beginning is not sent: what is old comes first.
    """
    where = cuts(model, plan)
    crossing = crossing_values(model, where[cut])
    earlier = cut + 1 - plan.pp
    if not cache or earlier < 0:
        return crossing
    had = crossing_values(model, where[earlier])
    known = next(
        (i for i, (a, b) in enumerate(zip(had, crossing, strict=False)) if a != b),
        min(len(had), len(crossing)),
    )
    return crossing[known:]


def boundary_numbers(model: GPTConfig, plan: ParallelPlan, cut: int, cache: bool = True) -> int:
    """Numbers per token that are sent over ``cut`` (0 is behind the first stage), one way."""
    return sum(numbers for _, numbers in sent_values(model, plan, cut, cache))


def boundary_bytes(config: TrainConfig, plan: ParallelPlan, cut: int, cache: bool = True) -> int:
    """Bytes per token that are sent over ``cut``, one way."""
    wide = state_bytes(config.model, config.precision)
    # Under autocast states are fp32, and keys and values what matrix products made.
    narrow = 4 if config.precision == "fp32" else 2
    sent = sent_values(config.model, plan, cut, cache)
    return sum(numbers * (narrow if name[0] in ("key", "value") else wide) for name, numbers in sent)


def state_bytes(model: GPTConfig, precision: str) -> int:
    """Of a number of the connection's state; keys and values apart."""
    own = model.residual_options.get("stream_dtype", "model")
    return {"fp32": 4, "bf16": 2, "model": 2 if precision == "bf16" else 4}[own]


def separate_streams(model: GPTConfig) -> bool:
    """Whether each sublayer writes one half of the streams (an option of the mgr connections)."""
    return model.residual_options.get("separate_streams", False)


def _single(model: GPTConfig, sublayer: int) -> Values:
    return [(("x", sublayer), model.d_model)]


def _streams(model: GPTConfig, sublayer: int) -> Values:
    return [(("streams", sublayer), model.n_streams * model.d_model)]


def _two(model: GPTConfig, sublayer: int) -> Values:
    return [(("x", sublayer), model.d_model), (("y", sublayer), model.d_model)]


def _ramp(model: GPTConfig, sublayer: int) -> Values:
    # The embedding and every output are streams of their own until there are n, which then change together.
    if sublayer + 1 >= model.n_streams:
        if separate_streams(model):
            half = model.n_streams // 2 * model.d_model
            return [((f"streams of {kind} sublayers", sublayer), half) for kind in ("even", "odd")]
        return _streams(model, sublayer)
    return [(("stream", i), model.d_model) for i in range(sublayer + 1)]


def _outputs(model: GPTConfig, sublayer: int) -> Values:
    return [(("output", i), model.d_model) for i in range(sublayer + 1)]


def _block_sums(model: GPTConfig, sublayer: int) -> Values:
    options = model.residual_options
    count, size, depth = options.get("blocks"), options.get("block_size"), model.n_sublayers
    if size is None:
        count = min(8, depth) if count is None else count
        small, larger = divmod(depth, count)
        sizes = [small + (block < larger) for block in range(count)]
    else:
        sizes = [min(size, depth - first) for first in range(0, depth, size)]
    values: Values = [(("embedding",), model.d_model)]
    first = 0
    for size in sizes:
        if first < sublayer:
            # A sum over the block's outputs so far: another value as soon as one more is in it.
            values.append((("sum", first, min(first + size, sublayer)), model.d_model))
        first += size
    return values


def _block_outputs(model: GPTConfig, sublayer: int) -> Values:
    k, p = (model.residual_options.get(name, 1) for name in ("dilation", "period"))
    done, inside = divmod(sublayer, 2)
    # Averages still to be taken: that behind a block, of all X_j in its own phase, is taken behind the cut.
    phases = {
        i % k for i in range(done + inside if inside else done, model.n_layer + 1) if i >= 1 and i % p == 0
    }
    wanted = [j for j in range(done + 1) if j % k in phases]
    if inside:  # in the middle of block done + 1: the running sum besides
        return [(("x", sublayer), model.d_model), *((("X", j), model.d_model) for j in wanted)]
    return [(("X", j), model.d_model) for j in sorted({*wanted, done})]


def _memory(model: GPTConfig, sublayer: int) -> Values:
    width = model.attention_width
    read = sublayer < model.n_sublayers - 1  # by an attention behind the cut
    pairs = [((kind, i), width) for i in range(1, sublayer + 1) for kind in ("key", "value")] if read else []
    return [*pairs, (("x", sublayer), model.d_model)]


_CROSSINGS = {
    **dict.fromkeys(("prenorm", "highway", "highway-additive", "review", "review-convex"), _single),
    **dict.fromkeys(("mgr-independent", "mgr-competitive", "mgr-review"), _ramp),
    **dict.fromkeys(("hc", "hc-static", "mhc", "mhc-lite"), _streams),
    "siamese": _two,
    "attnres": _outputs,
    "attnres-block": _block_sums,
    "denseformer": _block_outputs,
    "moda": _memory,
}


def _write_keeps_nothing(model: GPTConfig, sublayer: int) -> bool:
    """Whether the gradient of a write needs neither the output nor the state: it adds, or puts side by side."""
    if model.residual.startswith("mgr-"):
        return sublayer < model.n_streams  # in the ramp
    return model.residual in ("prenorm", "attnres", "attnres-block", "denseformer")


# --- parameters of a stage ------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A parameter of a stage."""

    shape: tuple[int, ...]
    muon: bool = False
    split: int | None = None
    """The dimension that tp divides."""

    def local(self, tp: int) -> tuple[int, ...]:
        """Its shape on one process of tp."""
        return tuple(size // tp if i == self.split else size for i, size in enumerate(self.shape))


@dataclass(frozen=True)
class StageWeights:
    """What a stage's processes hold together."""

    blocks: tuple[tuple[Weight, ...], ...]
    """Of each block."""
    rest: tuple[Weight, ...]
    """Of no block: embedding, final norm, the connection's beginning, what the read behind the cut needs."""

    @property
    def all(self) -> list[Weight]:
        return [*self.rest, *(weight for block in self.blocks for weight in block)]


def stage_weights(model: GPTConfig, plan: ParallelPlan) -> list[StageWeights]:
    """The parameters of every stage."""
    D, W = model.d_model, model.attention_width
    beginning, sites = _connection_weights(model)
    norm = Weight((D,))
    attention = (norm, Weight((3 * W, D), True, 0), Weight((D, W), True, 1))
    mlp = (norm, Weight((4 * D, D), True, 0), Weight((D, 4 * D), True, 1))
    found = []
    for blocks in stage_blocks(model.n_layer, plan.stages):
        first, last = blocks.start == 0, blocks.stop == model.n_layer
        rest = [Weight((model.vocab_size, D))] if first or last else []
        rest += beginning if first else [w for w, received in sites[2 * blocks.start - 1] if received]
        rest += [norm] if last else []
        units = []
        for i in blocks:
            behind_attention, behind_mlp = sites[2 * i], sites[2 * i + 1]
            cut = i == blocks.stop - 1 and not last
            units.append(
                (
                    *attention,
                    *(w for w, _ in behind_attention),
                    *mlp,
                    *(w for w, received in behind_mlp if not (cut and received)),
                )
            )
        found.append(StageWeights(tuple(units), tuple(rest)))
    return found


def _connection_weights(model: GPTConfig) -> tuple[list[Weight], list[list[tuple[Weight, bool]]]]:
    """Parameters of the beginning, and of each site with whether they belong to the read alone."""
    return _connection_weights_of(json.dumps(dataclasses.asdict(model), sort_keys=True))


@functools.lru_cache(maxsize=64)
def _connection_weights_of(text: str) -> tuple[list[Weight], list[list[tuple[Weight, bool]]]]:
    from ..residuals import build_residual

    model = GPTConfig(**json.loads(text))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the real model
        residual = build_residual(model)
        sites = [residual.site(index) for index in range(1, model.n_sublayers + 1)]
    tp_split = 0 if residual.crosses_by_head else None  # keys and values, by heads

    def weights(module: Any, received: tuple[str, ...] = ()) -> Iterator[tuple[Weight, bool]]:
        for name, parameter in module.named_parameters():
            muon = module.optimizer_group(name, parameter) == "muon"
            split = tp_split if muon else None
            yield Weight(tuple(parameter.shape), muon, split), name.split(".")[0] in received

    return [w for w, _ in weights(residual)], [list(weights(site, site.received)) for site in sites]


# --- a step ---------------------------------------------------------------------------------------


def step_volume(
    config: TrainConfig, plan: ParallelPlan, backend: str | None = None, cache: bool = True
) -> list[Volume]:
    """Everything that a process sends in one optimiser step, the largest over all processes of each.

    ``backend``: ``gloo`` or ``nccl``, which decides how Muon's updates travel; by default that of ``config.device``.
    """
    largest: dict[tuple[Any, ...], Volume] = {}
    for rank in range(plan.processes):
        place = plan.coordinates(rank)
        if place["dp"] or place["tp"]:
            continue  # the first of them have the most
        for volume in process_volume(config, plan, rank, backend, cache):
            key = volume.kind, volume.axis, volume.what, volume.boundary, volume.direction
            known = largest.get(key, volume)
            largest[key] = dataclasses.replace(
                known, bytes=max(known.bytes, volume.bytes), calls=max(known.calls, volume.calls)
            )
    return list(largest.values())


def process_volume(
    config: TrainConfig, plan: ParallelPlan, rank: int, backend: str | None = None, cache: bool = True
) -> list[Volume]:
    """:func:`step_volume` of one process."""
    if plan.processes == 1:
        return []
    return [v for v in _Process(config, plan, rank, backend, cache).volumes() if v.calls]


@dataclass(frozen=True)
class _Matrix:
    """One of Muon's, which one process turns into an update."""

    shape: tuple[int, ...]
    dims: dict[str, int]
    """Axis of the plan, fsdp or tp -> the dimension that it divides."""
    owner: dict[str, int]
    """Where that process stands on dp, fsdp and tp."""


class _Process:
    def __init__(self, config: TrainConfig, plan: ParallelPlan, rank: int, backend: str | None, cache: bool):
        self.config, self.plan, self.model, self.cache = config, plan, config.model, cache
        self.backend = backend or ("gloo" if config.device == "cpu" else "nccl")
        self.place = plan.coordinates(rank)
        self.numbers = plan.stages_of(self.place["pp"])
        weights = stage_weights(self.model, plan)
        self.stages = [weights[i] for i in self.numbers]
        self.size = 2 if config.precision == "bf16" else 4
        self.micro_batches = plan.micro_batches(config)
        self.tokens = plan.micro_batch(config) * self.model.seq_len  # of a micro-batch

    def volumes(self) -> Iterator[Volume]:
        yield from self._data()
        yield from self._sequence()
        yield from self._states()
        yield from self._updates()
        yield from self._scalars()

    def _data(self) -> Iterator[Volume]:
        plan = self.plan
        if self.plan.sharded:
            yield from self._sharded_data()
        elif plan.dp > 1:
            numbers = sum(math.prod(w.shape) for stage in self.stages for w in stage.all)
            times = self.micro_batches if self.config.precision == "bf16" and plan.pp == 1 else 1
            first = 25 << 20 if self.backend == "gloo" else 1 << 20
            calls = sum(
                _buckets([math.prod(w.shape) * self.size for w in stage.all], first) for stage in self.stages
            )
            yield Volume("all-reduce", "dp", "gradients", times * numbers * self.size, times * calls, plan.dp)
            if plan.dp > 2:  # which parameters were used, a number each
                used = 4 * sum(len(stage.all) for stage in self.stages)
                yield Volume("all-reduce", "dp", "gradients", times * used, times * len(self.stages), plan.dp)

    def _padded(self, unit: Iterable[Weight]) -> int:
        """Numbers of one process of tp, each parameter's rows filled up to a multiple of fsdp."""
        return sum(self.plan.fsdp * math.prod(self._shard(w)) for w in unit)

    def _shard(self, weight: Weight) -> tuple[int, ...]:
        rows, *rest = weight.local(self.plan.tp)
        return (-(-rows // self.plan.fsdp), *rest)

    def _sharded_data(self) -> Iterator[Volume]:
        plan, M = self.plan, self.micro_batches
        gathered = reduced = gathers = reductions = 0
        for stage in self.stages:
            sizes = [self.size * sum(math.prod(w.local(plan.tp)) for w in block) for block in stage.blocks]
            joined = [[w for i in unit for w in stage.blocks[i]] for unit in units(sizes, plan)]
            for unit in joined:
                # A forward pass gives a unit's parameters back, a backward pass does so at the end of the step alone
                # where there is a pipeline: whatever follows it then finds them.
                times = M + 1 if plan.pp > 1 else 2 * M
                gathered, gathers = gathered + times * self._padded(unit), gathers + times
                reduced, reductions = reduced + self._padded(unit), reductions + 1
            rest = stage.rest if joined else stage.all
            if rest:
                times = 1 if plan.pp > 1 else M
                gathered, gathers = gathered + times * self._padded(rest), gathers + times
                reduced, reductions = reduced + self._padded(rest), reductions + 1
        times = 1 if plan.pp > 1 else M
        if plan.fsdp > 1:
            yield Volume("all-gather", "fsdp", "parameters", gathered * self.size, gathers, plan.fsdp)
            yield Volume(
                "reduce-scatter",
                "fsdp",
                "gradients",
                times * reduced * self.size,
                times * reductions,
                plan.fsdp,
            )
        if plan.dp > 1:
            part = times * reduced * self.size // plan.fsdp
            yield Volume("all-reduce", "dp", "gradients", part, times * reductions, plan.dp)

    def _sequence(self) -> Iterator[Volume]:
        plan = self.plan
        if plan.tp == 1:
            return
        sublayers = 2 * sum(len(stage.blocks) for stage in self.stages)
        # What a connection splits by heads is fed with the whole sequence too, and sums nothing.
        fed = sum(w.split is not None for stage in self.stages for w in stage.all) - 2 * sublayers
        once, again = self.micro_batches, int(self.config.activation_checkpointing)
        one = self.tokens * self.model.d_model
        # Norms give the dtype of states, matrix products under autocast bf16; gradients have their tensor's dtype.
        normed, product = self.size, 2 if self.config.precision == "autocast" else self.size
        into, out = once * (sublayers + fed), once * sublayers
        gathers = (1 + again) * into + out
        yield Volume(
            "all-gather",
            "tp",
            "sequence",
            one * ((1 + again) * into * normed + out * product),
            gathers,
            plan.tp,
        )
        again_out = again * (out - once * self._not_run_again())
        calls = into + out + again_out
        yield Volume(
            "reduce-scatter",
            "tp",
            "sequence",
            one * (into * normed + (out + again_out) * product),
            calls,
            plan.tp,
        )
        whole = [w for stage in self.stages for w in stage.all if w.split is None]
        numbers = sum(self._held(w) for w in whole)
        yield Volume("all-reduce", "tp", "gradients", numbers * 4, 1, plan.tp)

    def _not_run_again(self) -> int:
        """Blocks that checkpointing runs again as far as their last matrix alone: of what follows nothing is kept."""
        count = 0
        for number, stage in zip(self.numbers, self.stages, strict=True):
            first = stage_blocks(self.model.n_layer, self.plan.stages)[number].start
            for i in range(first, first + len(stage.blocks)):
                last = i == self.model.n_layer - 1
                if i == first + len(stage.blocks) - 1 and not last:  # it ends with a write alone
                    count += _write_keeps_nothing(self.model, 2 * i + 2)
                elif (
                    self.plan.sharded or self.plan.pp > 1 or last
                ):  # else the next block's norm comes with it
                    # Every MLP of moda but the last is followed by a projection.
                    count += self.model.residual == "prenorm" or (self.model.residual == "moda" and last)
        return count

    def _held(self, weight: Weight) -> int:
        """Numbers of ``weight`` that this process holds."""
        rows, *rest = weight.local(self.plan.tp)
        each = -(-rows // self.plan.fsdp)
        return max(0, min(each, rows - self.place["fsdp"] * each)) * math.prod(rest)

    def _states(self) -> Iterator[Volume]:
        plan, M = self.plan, self.micro_batches
        for stage in self.numbers:
            for cut, direction in ((stage, "forward"), (stage - 1, "backward")):
                if 0 <= cut < plan.stages - 1:
                    sent = sent_values(self.model, plan, cut, self.cache)
                    each = boundary_bytes(self.config, plan, cut, self.cache) * self.tokens // plan.tp
                    yield Volume(
                        "point-to-point",
                        "pp",
                        "state",
                        M * each,
                        M * len(sent),
                        2,
                        boundary=cut,
                        direction=direction,
                    )
        if plan.pp > 1 and self.place["pp"] in (0, (plan.stages - 1) % plan.pp):
            numbers = self._held(Weight((self.model.vocab_size, self.model.d_model)))
            yield Volume("all-reduce", "tied", "gradients", numbers * self.size, 1, 2)

    def _updates(self) -> Iterator[Volume]:
        """Muon's matrices on their way to one process each and back: along fsdp, then tp; back also along dp."""
        found: dict[tuple[str, str], list[int]] = {}
        for batch in self._update_batches():
            for kind, axis, size in self._update_traffic(batch):
                total = found.setdefault((kind, axis), [0, 0])
                total[0] += size
                total[1] += 1
        for (kind, axis), (size, calls) in found.items():
            yield Volume(kind, axis, "updates", size, calls, getattr(self.plan, axis))

    def _update_batches(self) -> Iterator[list[_Matrix]]:
        """Muon's matrices that travel at once."""
        plan = self.plan
        matrices = [w for stage in self.stages for w in stage.all if w.muon]
        dims = []
        for w in matrices:
            tp = {"tp": w.split} if plan.tp > 1 and w.split is not None else {}
            dims.append(tp | ({"fsdp": 0} if plan.sharded else {}))
        keys = [(w.shape, str(sorted(d.items()))) for w, d in zip(matrices, dims, strict=True)]
        for batch in matrix_batches(keys, batch_elements(plan, BATCH_ELEMENTS)):
            owner = owners([matrices[i].shape for i in batch], plan)
            yield [_Matrix(matrices[i].shape, dims[i], o) for i, o in zip(batch, owner, strict=True)]

    def _update_traffic(self, batch: list[_Matrix]) -> Iterator[tuple[str, str, int]]:
        """Kind, axis and bytes of each collective of a batch."""
        plan = self.plan
        there = 4  # momenta are fp32, updates bf16 on GPUs
        back = 2 if self.backend == "nccl" else 4
        for axis, outer in (("fsdp", ("dp",)), ("tp", ("dp", "fsdp"))):
            group, ways = self._owned_here(batch, outer), getattr(plan, axis)
            if ways == 1 or not group:
                continue
            travelling = [matrix for matrix in group if axis in matrix.dims]
            if travelling:
                sent = sum(self._part(matrix, axis, self.place[axis]) for matrix in travelling)
                yield "all-to-all", axis, sent * there
            # Back, a matrix's owner sends a part to everyone; of one that the axis does not divide, all of it.
            mine = self._owned_here(group, (axis,))
            sent = sum(self._part(matrix, axis, place) for matrix in mine for place in range(ways))
            yield "all-to-all", axis, sent * back
        if plan.dp > 1:
            each = [0] * plan.dp
            for matrix in batch:
                each[matrix.owner["dp"]] += self._part(matrix, "fsdp", self.place["fsdp"])
            yield "all-gather", "dp", plan.dp * max(each) * back

    def _owned_here(self, batch: list[_Matrix], axes: tuple[str, ...]) -> list[_Matrix]:
        """Matrices that fall to this process's place on these axes."""
        return [matrix for matrix in batch if all(matrix.owner[axis] == self.place[axis] for axis in axes)]

    def _part(self, matrix: _Matrix, axis: str, place: int) -> int:
        """Numbers of the part that travels along ``axis`` from or to ``place`` there: what is inside of it is whole."""
        dims = {name: dim for name, dim in matrix.dims.items() if axis == "fsdp" or name == axis}
        return math.prod(local_shape(matrix.shape, dims, self.plan, {**self.place, axis: place}))

    def _scalars(self) -> Iterator[Volume]:
        plan = self.plan
        yield Volume("all-reduce", "world", "loss", 8, 1, plan.processes)
        for axis in ("fsdp", "tp"):
            if getattr(plan, axis) > 1:
                yield Volume("all-reduce", axis, "norm", 4 * 8, 1, getattr(plan, axis))
        if plan.pp > 1:
            yield Volume("all-reduce", "pp", "norm", 8, 1, plan.pp)
        yield Volume("all-reduce", "world", "norm", 8, 1, plan.processes)


def _buckets(sizes: list[int], first: int) -> int:
    """All-reduces of DDP for parameters of these bytes: one of ``first``, then of 25 MiB each, last parameters first.

    DDP fills them in the order in which gradients come, which may differ from this a little.
    """
    count, limit, filled = 0, first, 0
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            count, limit, filled = count + 1, 25 << 20, 0
    return count + (filled > 0)


def wire_bytes(volume: Volume, backend: str = "nccl") -> float:
    """Bytes that one process sends where collectives run as rings of g processes.

    (g - 1) / g of the payload for all-gather, reduce-scatter and all-to-all, twice that for all-reduce; all of it
    point-to-point and for a broadcast. gloo runs a reduce-scatter as an all-reduce.
    """
    share = (volume.group - 1) / volume.group
    factor = {
        "all-gather": share,
        "reduce-scatter": 2 * share if backend == "gloo" else share,
        "all-to-all": share,
        "all-reduce": 2 * share,
        "broadcast": 1.0,
        "point-to-point": 1.0,
    }[volume.kind]
    return factor * volume.bytes
