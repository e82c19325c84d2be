r"""What a plan costs before it is run: seconds and bytes per device, by formula.

A step of one process, with M micro-batches of t tokens (t / tp of them here), pp pipeline processes of v stages each:

.. math:: T = \underbrace{M \max_r p_r}_{\text{work}}
          + \underbrace{\tfrac1v \bigl(\sum_r p_r - \max_r p_r\bigr)}_{\text{bubble}}
          + \text{exposed communication of the step} + \text{optimiser} + \text{overhead}

:math:`p_r` is the time of one micro-batch, forward and backward, on pipeline process r: matrix products, attention,
element-wise passes, the connection's passes, and the communication that a block waits for. Equal stages idle for the
known share :math:`(pp - 1) / (v M + pp - 1)`.

**Matrix products.** 2 operations a weight and token forwards, twice that backwards; attention 4 W (T + 1) / 2 a token
forwards, 2.5 times that backwards (scores are computed again). Divided by the rates of :class:`Hardware`.

**Element-wise passes** of a block, elements per token: rotation 4 W forwards and backwards, MLP 2 F forwards and 3 F
backwards; of the loss 24 bytes per entry of the vocabulary, 20 in fp32. Under autocast weights are cast once a
micro-batch.

**The connection's traffic**, elements of D per token and sublayer, forwards / backwards (:func:`connection_traffic`):

=====================  =================================================================================================
``prenorm``            4 / 4: sum and norm in one pass
``mgr-*``              2 n + 2 / 3 n + 3; with replay those of a window of w steps, over w; in the ramp a pool of l + 1.
                       Separate streams: a step on n / 2 of them and a pool of n
``hc*``, ``mhc*``      2 n + 2 / 3 n + 3: the same pass with other coefficients
``attnres``            k sources read one by one: k + 3 / 5 k + 5 (a source's gradient is added to the one it has). In
                       groups of readers (section 4 of its report) k counts once a group, its own sources in full
``attnres-block``      the same with k blocks
``highway*, review*``  7 / 10: gate and norm; their matrices count as products
``denseformer``        prenorm's; behind block i a sum of k = i + 1 outputs: k + 4 / 5 k + 5
``siamese``            15 / 22: two streams, three norms, one by one
``moda``               prenorm's; attention l reads 2 W numbers of each of l - 1 sublayers, backwards five times that
=====================  =================================================================================================

They are the floors of ``depthmix bench`` (:mod:`depthmix.bench.floor`) where that has one;
``Hardware.connection_share`` says how near to it a machine comes. What crosses a pipeline's cut is
:func:`depthmix.parallel.volume.crossing_numbers`.

**Communication** (:func:`volumes`) is what :mod:`depthmix.parallel.volume` counts, in closed form, and takes
``calls * ceil(log2 g) * latency + wire_bytes / bandwidth`` in groups of g. Assumed of overlap: gradients of dp hide
behind ``Hardware.overlap["dp"]`` of the last micro-batch's backward pass, FSDP's gathers and reductions behind that
share of the block they surround; tensor, expert and pipeline communication is waited for (torch's schedules wait for
each send and receive), and so are the exchanges of Muon's matrices.

**Experts.** ``ep`` of the dp x fsdp processes share the experts of each block. Two all-to-alls of ``active`` copies
of each token forwards and two backwards; experts are balanced, an assumption.

**Optimiser.** Muon: five iterations of ``4 r^2 c + 2 r^3`` operations for a matrix with sides r <= c, whole matrices
divided among dp x fsdp x tp processes, the slowest of which has at least the largest; 14 passes of fp32 over a
process's matrices, AdamW 7 over the rest, clipping 3 over all.

**Memory** of a process: parameters, gradients and states (Muon 1 number, AdamW 2; in bf16 also fp32 masters;
gradients are fp32 as they add up), what FSDP has gathered (two units; under pp all of a process's, which backward
passes but the last keep), activations of the micro-batches in flight (gpipe M,
1f1b ``min(M, pp - r)``, interleaved ``min(v M, 2 (pp - r - 1) + (v - 1) pp + 1)`` stages) and of the loss, receive
buffers of the pipeline for all M micro-batches (torch allocates them at the start). A block keeps, elements per
token: ``2 D`` states, ``2 D`` normed inputs (whole sequences under tp), ``7 W`` and ``2 F``; the connection's
addition is :func:`connection_saved`. With activation checkpointing a block keeps what enters, and one block at a time
the rest.
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
from ..optim import BATCH_ELEMENTS
from . import volume
from .hardware import Hardware
from .plan import ParallelPlan, cuts
from .shape import Shape
from .updates import batch_elements
from .volume import Volume, wire_bytes

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
    backend: str = "nccl"
    """What collectives run on: gloo has no all-to-all."""

    def __post_init__(self) -> None:
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
            "gloo" if config.device == "cpu" else "nccl",
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
        return volume.state_bytes(self.model, self.precision)

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
                f"{v.axis} {v.kind} {v.what}"
                + ("" if v.boundary is None else f" {v.boundary}{v.direction[:1]}"): v.bytes
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
        if volume.separate_streams(model):
            # A step on one half, whose own read is not used, then a pool over both with the norm behind it.
            step, pool = floor.step(n // 2), floor.pool(n)
            return (
                step["forward"].total + pool["forward"].total + 2,
                step["backward"].total + pool["backward"].total + 2,
            )
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
        kept = {
            "store": n if volume.separate_streams(model) else 2 * n,
            "replay": 2 * n / model.replay_window,
            "inversion": 2 * n * model.inversion_top_p,
        }
        return D * (kept[model.stream_memory] * s + 2 * (c - s))
    # Coefficients of a token, fp32: n (n + 2) before and after what bounds them, and 2 n, for each sublayer.
    coefficients = 0 if name == "hc-static" else 16 * (n * (n + 2) + n) / D
    return D * {
        **dict.fromkeys(HYPER, 2 * n * s + 2 * c + coefficients),
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


def _running(each) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... entries."""
    return np.concatenate([[0.0], np.cumsum(np.asarray(each, float))])


class _Priced:
    """A job on a machine, before any division: running sums over blocks of seconds and numbers per token."""

    def __init__(self, job: Job, hardware: Hardware):
        self.job, self.hardware = job, hardware
        shape, model = job.shape, job.model
        L, D, W, F = model.n_sublayers, model.d_model, model.attention_width, shape.ffn
        V, T = shape.vocab, model.seq_len
        beginning, sites = volume._connection_weights(model)
        self.beginning = sum(math.prod(w.shape) for w in beginning)

        def of_blocks(wanted, times=1):
            each = [sum(math.prod(w.shape) for w, _ in site if wanted(w)) for site in sites]
            return times * np.array(each, float).reshape(-1, 2).sum(1)

        split = of_blocks(lambda w: w.split is not None)
        # hc's matrices meet every stream; hc-static's are n x n and part of the passes.
        times = {"hc": model.n_streams, "hc-static": 0}.get(model.residual, 1)
        own = of_blocks(lambda w: len(w.shape) > 1, times)
        dense = shape.block_matrices + 4 * D * (W - D)
        products = dense + shape.block_experts * shape.active / shape.experts + own
        self.matrices = _running(dense + split)
        """Numbers that tp divides."""
        self.whole = _running(2 * D + of_blocks(lambda w: w.split is None))
        self.extra = _running(split)
        self.shapes = [(3 * W, D), (D, W)] + ([(F, D), (D, F)] if shape.experts == 1 else [])

        rate, band, c = hardware.matmul_flops(D), hardware.bandwidth, job.compute_bytes
        attention = 4 * W * (T + 1) / 2 / hardware.attention_flops
        passes = c / band
        self.forward = _running(2 * products / rate + attention + (4 * W + 2 * F * shape.active) * passes)
        self.backward = _running(
            4 * products / rate + 2.5 * attention + (4 * W + 3 * F * shape.active) * passes
        )
        per_element = D * job.state_bytes / (band * hardware.share(model.residual))
        self.moved = {}
        for apart in (False, True):
            moved = [connection_traffic(model, s, apart=apart) for s in range(1, L + 1)]
            moved = per_element * np.array(moved).reshape(-1, 2, 2).sum(1)
            self.moved[apart] = _running(moved[:, 0]), _running(moved[:, 1])
        loss = V * (20 if job.precision == "fp32" else 24) / band
        self.head = 6 * D * V / rate + loss  # forward and backward
        # Weights are cast once a micro-batch, whatever its tokens.
        cast = 6 * (dense + split + shape.block_experts) / band
        self.cast = _running(cast if job.precision == "autocast" else 0 * cast)
        table = hardware.connection_overhead
        self.site_overhead = table.get(model.residual, table.get("", 0.0))
        self.saved, self.entering = connection_saved(job), 1 + _carried(model)
        self._sent: dict = {}

    def boundary(self, plan: ParallelPlan, cut: int) -> tuple[int, int]:
        """Bytes per token sent over ``cut``, one way, and in how many tensors."""
        model = self.job.model
        where = cuts(model, plan)
        earlier = cut + 1 - plan.pp
        known = where[earlier] if plan.schedule == "interleaved" and earlier >= 0 else 0
        key = where[cut], known
        if key not in self._sent:
            values = volume.sent_values(model, plan, cut, plan.schedule == "interleaved")
            wide, narrow = self.job.state_bytes, 4 if self.job.precision == "fp32" else 2
            each = sum(
                numbers * (narrow if name[0] in ("key", "value") else wide) for name, numbers in values
            )
            self._sent[key] = each, len(values)
        return self._sent[key]


@dataclass(frozen=True)
class _Choice:
    """What a plan leaves to choose."""

    plan: ParallelPlan
    rows: int
    """Sequences of a micro-batch."""
    micro_batches: int
    ep: int
    again: bool
    """Activation checkpointing."""


class _Ranks:
    """Counts of every pipeline process of a plan; arrays have one entry a process."""

    def __init__(self, priced: _Priced, plan: ParallelPlan):
        shape, D = priced.job.shape, priced.job.model.d_model
        self.priced, self.plan = priced, plan
        size, larger = divmod(shape.layers, plan.stages)
        numbers = np.arange(plan.stages + 1)
        self.edges = numbers * size + np.minimum(numbers, larger)  # as plan.stage_blocks
        self.blocks = np.diff(self.edges).reshape(-1, plan.pp).sum(0)
        self.largest = size + (larger > 0)
        self.last = (plan.stages - 1) % plan.pp
        self.matrices, self.in_blocks = self.total(priced.matrices), self.total(priced.whole)
        self.experts = self.blocks * float(shape.block_experts)
        self.rest = np.zeros(plan.pp)
        self.rest[0] += shape.vocab * D + priced.beginning
        if plan.stages > 1:
            self.rest[self.last] += shape.vocab * D
        self.rest[self.last] += D
        self.gloo = priced.job.backend == "gloo"
        self.back = 4 if self.gloo else 2
        """Bytes of a number of Muon's update."""
        self.states = self._states() if plan.stages > 1 else (np.zeros(plan.pp), np.zeros(plan.pp))

    def total(self, running: np.ndarray) -> np.ndarray:
        """The sum over each process's blocks of what ``running`` sums."""
        return np.diff(running[self.edges]).reshape(-1, self.plan.pp).sum(0)

    def _states(self):
        """Bytes per token and tensors that each process sends, both ways together; it receives as many bytes."""
        each = np.zeros((2, self.plan.pp))
        for cut in range(self.plan.stages - 1):
            sent = self.priced.boundary(self.plan, cut)
            for stage in (cut, cut + 1):
                each[:, stage % self.plan.pp] += sent
        return each


# --- one plan -------------------------------------------------------------------------------------


def check(job: Job, plan: ParallelPlan, ep: int = 1) -> None:
    """Raise ``UserError`` for a plan that cannot run this job."""
    plan.check(job)
    shape = job.shape
    if shape.ffn % plan.tp:
        raise UserError(f"parallel: tp = {plan.tp} must divide the hidden features of an MLP, {shape.ffn}")
    nested = ep >= 1 and (plan.fsdp % ep == 0 or ep % plan.fsdp == 0)
    if not nested or plan.data_ways % ep or shape.experts % ep:
        raise UserError(
            f"parallel: ep = {ep} must divide both dp x fsdp = {plan.data_ways} and experts = {shape.experts}, "
            f"and be a factor or a multiple of fsdp = {plan.fsdp}; choose another ep"
        )


def _traffic(ranks: _Ranks, choice: _Choice):
    """``(kind, axis, what, bytes, calls, group)`` of a step; bytes and calls have one entry a pipeline process."""
    priced, plan, M, ep = ranks.priced, choice.plan, choice.micro_batches, choice.ep
    job, tp, dp, fsdp = priced.job, plan.tp, plan.dp, plan.fsdp
    e, blocks, rest = job.weight_bytes, ranks.blocks, ranks.rest
    tokens = choice.rows * job.model.seq_len
    dense = ranks.matrices / tp + ranks.in_blocks
    # Experts: ep takes the places of fsdp first.
    expert_fsdp, expert_dp = max(1, fsdp // ep), plan.data_ways // max(fsdp, ep)
    experts = ranks.experts / ep / tp
    moe = job.shape.experts > 1
    times = 1 if plan.pp > 1 else M
    if plan.sharded:
        often = M + 1 if plan.pp > 1 else 2 * M
        units = _units(ranks, e * dense)
        alone = units > 0  # else blocks stay gathered with the rest
        gathered = np.where(alone, often, times) * dense + times * rest
        calls, reduced = often * units + times, times * (dense + rest)
        units = times * (units + plan.stages // plan.pp)
        if fsdp > 1:
            yield "all-gather", "fsdp", "parameters", gathered * e, calls, fsdp
            yield "reduce-scatter", "fsdp", "gradients", reduced * e, units, fsdp
        if dp > 1:
            yield "all-reduce", "dp", "gradients", reduced * e / fsdp, units, dp
    elif dp > 1:
        often = M if job.precision == "bf16" and plan.pp == 1 else 1
        yield "all-reduce", "dp", "gradients", often * (dense + rest) * e, often + 0 * blocks, dp
    if moe and expert_fsdp > 1:
        often = M + 1 if plan.pp > 1 else 2 * M
        yield "all-gather", "fsdp", "experts", often * experts * e, often * blocks, expert_fsdp
        yield "reduce-scatter", "fsdp", "expert gradients", times * experts * e, times * blocks, expert_fsdp
    if moe and expert_dp > 1:
        yield "all-reduce", "dp", "expert gradients", experts / expert_fsdp * e, 1 + 0 * blocks, expert_dp
    if ep > 1:
        copies = 4 * M * blocks * tokens / tp * job.shape.active
        yield "all-to-all", "ep", "tokens", copies * job.model.d_model * job.compute_bytes, 4 * M * blocks, ep
    if tp > 1:
        calls, one = (6 if choice.again else 4) * M * blocks, float(tokens * job.model.d_model * e)
        yield "all-gather", "tp", "sequence", calls * one, calls, tp
        yield "reduce-scatter", "tp", "sequence", calls * one, calls, tp
        if job.model.residual == "moda":
            yield "all-gather", "tp", "memory", M * blocks * one, M * blocks, tp
            yield "reduce-scatter", "tp", "memory", M * blocks * one, M * blocks, tp
        yield "all-reduce", "tp", "gradients", (ranks.in_blocks + rest) / fsdp * 4, 1 + 0 * blocks, tp
    if plan.stages > 1:
        state, tensors = ranks.states
        yield "point-to-point", "pp", "state", M * state * tokens / tp, M * tensors, 2
        if ranks.last:
            ends = np.zeros(plan.pp)
            ends[[0, ranks.last]] = 1
            yield (
                "all-reduce",
                "tied",
                "gradients",
                ends * job.shape.vocab * job.model.d_model / fsdp * e,
                ends,
                2,
            )
    for kind, axis, numbers, each, calls in _updates(ranks):
        yield kind, axis, "updates", numbers * each, calls, getattr(plan, axis)
    if moe and expert_fsdp > 1:
        yield (
            "all-to-all",
            "fsdp",
            "updates",
            experts / expert_fsdp * (4 + ranks.back),
            4 + 0 * blocks,
            expert_fsdp,
        )


def _units(ranks: _Ranks, size) -> np.ndarray:
    """Units of FSDP of processes whose blocks have ``size`` bytes (:func:`depthmix.parallel.plan.units`)."""
    plan = ranks.plan
    if plan.unit == 0:
        return ranks.blocks
    chunks = plan.stages // plan.pp
    together = np.ceil((plan.unit << 20) * ranks.blocks / size)
    return chunks * (ranks.blocks // chunks // together)


def _updates(ranks: _Ranks):
    """``(kind, axis, numbers, bytes of each, calls)`` of Muon's matrices on their way to one process each and back.

    As the engine has it (:mod:`depthmix.parallel.updates`): momenta in fp32, updates in bf16 on GPUs. The process with
    the most has its share, and at least one matrix, of the largest.
    """
    plan, P, largest = ranks.plan, ranks.matrices, float(max(r * c for r, c in ranks.priced.shapes))
    tp, dp, fsdp = plan.tp, plan.dp, plan.fsdp
    calls = np.ceil(P / batch_elements(plan, BATCH_ELEMENTS))
    copy, part, own = (np.maximum(P / ways, largest) for ways in (dp, dp * fsdp, dp * fsdp * tp))
    if fsdp > 1:
        yield "all-to-all", "fsdp", copy / (fsdp * tp), 4, calls
        yield "all-to-all", "fsdp", part / tp, ranks.back, calls
    if tp > 1:
        yield "all-to-all", "tp", part / tp, 4, calls
        yield "all-to-all", "tp", own, ranks.back, calls
    if dp > 1:
        yield "all-gather", "dp", dp * copy / (fsdp * tp), ranks.back, calls


def volumes(job: Job, plan: ParallelPlan, ep: int = 1) -> list[Volume]:
    """What a process sends in a step, the largest over the pipeline's processes of each.

    The closed form of :func:`depthmix.parallel.volume.step_volume` (which rounds shards up to whole rows, and counts
    parameters that a cut moves to the other side there), with the all-to-alls of experts and without scalars; all the
    states that a process sends are one entry.
    """
    check(job, plan, ep)
    priced = _Priced(job, _ANY)
    return _volumes(_Ranks(priced, plan), _choice(job, plan, ep))


def _volumes(ranks: _Ranks, choice: _Choice) -> list[Volume]:
    found: dict[tuple, list] = {}
    for kind, axis, what, sent, calls, group in _traffic(ranks, choice):
        one = found.setdefault((kind, axis, what, group), [0.0, 0.0])
        one[0], one[1] = one[0] + sent, one[1] + calls
    return [
        Volume(kind, axis, what, round(float(np.max(sent))), round(float(np.max(calls))), group)
        for (kind, axis, what, group), (sent, calls) in found.items()
        if group > 1 and np.max(sent) > 0
    ]


def _choice(job: Job, plan: ParallelPlan, ep: int) -> _Choice:
    return _Choice(plan, plan.micro_batch(job), plan.micro_batches(job), ep, job.activation_checkpointing)


_ANY = Hardware("any", ((1, 1.0),), 1.0, 1.0, {"": 1.0}, 1.0, 1.0, 0.0, 0.0, math.inf, 8)


def _seconds(traffic, hardware: Hardware, stride: int) -> np.ndarray:
    """Of :func:`_traffic`'s entry, for each pipeline process."""
    kind, _, _, sent, calls, group = traffic
    band, latency = hardware.link(stride, group)
    one = wire_bytes(Volume(kind, "", "", 1, 1, group))
    return calls * math.ceil(math.log2(max(2, group))) * latency + sent * one / band


def _strides(plan: ParallelPlan) -> dict[str, int]:
    """How far apart neighbours on an axis are, in ranks."""
    whole = plan.tp * plan.fsdp * plan.dp
    return {"tp": 1, "fsdp": plan.tp, "ep": plan.tp, "dp": plan.tp * plan.fsdp, "pp": whole, "tied": whole}


def estimate(job: Job | TrainConfig, plan: ParallelPlan, hardware: Hardware, ep: int = 1) -> Estimate:
    """Time and memory of a step, as the module's equations say. Raises ``UserError`` for a plan that cannot run."""
    if isinstance(job, TrainConfig):
        job = Job.of(job)
    check(job, plan, ep)
    priced = _Priced(job, hardware)
    return _estimate(_Ranks(priced, plan), _choice(job, plan, ep))


def _estimate(ranks: _Ranks, choice: _Choice) -> Estimate:
    priced, plan, M = ranks.priced, choice.plan, choice.micro_batches
    job, hardware = priced.job, priced.hardware
    tokens = choice.rows * job.model.seq_len / plan.tp  # of a micro-batch, on one process
    again, v = int(choice.again), plan.stages // plan.pp

    # Seconds of a micro-batch on every pipeline process.
    total = ranks.total
    forward, backward = tokens * total(priced.forward), tokens * total(priced.backward)
    written, read = (tokens * total(moved) for moved in priced.moved[plan.sharded])
    compute = (1 + again) * forward + backward + total(priced.cast) / plan.tp
    compute[ranks.last] += tokens * priced.head
    connection = (1 + again) * written + read
    overhead = ranks.blocks * (hardware.block_overhead * (1 + again / 3) + 2 * priced.site_overhead)

    nothing = np.zeros(plan.pp)
    waited = dict.fromkeys(("tp", "ep", "fsdp", "pp"), nothing)
    at_end = dict.fromkeys(("dp", "fsdp", "tp", "tied"), nothing)
    gather = reduce = nothing
    strides = _strides(plan)
    for traffic in _traffic(ranks, choice):
        _, axis, what, *_ = traffic
        seconds = _seconds(traffic, hardware, strides[axis])
        if what in ("sequence", "tokens", "state", "memory"):
            waited[axis] = waited[axis] + seconds / M
        elif axis == "fsdp" and what in ("parameters", "experts"):
            gather = gather + seconds / M
        elif axis == "fsdp" and what.endswith("gradients"):
            reduce = reduce + seconds / M
        elif axis == "dp" and what.endswith("gradients"):
            hidden = hardware.overlap.get("dp", 0.0) * (backward + read)
            at_end["dp"] = at_end["dp"] + np.maximum(0.0, seconds - hidden)
        else:
            at_end[axis] = at_end[axis] + seconds
    # Half of the gathers are taken to be before the forward, half before the backward pass.
    hides = hardware.overlap.get("fsdp", 0.0)
    ahead, behind = hides * ((1 + again) * forward + written), hides * (backward + read)
    waited["fsdp"] = np.maximum(0.0, gather / 2 - ahead) + np.maximum(0.0, gather / 2 + reduce - behind)

    work = compute + connection + overhead + sum(waited.values())
    slow = int(work.argmax())
    bubble = float(work.sum() - work[slow]) / v
    optimizer = _optimizer(ranks)
    exposed = {axis: M * float(each[slow]) for axis, each in waited.items()}
    for axis, each in at_end.items():
        exposed[axis] = exposed.get(axis, 0.0) + float(each.max())
    late = sum(float(each.max()) for each in at_end.values())
    one = dataclasses.replace(job, micro_batch=choice.rows, activation_checkpointing=choice.again)
    return Estimate(
        job=one,
        plan=plan,
        hardware=hardware.name,
        ep=choice.ep,
        micro_batch=choice.rows,
        micro_batches=M,
        step=M * float(work[slow]) + bubble + late + optimizer + hardware.step_overhead,
        compute=M * float(compute[slow]),
        connection=M * float(connection[slow]),
        optimizer=optimizer,
        overhead=M * float(overhead[slow]) + hardware.step_overhead,
        bubble=bubble,
        exposed={axis: seconds for axis, seconds in exposed.items() if seconds > 0},
        memory=_memory(ranks, choice),
        available=hardware.memory * hardware.usable,
        volumes=tuple(_volumes(ranks, choice)),
    )


def _muon_flops(rows: int, cols: int) -> int:
    small, large = min(rows, cols), max(rows, cols)
    return 5 * (4 * small**2 * large + 2 * small**3)


def _optimizer(ranks: _Ranks) -> float:
    """Seconds of the slowest pipeline process."""
    priced, plan = ranks.priced, ranks.plan
    hardware, shape, D = priced.hardware, priced.job.shape, priced.job.model.d_model
    ways, shard = plan.dp * plan.fsdp * plan.tp, plan.tp * plan.fsdp
    seconds = np.zeros(plan.pp)
    kinds = [(rows, cols, 1) for rows, cols in priced.shapes]
    if shape.experts > 1:
        kinds.append((shape.ffn, shape.width, 2 * shape.experts))
    each = [_muon_flops(rows, cols) / hardware.matmul_flops(min(rows, cols)) for rows, cols, _ in kinds]
    total = sum(count * one for (_, _, count), one in zip(kinds, each, strict=True))
    seconds += np.maximum(total * ranks.blocks / ways, max(each))  # a matrix is one process's
    seconds += 30 * ranks.total(priced.extra) * D / ways / hardware.matmul_flops(D)
    muon = ranks.matrices / shard + ranks.experts / min(ways, shard * max(1, shape.experts))
    adamw = (ranks.in_blocks + ranks.rest) / plan.fsdp
    seconds += 4 * (17 * muon + 10 * adamw) / hardware.bandwidth
    return float(seconds.max())


def _memory(ranks: _Ranks, choice: _Choice) -> dict[str, float]:
    """Bytes by kind of the pipeline process that needs most."""
    priced, plan, M = ranks.priced, choice.plan, choice.micro_batches
    job, tp, fsdp, pp = priced.job, plan.tp, plan.fsdp, plan.pp
    shape, model, c, s, e = job.shape, job.model, job.compute_bytes, job.state_bytes, job.weight_bytes
    D, W, V = model.d_model, model.attention_width, shape.vocab
    tokens, v, r = choice.rows * model.seq_len, plan.stages // pp, np.arange(pp)
    matrices = ranks.matrices / (tp * fsdp) + ranks.experts / (tp * max(choice.ep, fsdp))
    whole = (ranks.in_blocks + ranks.rest) / fsdp
    held = matrices + whole
    gathered = np.zeros(pp)
    if fsdp > 1:
        block = (ranks.matrices / tp + ranks.in_blocks + ranks.experts / choice.ep / tp) / ranks.blocks
        # A pipeline's backward passes keep them until the last; else two units are there at once.
        count = _units(ranks, e * (ranks.matrices / tp + ranks.in_blocks))
        two = np.minimum(ranks.blocks, 2 * ranks.blocks / np.maximum(1, count))
        at_once = ranks.blocks if pp > 1 else np.where(count > 0, two, ranks.blocks)
        gathered = (at_once * block + ranks.rest) * e

    if plan.stages == 1 or plan.schedule == "1f1b":
        kept_blocks = np.minimum(M, pp - r) * ranks.blocks
    elif plan.schedule == "gpipe":
        kept_blocks = M * ranks.blocks
    else:
        kept_blocks = np.minimum(v * M, 2 * (pp - r - 1) + (v - 1) * pp + 1) * ranks.largest
    block = 2 * D * s / tp + 2 * D * c + (7 * W + 2 * shape.ffn * shape.active) * c / tp + priced.saved / tp
    if choice.again:
        activations = tokens * (kept_blocks * priced.entering * D * s / tp + block)
    else:
        activations = tokens * kept_blocks * block
    # Of the loss: the logarithms of probabilities are kept; a gradient and a copy of the logits exist besides.
    chunks = M if plan.stages > 1 and plan.schedule == "gpipe" else 1
    activations[ranks.last] += tokens / tp * V * (4 * chunks + 4 + c)
    parts = {
        "parameters": e * held,
        "gradients": 4 * held,
        "optimizer": 4 * matrices + 8 * whole + (4 * held if job.precision == "bf16" else 0),
        "gathered": gathered,
        "activations": activations,
        "buffers": M * ranks.states[0] * tokens / tp,
    }
    most = int(sum(parts.values()).argmax())
    return {name: float(each[most]) for name, each in parts.items()}


# --- the best plan --------------------------------------------------------------------------------


def divisors(n: int) -> list[int]:
    """From 1 to n."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences of a micro-batch that a search tries."""
CHUNKS = range(2, 9)
"""Stages of a pipeline process that it tries with the interleaved schedule."""


@functools.lru_cache(maxsize=16)
def _candidates(
    shape: Shape,
    sequences: int,
    fixed: int,
    heads: int,
    seq_len: int,
    gpus: int,
    node: int,
    again: bool | None,
) -> tuple[list[_Choice], dict[str, np.ndarray]]:
    found = []
    remat = (False, True) if again is None else (again,)
    for tp in divisors(gpus):
        if tp > node or heads % tp or shape.ffn % tp or seq_len % tp:
            continue
        for pp in divisors(gpus // tp):
            ways = gpus // tp // pp
            if pp > shape.layers or sequences % ways:
                continue
            local = sequences // ways
            schedules_of = {}
            for rows in (size for size in ([fixed] if fixed else MICRO_BATCHES) if local % size == 0):
                M = local // rows
                if pp == 1:
                    schedules = [("1f1b", 1)]
                else:
                    schedules = [("1f1b", pp)] if M >= pp else [("gpipe", pp)]
                    if M % pp == 0:
                        equal = (v for v in CHUNKS if shape.layers % (pp * v) == 0)
                        schedules += [("interleaved", pp * v) for v in equal]
                schedules_of[rows] = schedules
            for fsdp in divisors(ways):
                shared = divisors(math.gcd(ways, shape.experts))
                shared = [ep for ep in shared if fsdp % ep == 0 or ep % fsdp == 0]
                plans = {
                    key: ParallelPlan(ways // fsdp, fsdp, tp, pp, *key)
                    for key in {key for keys in schedules_of.values() for key in keys}
                }
                for rows, schedules in schedules_of.items():
                    found += [
                        _Choice(plans[key], rows, local // rows, ep, r)
                        for key in schedules
                        for r in remat
                        for ep in shared
                    ]
    columns = {
        "tp": [c.plan.tp for c in found],
        "pp": [c.plan.pp for c in found],
        "fsdp": [c.plan.fsdp for c in found],
        "dp": [c.plan.dp for c in found],
        "v": [c.plan.stages // c.plan.pp for c in found],
        "M": [c.micro_batches for c in found],
        "rows": [c.rows for c in found],
        "ep": [c.ep for c in found],
        "again": [c.again for c in found],
        "apart": [c.plan.sharded for c in found],
        "gpipe": [c.plan.schedule == "gpipe" for c in found],
        "interleaved": [c.plan.schedule == "interleaved" for c in found],
    }
    return found, {name: np.array(values, float) for name, values in columns.items()}


def candidates(
    job: Job, hardware: Hardware, gpus: int, *, checkpointing: bool | None = None
) -> list[tuple[Job, ParallelPlan, int]]:
    """Every ``(job, plan, ep)`` that :func:`search` looks at, each valid.

    tp within a node, micro-batches of 1, 2, 4, ... 64 sequences where ``job.micro_batch`` leaves the choice,
    interleaved stages where they divide the blocks equally, up to eight a process, gpipe where there are too few
    micro-batches for 1f1b.
    """
    found, _ = _candidates_of(job, hardware, gpus, checkpointing)
    return [
        (dataclasses.replace(job, micro_batch=c.rows, activation_checkpointing=c.again), c.plan, c.ep)
        for c in found
    ]


def _candidates_of(job: Job, hardware: Hardware, gpus: int, checkpointing: bool | None):
    model = job.model
    return _candidates(
        job.shape, job.batch_size, job.micro_batch, model.n_head, model.seq_len, gpus,
        hardware.devices_per_node, checkpointing,
    )  # fmt: skip


def search(
    job: Job, hardware: Hardware, gpus: int, *, keep: int = 1, checkpointing: bool | None = None
) -> list[Estimate]:
    """The ``keep`` fastest estimates of all :func:`candidates` that fit the memory, fastest first.

    A candidate whose bounds (:func:`_bounds`) show that it is slower than the estimates at hand, or does not fit, is
    not looked at; this loses none. Ties go to the first in ``(step, str(plan), micro_batch, ep)``.

    Raises ``UserError`` where nothing fits, naming what is missing.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    found, columns = _candidates_of(job, hardware, gpus, checkpointing)
    if not found:
        raise UserError(
            f"no plan divides {gpus} devices for {job.batch_size} sequences a step, {job.shape.layers} blocks and "
            f"{job.model.n_head} heads; dp x fsdp must divide the sequences, pp be at most the blocks: change "
            f"--gpus or --batch-tokens"
        )
    priced = _Priced(job, hardware)
    least, needed = _bounds(priced, columns)
    available = hardware.memory * hardware.usable
    best: list[tuple[tuple, Estimate]] = []
    ranks_of: dict[ParallelPlan, _Ranks] = {}
    for i in np.argsort(least, kind="stable"):
        if needed[i] > available:
            continue
        if len(best) >= keep and least[i] > best[-1][0][0]:
            break
        choice = found[i]
        if choice.plan not in ranks_of:
            ranks_of[choice.plan] = _Ranks(priced, choice.plan)
        ranks = ranks_of[choice.plan]
        if sum(_memory(ranks, choice).values()) > available:
            continue
        result = _estimate(ranks, choice)
        best.append(((result.step, str(choice.plan), choice.rows, choice.ep, choice.again), result))
        best = sorted(best, key=lambda pair: pair[0])[:keep]
    if not best:
        raise UserError(_why_not(priced, found, needed, gpus))
    return [result for _, result in best]


def _bounds(priced: _Priced, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of every candidate, seconds that a step takes at least, and bytes that the first pipeline process needs at least.

    Seconds: all work divided equally, the bubble of equal stages, the collectives of tp and ep, and the optimiser's
    work divided equally. Bytes: an equal share of parameters, gradients and states, and the activations of the blocks.
    """
    job, hardware = priced.job, priced.hardware
    shape, model = job.shape, job.model
    tp, pp, fsdp, dp, v, M = (columns[name] for name in ("tp", "pp", "fsdp", "dp", "v", "M"))
    again, apart, ep = columns["again"], columns["apart"] > 0, columns["ep"]
    written = np.where(apart, priced.moved[True][0][-1], priced.moved[False][0][-1])
    read = np.where(apart, priced.moved[True][1][-1], priced.moved[False][1][-1])
    tokens = columns["rows"] * model.seq_len
    each = (1 + again) * (priced.forward[-1] + written) + priced.backward[-1] + read + priced.head
    wire = 8 * shape.layers * (tp - 1) / tp * tokens * model.d_model * job.weight_bytes
    experts_wire = (
        4 * shape.layers * (ep - 1) / ep * tokens / tp * shape.active * model.d_model * job.compute_bytes
    )
    # A group of ep processes that is wider than a node goes out through the ports of its members there.
    spans = tp * ep > hardware.devices_per_node
    members = np.maximum(1, np.minimum(ep, hardware.devices_per_node // tp))
    out = np.minimum(hardware.intra_bandwidth, members * hardware.inter_bandwidth)
    band = np.where(spans, out, hardware.intra_bandwidth)
    pace = (tokens / tp * each + wire / hardware.intra_bandwidth + experts_wire / band) / pp
    ways = dp * fsdp * tp * pp
    flops = sum(_muon_flops(*sides) / hardware.matmul_flops(min(sides)) for sides in priced.shapes)
    if shape.experts > 1:
        one = _muon_flops(shape.ffn, shape.width) / hardware.matmul_flops(min(shape.ffn, shape.width))
        flops += 2 * shape.experts * one
    optimizer = shape.layers * flops / ways
    least = pace * (M + (pp - 1) / v) + optimizer

    s, c, e, D = job.state_bytes, job.compute_bytes, job.weight_bytes, model.d_model
    experts = shape.layers * shape.block_experts
    held = (priced.matrices[-1] / (tp * fsdp) + experts / (tp * np.maximum(ep, fsdp))) / pp
    weights = held * (e + 8 + (4 if job.precision == "bf16" else 0))
    block = 2 * D * s / tp + 2 * D * c + priced.saved / tp
    block = block + (7 * model.attention_width + 2 * shape.ffn * shape.active) * c / tp
    blocks = np.floor(shape.layers / (pp * v)) * np.where(columns["interleaved"] > 0, 1, v)
    flight = np.where(columns["gpipe"] > 0, M, np.minimum(M, pp))
    flight = np.where(columns["interleaved"] > 0, np.minimum(v * M, 2 * (pp - 1) + (v - 1) * pp + 1), flight)
    kept = np.where(again > 0, priced.entering * D * s / tp, block) * flight * blocks
    # Sums in another order differ in the last bits.
    return least * (1 - 1e-9), (weights + tokens * kept) * (1 - 1e-9)


def _why_not(priced: _Priced, found: list[_Choice], needed: np.ndarray, gpus: int) -> str:
    """Why no candidate fits, by the leanest of those that need least."""
    job, hardware = priced.job, priced.hardware
    leanest: tuple[float, dict[str, float], _Choice] | None = None
    for i in np.argsort(needed, kind="stable")[:200]:
        choice = found[i]
        memory = _memory(_Ranks(priced, choice.plan), choice)
        total = sum(memory.values())
        if leanest is None or total < leanest[0]:
            leanest = total, memory, choice
    assert leanest is not None, "there are candidates"
    total, memory, choice = leanest
    part = max(memory, key=memory.__getitem__)
    return (
        f"residual {job.model.label}: nothing fits {gpus} x {hardware.name} with {hardware.memory / 1e9:.0f} GB each "
        f"({hardware.usable:.0%} usable): the leanest of {len(found)} plans, {choice.plan} with micro-batches of "
        f"{choice.rows}, needs {total / 1e9:.1f} GB, {memory[part] / 1e9:.1f} of them {part}; use more or "
        f"larger devices, a shorter --seq-len, or a smaller model"
    )
