r"""What a plan costs before it is run: seconds and bytes per device, by formula.

A step of one process, with M micro-batches of t tokens (t / tp of them here), pp pipeline processes of v stages each:

.. math:: T = \underbrace{M \max_r p_r}_{\text{work}} + \underbrace{\tfrac1v \bigl(\sum_r p_r - \max_r p_r\bigr)}_{\text{bubble}}
          + \text{exposed communication of the step} + \text{optimiser} + \text{overhead}

:math:`p_r` is the time of one micro-batch, forward and backward, on pipeline process r: matrix products, attention,
element-wise passes, the connection's passes, and the communication that a block waits for. Equal stages idle for the
known share :math:`(pp - 1) / (v M + pp - 1)`.

**Matrix products.** 2 operations a weight and token forwards, twice that backwards; attention 4 W (T + 1) / 2 a token
forwards, 2.5 times that backwards (scores are computed again). Divided by the rates of :class:`Hardware`.

**Element-wise passes** of a block, elements per token: rotation 4 W forwards and backwards, MLP 2 F forwards and 3 F
backwards; of the loss 24 bytes per entry of the vocabulary, 20 in fp32. Under autocast weights are cast once a micro-batch.

**The connection's traffic**, elements of D per token and sublayer, forwards / backwards (:func:`connection_traffic`):

=====================  ==================================================================================================
``prenorm``            4 / 4: sum and norm in one pass
``mgr-*``              2 n + 2 / 3 n + 3; with replay those of a window of w steps, over w; in the ramp a pool of l + 1
``hc*``, ``mhc*``      2 n + 2 / 3 n + 3: the same pass with other coefficients
``attnres``            k sources read one by one: k + 1 + 2 / 5 k + 5 (each source's gradient is added to the one it has).
                       In groups of readers (section 4 of its report) k counts once a group, the group's own sources in full
``attnres-block``      the same with k blocks
``highway*, review*``  7 / 10: gate and norm; their matrices count as products
``denseformer``        prenorm's; behind block i a sum of k = i + 1 outputs: k + 4 / 5 k + 5
``siamese``            15 / 22: two streams, three norms, one by one
``moda``               prenorm's; attention l reads 2 W numbers of each of l - 1 earlier sublayers, five times that backwards
=====================  ==================================================================================================

They are the floors of ``depthmix bench`` (:mod:`depthmix.bench.floor`) where that has one; ``Hardware.connection_share``
says how near to it a machine comes. The state of a pipeline's cut is :func:`depthmix.parallel.volume.crossing_numbers`.

**Communication** (:func:`volumes`) is what :mod:`depthmix.parallel.volume` counts, in closed form, and takes
``calls * ceil(log2 g) * latency + wire_bytes / bandwidth`` in groups of g. Assumed of overlap: gradients of dp hide
behind ``Hardware.overlap["dp"]`` of the last micro-batch's backward pass, FSDP's gathers and reductions behind that
share of the block they surround; tensor, expert and pipeline communication is waited for (torch's schedules wait for each
send and receive), and so are the all-to-alls of Muon.

**Experts.** ``ep`` of the dp x fsdp processes share the experts of each block. Two all-to-alls of ``active`` copies of each
token forwards and two backwards; experts are balanced, an assumption.

**Optimiser.** Muon: five iterations of ``4 r^2 c + 2 r^3`` operations for a matrix with sides r <= c, whole matrices divided
among dp x fsdp x tp processes; 14 passes of fp32 over a process's matrices, AdamW 7 over the rest, clipping 3 over all.

**Memory** of a process: parameters, gradients and states (Muon 1 number, AdamW 2; in bf16 also fp32 masters; gradients are
fp32 as they add up), FSDP's two gathered blocks, activations of the micro-batches in flight (gpipe M, 1f1b ``min(M, pp -
r)``, interleaved ``min(v M, 2 (pp - r - 1) + (v - 1) pp + 1)`` stages) and of the loss, receive buffers of the pipeline for all M
micro-batches (torch allocates them at the start). A block keeps, elements per token: ``2 D`` states, ``2 D`` normed inputs
(whole sequences under tp), ``7 W`` and ``2 F``; the connection's addition is :func:`connection_saved`. With activation
checkpointing a block keeps what enters, and one block at a time the rest.
"""

import dataclasses
import functools
import itertools
import json
import math
from dataclasses import dataclass, field

import numpy as np

from ..bench import floor
from ..config import GPTConfig, TrainConfig
from ..errors import UserError
from . import volume
from .hardware import Hardware
from .plan import ParallelPlan, stage_blocks
from .shape import Shape
from .volume import Volume, wire_bytes

APART = ("fsdp", "tp with dp")
MGR = ("mgr-independent", "mgr-competitive", "mgr-review")
HYPER = ("hc-static", "hc", "mhc", "mhc-lite")
GATES = ("highway", "highway-additive", "review", "review-convex")


@dataclass(frozen=True)
class Job:
    """What is to be trained: dimensions, connection, batch. Raises ``UserError`` where they do not belong together."""

    shape: Shape
    model: GPTConfig
    """What the connection sees: depth, width, heads, sequence length, its options."""
    batch_size: int
    """Sequences a step."""
    micro_batch: int = 0
    """Sequences a forward pass of one process; 0: as :class:`ParallelPlan` chooses."""
    precision: str = "bf16"
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self):
        same = self.shape.layers == self.model.n_layer and self.shape.width == self.model.d_model
        if not same:
            raise UserError(
                f"job: the shape has {self.shape.layers} blocks of width {self.shape.width}, the model "
                f"{self.model.n_layer} of {self.model.d_model}; make the model with shape.model()"
            )
        if self.batch_size < 1:
            raise UserError(f"job: batch_size must be at least 1 sequence, got {self.batch_size}")

    @classmethod
    def of(cls, config: TrainConfig) -> "Job":
        """The job of a training that depthmix runs."""
        return cls(
            Shape.of(config.model),
            config.model,
            config.batch_size,
            config.micro_batch,
            config.precision,
            config.activation_checkpointing,
            config.compile,
        )

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.model.seq_len

    @property
    def weight_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def state_bytes(self) -> int:
        """Of a number of the connection's state."""
        return 2 if self.precision == "bf16" else 4

    @property
    def compute_bytes(self) -> int:
        """Of a number that a matrix product makes."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and bytes of the fullest device."""

    job: Job
    plan: ParallelPlan
    hardware: str
    ep: int
    micro_batch: int
    micro_batches: int
    step: float
    """Seconds of an optimiser step."""
    compute: float
    """Of them, matrix products, attention and element-wise passes of the slowest pipeline process."""
    connection: float
    """The residual connection's own passes."""
    optimizer: float
    overhead: float
    bubble: float
    exposed: dict[str, float]
    """Communication that nothing hides, by axis."""
    memory: dict[str, float]
    """Bytes by kind, of the process that needs most."""
    available: float
    """Bytes that may be used."""
    volumes: tuple[Volume, ...] = field(repr=False, default=())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.available

    @property
    def communication(self) -> float:
        """Exposed, all axes."""
        return sum(self.exposed.values())

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.step

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens / self.step

    def to_dict(self) -> dict:
        """Plain JSON types."""
        job = self.job
        return {
            "residual": job.model.label,
            "n_streams": job.model.n_streams,
            "plan": str(self.plan),
            "ep": self.ep,
            "micro_batch": self.micro_batch,
            "micro_batches": self.micro_batches,
            "activation_checkpointing": job.activation_checkpointing,
            "step_s": self.step,
            "tokens_per_s": self.tokens_per_second,
            "compute_s": self.compute,
            "connection_s": self.connection,
            "optimizer_s": self.optimizer,
            "overhead_s": self.overhead,
            "bubble_s": self.bubble,
            "bubble_share": self.bubble_share,
            "exposed_communication_s": dict(self.exposed),
            "memory_bytes": {**self.memory, "total": self.total_memory},
            "fits": self.fits,
            "sent_bytes": {
                f"{v.axis} {v.kind} {v.what}" + ("" if v.boundary is None else f" {v.boundary}{v.direction[:1]}"): v.bytes
                for v in self.volumes
            },
        }


# --- what the connection adds ---------------------------------------------------------------------


def connection_traffic(model: GPTConfig, sublayer: int, *, apart: bool = False) -> tuple[float, float]:
    """Elements of D per token that ``sublayer`` (1 .. L) moves for the connection: forward, backward.

    ``apart``: blocks cannot read each other's parameters (FSDP), so Attention Residuals read every source each time.
    """
    name, n = model.residual, model.n_streams
    if name in MGR:
        if sublayer < n:
            pool = floor.pool(sublayer + 1)
            return pool["forward"].total + 2, pool["backward"].total + 2
        if model.stream_memory == "replay":
            return _window(n, model.replay_window)
        step = floor.step(n)
        return step["forward"].total, step["backward"].total
    if name in HYPER:
        step = floor.step(n)
        return step["forward"].total, step["backward"].total
    if name in ("attnres", "attnres-block"):
        return _sources(_key(model), apart)[sublayer - 1]
    if name in GATES:
        return 7.0, 10.0
    if name == "siamese":
        return 15.0, 22.0
    if name == "denseformer" and sublayer % 2 == 0:
        k = model.residual_options.get("dilation", 1)
        period = model.residual_options.get("period", 1)
        block = sublayer // 2
        if block % period == 0:
            read = block // k + 1
            return read + 4.0, 5.0 * read + 5
    if name == "moda" and sublayer % 2:
        read = 2 * (sublayer - 1) * model.attention_width / model.d_model
        return 4.0 + read, 4.0 + 5 * read
    return 4.0, 4.0


@functools.cache
def _window(n: int, steps: int) -> tuple[float, float]:
    found = floor.window(n, steps)
    return found["forward"].total / steps, found["backward"].total / steps


@functools.lru_cache(maxsize=256)
def _sources(key: str, apart: bool) -> list[tuple[float, float]]:
    model = GPTConfig(**json.loads(key))
    counts = [
        sum(1 for _ in volume.crossing_values(model, s)) if s < model.n_sublayers else 0
        for s in range(1, model.n_sublayers + 1)
    ]
    counts[-1] = counts[-2] + (model.residual == "attnres")
    if apart:
        return [(k + 3.0, 5.0 * k + 5) for k in counts]
    from ..residuals.attnres import reader_groups

    starts = [b > a for a, b in itertools.pairwise([1, *counts])]
    traffic = []
    for first, size in reader_groups(starts):
        finished = 1 + sum(starts[:first])
        for i in range(size):
            fresh = counts[first + i] - finished
            # The finished sources once a group, a mean for every reader written and read; fresh ones each time.
            traffic.append((finished / size + fresh + 5.0, 5 * finished / size + 5 * fresh + 7.0))
    return traffic


def connection_saved(job: Job) -> float:
    """Bytes per token and *block* that the connection keeps for the backward pass, over PreNorm's.

    State numbers of s bytes and computed ones of c: MGR an anchor of n D every w sublayers and y instead of the sum;
    Attention Residuals a source each; Hyper-Connections the streams and y; Highway and Review gate (fp32) and y.
    """
    model, s, c = job.model, job.state_bytes, job.compute_bytes
    D, n, name = model.d_model, model.n_streams, model.residual
    if name in MGR:
        kept = {"store": 2 * n, "replay": 2 * n / model.replay_window, "inversion": 2 * n * model.inversion_top_p}
        return D * (kept[model.stream_memory] * s + 2 * (c - s))
    return D * {
        **dict.fromkeys(HYPER, 2 * n * s + 2 * c),
        **dict.fromkeys(GATES, 8 + 2 * c),
        "attnres": 2 * s,
        "attnres-block": 2 * s,
        "denseformer": s,
        "siamese": 4 * s,
        "moda": 2 * c + (s - c),
    }.get(name, 0)


def _carried(model: GPTConfig) -> float:
    """Elements of D that are new in the state behind each block: what checkpointing keeps of it."""
    name = model.residual
    if name in MGR or name in HYPER:
        return model.n_streams
    if name == "moda":
        return 1 + 4 * model.attention_width / model.d_model
    return {"siamese": 2, "attnres": 2, "attnres-block": 2}.get(name, 1)


# --- a job once, for all plans --------------------------------------------------------------------


def _key(model: GPTConfig) -> str:
    return json.dumps(dataclasses.asdict(model), sort_keys=True)


class _Counted:
    """Sums over sublayers and blocks that all plans of a job share. Arrays have one entry a block."""

    def __init__(self, shape: Shape, model: GPTConfig):
        L, D, W = model.n_sublayers, model.d_model, model.attention_width
        beginning, sites = volume._connection_weights(model)
        self.beginning = sum(math.prod(w.shape) for w in beginning)

        def numbers(site, wanted):
            return sum(math.prod(w.shape) for w, _ in site if wanted(w))

        split = np.array([numbers(s, lambda w: w.split is not None) for s in sites], float)
        whole = np.array([numbers(s, lambda w: w.split is None) for s in sites], float)
        times = model.n_streams if model.residual == "hc" else 1
        products = np.array([numbers(s, lambda w: len(w.shape) > 1) for s in sites], float) * times
        if model.residual == "hc-static":  # its matrices are n x n: part of the passes
            products[:] = 0

        def blocks(each):
            return each.reshape(-1, 2).sum(1)

        self.matrices = (shape.block_matrices + 4 * D * (W - D)) + blocks(split)  # numbers that tp divides
        self.whole = 2 * D + blocks(whole)
        self.products = (
            (shape.block_matrices + 4 * D * (W - D))
            + shape.block_experts * shape.active / shape.experts
            + blocks(products)
        )
        self.traffic = {
            apart: np.array([connection_traffic(model, s, apart=apart) for s in range(1, L + 1)])
            .reshape(-1, 2, 2)
            .sum(1)
            for apart in (False, True)
        }
        self.crossing = [volume.crossing_numbers(model, 2 * (b + 1)) for b in range(model.n_layer - 1)]
        F = shape.ffn
        self.shapes = [(3 * W, D), (D, W)] + ([(F, D), (D, F)] if shape.experts == 1 else [])
        self.muon_split = blocks(split)


@functools.lru_cache(maxsize=128)
def _counted_of(shape: Shape, key: str) -> _Counted:
    return _Counted(shape, GPTConfig(**json.loads(key)))


class _Priced:
    """A job on a machine: seconds per token of every block, before any division."""

    def __init__(self, job: Job, hardware: Hardware):
        shape, model = job.shape, job.model
        D, W, F, V, T = model.d_model, model.attention_width, shape.ffn, shape.vocab, model.seq_len
        self.counted = counted = _counted_of(shape, _key(model))
        rate, band, c, s = hardware.matmul_flops(D), hardware.bandwidth, job.compute_bytes, job.state_bytes
        attention = 4 * W * (T + 1) / 2 / hardware.attention_flops
        self.forward = 2 * counted.products / rate + attention + (4 * W + 2 * F * shape.active) * c / band
        self.backward = 4 * counted.products / rate + 2.5 * attention + (4 * W + 3 * F * shape.active) * c / band
        per_element = D * s / (band * hardware.share(model.residual))
        self.connection = {apart: moved * per_element for apart, moved in counted.traffic.items()}
        loss = V * (20 if job.precision == "fp32" else 24) / band
        self.head = 6 * D * V / rate + loss  # forward and backward
        # Weights are cast once a micro-batch, whatever its tokens.
        weights = counted.matrices + shape.block_experts
        self.cast = 6 * weights / band if job.precision == "autocast" else 0 * weights
        self.overhead_connection = hardware.connection_overhead.get(
            model.residual, hardware.connection_overhead.get("", 0.0)
        )


# --- one plan -------------------------------------------------------------------------------------


def _apart(plan: ParallelPlan) -> bool:
    return plan.fsdp > 1 or (plan.tp > 1 and plan.dp > 1)


def _stages(job: Job, plan: ParallelPlan) -> list[list[range]]:
    """The blocks of every pipeline process, by stage."""
    blocks = stage_blocks(job.shape.layers, plan.stages)
    return [[blocks[s] for s in plan.stages_of(r)] for r in range(plan.pp)]


def check(job: Job, plan: ParallelPlan, ep: int = 1) -> None:
    """Raise ``UserError`` for a plan that cannot run this job."""
    plan.check(job)  # type: ignore[arg-type]
    shape = job.shape
    if shape.ffn % plan.tp:
        raise UserError(f"parallel: tp = {plan.tp} must divide the hidden features of an MLP, {shape.ffn}")
    nested = ep >= 1 and (plan.fsdp % ep == 0 or ep % plan.fsdp == 0)
    if ep < 1 or plan.data_ways % ep or shape.experts % ep or not nested:
        raise UserError(
            f"parallel: ep = {ep} must divide both dp x fsdp = {plan.data_ways} and experts = {shape.experts}, and be a "
            f"factor or a multiple of fsdp = {plan.fsdp}; choose another ep"
        )


class _Ranks:
    """Counts of every pipeline process of a plan, one entry a process."""

    def __init__(self, job: Job, plan: ParallelPlan, counted: _Counted):
        self.stages = _stages(job, plan)
        V, D = job.shape.vocab, job.model.d_model

        def total(array):
            return np.array([sum(float(array[b.start : b.stop].sum()) for b in own) for own in self.stages])

        self.total = total
        self.blocks = total(np.ones(job.shape.layers))
        self.matrices = total(counted.matrices)
        self.experts = self.blocks * job.shape.block_experts
        rest = np.zeros(plan.pp)
        rest[0] += V * D + counted.beginning
        last = (plan.stages - 1) % plan.pp
        if plan.stages > 1:
            rest[last] += V * D
        rest[last] += D
        self.rest, self.last = rest, last
        self.in_blocks = total(counted.whole)
        self.whole = self.in_blocks + rest


def volumes(job: Job, plan: ParallelPlan, ep: int = 1, rank: int | None = None) -> list[Volume]:
    """What one process of pipeline place ``rank`` sends in a step; ``None``: the largest over all places.

    The closed form of :func:`depthmix.parallel.volume.step_volume` (which rounds shards up to whole rows), with Muon's
    updates and the all-to-all of experts besides, without scalars. ``ep`` appears as an axis.
    """
    counted = _counted_of(job.shape, _key(job.model))
    ranks = _Ranks(job, plan, counted)
    places = range(plan.pp) if rank is None else [rank]
    largest: dict[tuple, Volume] = {}
    for r in places:
        for found in _volumes(job, plan, ep, counted, ranks, r):
            key = found.kind, found.axis, found.what, found.boundary, found.direction
            if key not in largest or largest[key].bytes < found.bytes:
                largest[key] = found
    return [v for v in largest.values() if v.bytes]


def _volumes(job: Job, plan: ParallelPlan, ep: int, counted: _Counted, ranks: _Ranks, r: int):
    e, M, blocks = job.weight_bytes, plan.micro_batches(job), int(ranks.blocks[r])
    tokens = plan.micro_batch(job) * job.model.seq_len
    tp, dp, fsdp = plan.tp, plan.dp, plan.fsdp
    dense_blocks = ranks.matrices[r] / tp + ranks.in_blocks[r]
    rest = ranks.rest[r]
    # Experts: ep takes the places of fsdp first.
    expert_fsdp = max(1, fsdp // ep)
    expert_dp = plan.data_ways // max(fsdp, ep)
    experts = ranks.experts[r] / ep / tp
    if _apart(plan):
        times = 1 if plan.pp > 1 else M
        gathered = 2 * M * dense_blocks + times * rest
        reduced = times * (dense_blocks + rest)
        units = blocks + (rest > 0) * len(ranks.stages[r])
        if fsdp > 1:
            yield Volume("all-gather", "fsdp", "parameters", round(gathered * e), 2 * M * blocks + times, fsdp)
            yield Volume("reduce-scatter", "fsdp", "gradients", round(reduced * e), times * units, fsdp)
        if dp > 1:
            yield Volume("all-reduce", "dp", "gradients", round(reduced * e / fsdp), times * units, dp)
        if experts and expert_fsdp > 1:
            yield Volume(
                "all-gather", "fsdp", "experts", round(2 * M * experts * e), 2 * M * blocks, expert_fsdp
            )
            yield Volume(
                "reduce-scatter", "fsdp", "expert gradients", round(times * experts * e), times * blocks, expert_fsdp
            )
    elif dp > 1:
        times = M if job.precision == "bf16" and plan.pp == 1 else 1
        yield Volume("all-reduce", "dp", "gradients", round(times * (dense_blocks + rest) * e), times, dp)
    if experts and expert_dp > 1:
        part = experts / expert_fsdp * e
        yield Volume("all-reduce", "dp", "expert gradients", round(part), 1, expert_dp)
    if ep > 1:
        sent = 4 * M * blocks * tokens / tp * job.shape.active * job.model.d_model * job.compute_bytes
        yield Volume("all-to-all", "ep", "tokens", round(sent), 4 * M * blocks, ep)
    if tp > 1:
        calls = 4 * M * blocks
        one = tokens * job.model.d_model * e
        yield Volume("all-gather", "tp", "sequence", calls * one, calls, tp)
        yield Volume("reduce-scatter", "tp", "sequence", calls * one, calls, tp)
        if job.model.residual == "moda":
            extra = M * blocks
            yield Volume("all-gather", "tp", "memory", extra * one, extra, tp)
            yield Volume("reduce-scatter", "tp", "memory", extra * one, extra, tp)
        yield Volume("all-reduce", "tp", "gradients", round((ranks.in_blocks[r] + rest) / fsdp * 4), 1, tp)
    if plan.stages > 1:
        for stage in plan.stages_of(r):
            for cut, direction in ((stage, "forward"), (stage - 1, "backward")):
                if 0 <= cut < plan.stages - 1:
                    sent, pieces = _boundary(job, plan, cut)
                    yield Volume(
                        "point-to-point", "pp", "state", M * sent * tokens // tp, M * pieces, 2, cut, direction
                    )
        if r in (0, ranks.last) and ranks.last:
            tied = job.shape.vocab * job.model.d_model / fsdp
            yield Volume("all-reduce", "tied", "gradients", round(tied * e), 1, 2)
    ways = dp * fsdp * tp
    if ways > 1:  # Muon's matrices, fp32, there and back
        held = ranks.matrices[r] / (tp * fsdp)
        if fsdp * tp > 1:
            axis = "fsdp" if fsdp > 1 else "tp"
            yield Volume("all-to-all", axis, "updates", round(2 * 4 * held / dp), 2 * 4, fsdp * tp)
        if dp > 1:
            yield Volume("all-gather", "dp", "updates", round(4 * held), 4, dp)


@functools.lru_cache(maxsize=65536)
def _boundary_of(key: str, precision: str, layers: int, pp: int, stages: int, schedule: str, cut: int):
    model = GPTConfig(**json.loads(key))
    plan = ParallelPlan(pp=pp, stages=stages, schedule=schedule)
    values = volume.sent_values(model, plan, cut, schedule == "interleaved")
    wide, narrow = 2 if precision == "bf16" else 4, 4 if precision == "fp32" else 2
    each = sum(numbers * (narrow if name[0] in ("key", "value") else wide) for name, numbers in values)
    return each, len(values)


def _boundary(job: Job, plan: ParallelPlan, cut: int) -> tuple[int, int]:
    """Bytes per token sent over ``cut``, one way, and in how many tensors."""
    return _boundary_of(
        _key(job.model), job.precision, job.shape.layers, plan.pp, plan.stages, plan.schedule, cut
    )


def _seconds(found: Volume, hardware: Hardware, stride: int) -> float:
    band, latency = hardware.link(stride, found.group)
    hops = math.ceil(math.log2(found.group)) if found.group > 1 else 0
    return found.calls * hops * latency + wire_bytes(found) / band


def _strides(plan: ParallelPlan) -> dict[str, int]:
    """How far apart neighbours on an axis are, in ranks."""
    whole = plan.tp * plan.fsdp * plan.dp
    return {"tp": 1, "fsdp": plan.tp, "ep": plan.tp, "dp": plan.tp * plan.fsdp, "pp": whole, "tied": whole}


def estimate(job: Job | TrainConfig, plan: ParallelPlan, hardware: Hardware, ep: int = 1) -> Estimate:
    """Time and memory of a step, as the module's equations say. Raises ``UserError`` for a plan that cannot run."""
    if isinstance(job, TrainConfig):
        job = Job.of(job)
    check(job, plan, ep)
    return _estimate(job, plan, hardware, ep, _Priced(job, hardware))


def _estimate(job: Job, plan: ParallelPlan, hardware: Hardware, ep: int, priced: _Priced) -> Estimate:
    counted = priced.counted
    ranks = _Ranks(job, plan, counted)
    M, rows = plan.micro_batches(job), plan.micro_batch(job)
    tokens = rows * job.model.seq_len / plan.tp  # of a micro-batch, on one process
    again = 1 if job.activation_checkpointing else 0
    v = plan.stages // plan.pp
    strides = _strides(plan)
    sent = [list(_volumes(job, plan, ep, counted, ranks, r)) for r in range(plan.pp)]

    # Seconds of a micro-batch on every pipeline process.
    total = ranks.total
    forward, backward = tokens * total(priced.forward), tokens * total(priced.backward)
    cast = total(priced.cast) / plan.tp
    moved = priced.connection[_apart(plan)]
    written, read = tokens * total(moved[:, 0]), tokens * total(moved[:, 1])
    head = np.zeros(plan.pp)
    head[ranks.last] = tokens * priced.head
    compute = (1 + again) * forward + backward + head + cast
    connection = (1 + again) * written + read
    overhead = ranks.blocks * _block_overhead(hardware, plan) * (1 + again / 3)
    overhead = overhead + 2 * ranks.blocks * priced.overhead_connection

    waited = {axis: np.zeros(plan.pp) for axis in ("tp", "ep", "fsdp", "pp")}
    at_end = {axis: np.zeros(plan.pp) for axis in ("dp", "fsdp", "tp", "tied")}
    for r, own in enumerate(sent):
        hidden = hardware.overlap.get("fsdp", 0.0)
        ahead, behind = (1 + again) * forward[r] + written[r], backward[r] + read[r]
        gather = reduce = 0.0
        for found in own:
            seconds = _seconds(found, hardware, strides[found.axis])
            if found.axis in ("tp", "ep", "pp") and found.what in ("sequence", "tokens", "state", "memory"):
                waited[found.axis][r] += seconds / M
            elif found.axis == "fsdp" and found.what in ("parameters", "experts"):
                gather += seconds / M
            elif found.axis == "fsdp" and found.what.endswith("gradients"):
                reduce += seconds / M
            elif found.axis == "dp" and found.what.endswith("gradients"):
                last = (backward[r] + read[r]) * hardware.overlap.get("dp", 0.0)
                at_end["dp"][r] += max(0.0, seconds - last)
            else:
                at_end[found.axis][r] += seconds
        # Half of the gathers before the forward, half before the backward pass.
        waited["fsdp"][r] = max(0.0, gather / 2 - hidden * ahead) + max(0.0, gather / 2 + reduce - hidden * behind)

    work = compute + connection + overhead + sum(waited.values())
    slow = int(work.argmax())
    bubble = float(work.sum() - work[slow]) / v
    optimizer = max(_optimizer(job, plan, hardware, counted, ranks, r) for r in range(plan.pp))
    exposed = {axis: M * float(each[slow]) for axis, each in waited.items()}
    for axis, each in at_end.items():
        exposed[axis] = exposed.get(axis, 0.0) + float(each.max())
    exposed = {axis: seconds for axis, seconds in exposed.items() if seconds > 0}
    late = sum(float(each.max()) for each in at_end.values())
    step = M * float(work[slow]) + bubble + late + optimizer + hardware.step_overhead
    memory = _memory(job, plan, ep, ranks, M, rows)
    return Estimate(
        job=job,
        plan=plan,
        hardware=hardware.name,
        ep=ep,
        micro_batch=rows,
        micro_batches=M,
        step=step,
        compute=M * float(compute[slow]),
        connection=M * float(connection[slow]),
        optimizer=optimizer,
        overhead=M * float(overhead[slow]) + hardware.step_overhead,
        bubble=bubble,
        exposed=exposed,
        memory=memory,
        available=hardware.memory * hardware.usable,
        volumes=tuple(itertools.chain.from_iterable(sent[:1] if plan.pp == 1 else sent)),
    )


def _block_overhead(hardware: Hardware, plan: ParallelPlan) -> float:
    table = hardware.block_overhead
    base = table.get("", 0.0)
    axes = [axis for axis in ("dp", "fsdp", "tp", "pp") if getattr(plan, axis) > 1]
    return base + sum(max(0.0, table.get(axis, base) - base) for axis in axes)


def _optimizer(
    job: Job, plan: ParallelPlan, hardware: Hardware, counted: _Counted, ranks: _Ranks, r: int
) -> float:
    ways = plan.dp * plan.fsdp * plan.tp
    blocks, band = int(ranks.blocks[r]), hardware.bandwidth
    seconds = 0.0
    for rows, cols in counted.shapes:
        small, large = min(rows, cols), max(rows, cols)
        flops = 5 * (4 * small**2 * large + 2 * small**3)
        seconds += -(-blocks // ways) * flops / hardware.matmul_flops(small)
    shape = job.shape
    if shape.experts > 1:
        small, large = min(shape.ffn, shape.width), max(shape.ffn, shape.width)
        flops = 5 * (4 * small**2 * large + 2 * small**3)
        count = 2 * shape.experts * blocks
        seconds += -(-count // ways) * flops / hardware.matmul_flops(small)
    extra = ranks.total(counted.muon_split)[r]
    seconds += 30 * extra * job.model.d_model / ways / hardware.matmul_flops(job.model.d_model)
    shard = plan.tp * plan.fsdp
    muon = ranks.matrices[r] / shard + ranks.experts[r] / min(ways, shard * max(1, shape.experts))
    adamw = ranks.whole[r] / plan.fsdp
    return seconds + 4 * (14 * muon + 7 * adamw + 3 * (muon + adamw)) / band


def _memory(job: Job, plan: ParallelPlan, ep: int, ranks: _Ranks, M: int, rows: int) -> dict[str, float]:
    """Bytes by kind of the pipeline process that needs most."""
    shape, model, c, s = job.shape, job.model, job.compute_bytes, job.state_bytes
    D, W, V, tp, fsdp = model.d_model, model.attention_width, shape.vocab, plan.tp, plan.fsdp
    e, tokens, v = job.weight_bytes, rows * model.seq_len, plan.stages // plan.pp
    experts_over = tp * max(ep, fsdp)
    kept_block = 2 * D * s / tp + 2 * D * c + (7 * W + 2 * shape.ffn * shape.active) * c / tp
    kept_block += connection_saved(job) / tp
    entering = (1 + _carried(model)) * D * s / tp
    found = []
    for r in range(plan.pp):
        matrices = ranks.matrices[r] / (tp * fsdp) + ranks.experts[r] / experts_over
        whole = ranks.whole[r] / fsdp
        held = matrices + whole
        masters = 4 * held if job.precision == "bf16" else 0.0
        largest = max(len(b) for own in ranks.stages for b in own)
        gathered = 0.0
        if fsdp > 1:
            block = (ranks.matrices[r] / tp + ranks.in_blocks[r] + ranks.experts[r] / ep / tp) / max(
                1, ranks.blocks[r]
            )
            gathered = (min(2, ranks.blocks[r]) * block + ranks.rest[r]) * e
        if plan.stages == 1:
            flight, per_flight = 1, float(ranks.blocks[r])
        elif plan.schedule == "gpipe":
            flight, per_flight = M, float(ranks.blocks[r])
        elif plan.schedule == "1f1b":
            flight, per_flight = min(M, plan.pp - r), float(ranks.blocks[r])
        else:
            flight = min(v * M, 2 * (plan.pp - r - 1) + (v - 1) * plan.pp + 1)
            per_flight = float(largest)
        blocks_kept = flight * per_flight
        if job.activation_checkpointing:
            kept = tokens * (blocks_kept * entering + kept_block)
        else:
            kept = tokens * blocks_kept * kept_block
        if r == ranks.last:
            # The logarithms of probabilities are kept, one gradient and one copy of the logits exist besides.
            chunks = flight if plan.stages > 1 and plan.schedule == "gpipe" else 1
            kept += tokens / tp * V * (4 * chunks + 4 + c)
        buffers = 0.0
        if plan.stages > 1:
            for stage in plan.stages_of(r):
                for cut in (stage - 1, stage):
                    if 0 <= cut < plan.stages - 1:
                        buffers += M * tokens / tp * _boundary(job, plan, cut)[0]
        found.append(
            {
                "parameters": e * held,
                "gradients": 4 * held,
                "optimizer": 4 * matrices + 8 * whole + masters,
                "gathered": gathered,
                "activations": float(kept),
                "buffers": buffers,
            }
        )
    return max(found, key=lambda each: sum(each.values()))


# --- the best plan --------------------------------------------------------------------------------


def divisors(n: int) -> list[int]:
    """From 1 to n."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def candidates(
    job: Job, hardware: Hardware, gpus: int, *, checkpointing: bool | None = None
) -> list[tuple[Job, ParallelPlan, int]]:
    """Every ``(job, plan, ep)`` that :func:`search` looks at, each valid.

    tp within a node, micro-batches of 1, 2, 4, ... 64 sequences where ``job.micro_batch`` leaves the choice, interleaved
    stages where they divide the blocks equally, up to eight a process, gpipe where there are too few micro-batches for 1f1b.
    """
    found = []
    shape = job.shape
    remat = (False, True) if checkpointing is None else (checkpointing,)
    for tp in divisors(gpus):
        if tp > hardware.devices_per_node or job.model.n_head % tp or shape.ffn % tp or job.model.seq_len % tp:
            continue
        for pp in divisors(gpus // tp):
            ways = gpus // tp // pp
            if pp > shape.layers or job.batch_size % ways:
                continue
            local = job.batch_size // ways
            sizes = [job.micro_batch] if job.micro_batch else [2**i for i in range(7)]
            for rows in (size for size in sizes if local % size == 0):
                M = local // rows
                if pp == 1:
                    schedules = [("1f1b", 1)]
                else:
                    schedules = [("1f1b", pp)] if M >= pp else [("gpipe", pp)]
                    if M % pp == 0:
                        chunks = (v for v in range(2, 9) if shape.layers % (pp * v) == 0)
                        schedules += [("interleaved", pp * v) for v in chunks]
                for schedule, stages in schedules:
                    for fsdp in divisors(ways):
                        plan = ParallelPlan(
                            dp=ways // fsdp, fsdp=fsdp, tp=tp, pp=pp, schedule=schedule, stages=stages
                        )
                        shared = [
                            ep
                            for ep in divisors(math.gcd(ways, shape.experts))
                            if fsdp % ep == 0 or ep % fsdp == 0
                        ]
                        for again in remat:
                            one = dataclasses.replace(job, micro_batch=rows, activation_checkpointing=again)
                            found += [(one, plan, ep) for ep in shared]
    return found


def search(
    job: Job, hardware: Hardware, gpus: int, *, keep: int = 1, checkpointing: bool | None = None
) -> list[Estimate]:
    """The ``keep`` fastest estimates of all :func:`candidates` that fit the memory, fastest first.

    A candidate whose work alone, perfectly divided, takes longer than the estimates at hand is not looked at; this loses
    none. Ties go to the plan that comes first in ``(step, str(plan), micro_batch)``.

    Raises ``UserError`` where nothing fits, naming what is missing.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    found = candidates(job, hardware, gpus, checkpointing=checkpointing)
    if not found:
        raise UserError(
            f"no plan divides {gpus} devices for {job.batch_size} sequences a step, {job.shape.layers} blocks and "
            f"{job.model.n_head} heads; dp x fsdp must divide the sequences, pp be at most the blocks: change --gpus or "
            f"--batch-tokens"
        )
    priced = _Priced(job, hardware)
    bounds = sorted(
        ((_bound(one, plan, priced), i) for i, (one, plan, _) in enumerate(found)), key=lambda pair: pair
    )
    best: list[tuple[tuple, Estimate]] = []
    leanest = None
    for bound, i in bounds:
        if len(best) >= keep and bound > best[keep - 1][0][0]:
            break
        one, plan, ep = found[i]
        ranks = None
        if best or leanest is not None:  # memory first: it is the cheaper half
            ranks = _Ranks(one, plan, priced.counted)
            memory = _memory(one, plan, ep, ranks, plan.micro_batches(one), one.micro_batch)
            needed = sum(memory.values())
            if needed > hardware.memory * hardware.usable:
                if leanest is None or needed < leanest[0]:
                    leanest = needed, memory, one, plan
                continue
        result = _estimate(one, plan, hardware, ep, priced)
        if not result.fits:
            if leanest is None or result.total_memory < leanest[0]:
                leanest = result.total_memory, result.memory, one, plan
            continue
        best.append(((result.step, str(plan), one.micro_batch, ep, one.activation_checkpointing), result))
        best = sorted(best, key=lambda pair: pair[0])[:keep]
    if not best:
        needed, memory, one, plan = leanest
        part = max(memory, key=memory.get)
        raise UserError(
            f"residual {job.model.label}: nothing fits {gpus} x {hardware.name} with {hardware.memory / 1e9:.0f} GB each "
            f"({hardware.usable:.0%} usable): the leanest of {len(found)} plans, {plan} with micro_batch="
            f"{one.micro_batch}, needs {needed / 1e9:.1f} GB, {memory[part] / 1e9:.1f} of them {part}; use more or larger "
            f"devices, a shorter --seq-len, or a smaller model"
        )
    return [result for _, result in best]


def _bound(job: Job, plan: ParallelPlan, priced: _Priced) -> float:
    """Seconds that the step takes at least: all work divided equally, and the bubble of equal stages."""
    again = 1 if job.activation_checkpointing else 0
    moved = priced.connection[_apart(plan)]
    each = (
        (1 + again) * (priced.forward.sum() + moved[:, 0].sum())
        + priced.backward.sum()
        + moved[:, 1].sum()
        + priced.head
    )
    M, v = plan.micro_batches(job), plan.stages // plan.pp
    tokens = job.micro_batch * job.model.seq_len / plan.tp
    return float(tokens * each / plan.pp * (M + (plan.pp - 1) / v))
