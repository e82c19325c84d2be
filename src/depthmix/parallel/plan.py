"""Which processes do what: the product of four ways to divide the work, and what each needs of the model.

=========  =====================================================================================================
``dp``     copies of the model, each with a part of the batch; gradients are averaged
``fsdp``   the same, and every copy keeps only a part of each parameter (FSDP2): sharded data parallel
``tp``     matrices split by heads and hidden features, everything between them by tokens: tensor and sequence
           parallel
``pp``     blocks divided into stages that work on different micro-batches at a time
=========  =====================================================================================================

A plan is written ``dp=2,fsdp=2,tp=2,pp=2``, what is left out being 1, and needs as many processes as its product.
``schedule`` is how stages take turns (``gpipe``, ``1f1b``, ``interleaved``) and ``stages``, a multiple of ``pp``, how
many there are: ``pp=2,schedule=interleaved,stages=4``. ``unit`` is how much FSDP gathers at once, at least.
Neighbouring ranks differ in tp first, then fsdp, dp and pp: what communicates most is closest.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError, suggest

if TYPE_CHECKING:
    from ..config import GPTConfig, TrainConfig
    from .cost import Job

AXES = ("pp", "dp", "fsdp", "tp")
"""From the slowest changing to the fastest, in the order of ranks."""
SCHEDULES = ("gpipe", "1f1b", "interleaved")


@dataclass(frozen=True)
class ParallelPlan:
    """How many processes share the work in each way. Raises ``UserError`` for what cannot be."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    """How pipeline stages take turns."""
    stages: int = 0
    """Pipeline stages in all. 0: ``pp``, twice that with the interleaved schedule."""
    unit: int = 4
    """MiB of parameters that FSDP gathers at once, at least: neighbouring blocks share a unit until they have as many,
    and blocks that have fewer all together stay gathered. 0: every block is a unit."""

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"parallel: {axis} must be at least 1, got {getattr(self, axis)}")
        if self.schedule not in SCHEDULES:
            raise UserError("parallel: " + suggest(self.schedule, SCHEDULES, "schedule"))
        several = self.schedule == "interleaved"
        stages = self.stages or (2 if several else 1) * self.pp
        object.__setattr__(self, "stages", stages)
        if several and (self.pp == 1 or stages % self.pp or stages == self.pp):
            raise UserError(
                f"parallel: the interleaved schedule needs pp of 2 or more and two or more stages for each, got "
                f"pp={self.pp},stages={stages}; use stages={2 * max(2, self.pp)} with pp={max(2, self.pp)}"
            )
        if not several and stages != self.pp:
            raise UserError(
                f"parallel: with schedule={self.schedule} every pp process has one stage, got pp={self.pp} and "
                f"stages={stages}; use schedule=interleaved for more"
            )

    @classmethod
    def parse(cls, text: str) -> "ParallelPlan":
        """The plan that ``text`` says, ``""`` being one process. Raises ``UserError`` with the valid keys."""
        keys = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (part.strip() for part in word.partition("="))
            if not equals:
                raise UserError(f"parallel: {word!r} is no part of a plan; write dp=2,tp=2 and so on")
            if key not in keys:
                raise UserError("parallel: " + suggest(key, keys, "key"))
            if key in values:
                raise UserError(f"parallel: {key} is given more than once in {text!r}")
            if key != "schedule" and not value.isdecimal():
                least = 0 if key == "unit" else 1
                raise UserError(f"parallel: {key} must be a whole number of at least {least}, got {value!r}")
            values[key] = value if key == "schedule" else int(value)
        return cls(**values)

    def __str__(self) -> str:
        words = [
            f"{axis}={getattr(self, axis)}" for axis in ("dp", "fsdp", "tp", "pp") if getattr(self, axis) > 1
        ]
        if self.pp > 1:
            words.append(f"schedule={self.schedule}")
            words += [f"stages={self.stages}"] if self.stages != self.pp else []
        if self.sharded and self.unit != type(self).unit:
            words.append(f"unit={self.unit}")
        return ",".join(words) or "dp=1"

    @property
    def processes(self) -> int:
        """How many it needs."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the parameters: also where tp divides matrices of which dp has copies."""
        return self.fsdp > 1 or (self.tp > 1 and self.dp > 1)

    @property
    def data_ways(self) -> int:
        """Into how many parts a batch is divided."""
        return self.dp * self.fsdp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def stages_of(self, pp_rank: int) -> range:
        """The stages of the processes with this place on the axis pp."""
        return range(pp_rank, self.stages, self.pp)

    def check_processes(self, world_size: int) -> None:
        """Raise ``UserError`` unless the plan takes ``world_size`` processes."""
        if self.processes != world_size:
            factors = " x ".join(str(getattr(self, axis)) for axis in ("dp", "fsdp", "tp", "pp"))
            raise UserError(
                f"parallel: {self} needs dp x fsdp x tp x pp = {factors} = {self.processes} processes, and there "
                f"{'is' if world_size == 1 else 'are'} {world_size}; start it with torchrun "
                f"--nproc-per-node={self.processes} or change --parallel"
            )

    def check(self, config: "TrainConfig | Job") -> None:
        """Raise ``UserError`` for a model or a batch that cannot be divided so; a priced job has the same fields."""
        model, ways = config.model, self.data_ways
        if config.batch_size % ways:
            raise UserError(
                f"parallel: batch_size = {config.batch_size} sequences cannot be divided among dp x fsdp = {ways} "
                f"processes; use a multiple of {ways}"
            )
        local = config.batch_size // ways
        if config.micro_batch and local % min(config.micro_batch, local):
            raise UserError(
                f"parallel: each of dp x fsdp = {ways} processes has {local} sequences a step, which micro_batch = "
                f"{config.micro_batch} does not divide"
            )
        for name, value, what in (
            ("n_head", model.n_head, "heads"),
            ("4 * d_model", 4 * model.d_model, "features of an MLP"),
            ("seq_len", model.seq_len, "tokens of a sequence"),
        ):
            if value % self.tp:
                raise UserError(
                    f"parallel: tp = {self.tp} must divide the {what}, {name} = {value}; choose another tp"
                )
        if self.stages > model.n_layer:
            raise UserError(
                f"parallel: {self.stages} pipeline stages need as many blocks, and n_layer = {model.n_layer}; use a "
                f"smaller pp"
            )
        if self.stages > 1:
            self.micro_batches(config)
        if config.compile and (self.fsdp > 1 or self.tp > 1 or self.pp > 1):
            raise UserError(
                f"parallel: compile works with dp alone, got {self}: the hooks of FSDP, the collectives of tp and the "
                f"stages of pp each break the graph at every block; leave --compile out"
            )

    def rows(self, config: "TrainConfig | Job") -> int:
        """Sequences a step of one process."""
        return config.batch_size // self.data_ways

    def micro_batch(self, config: "TrainConfig | Job") -> int:
        """Sequences a forward pass of one process."""
        rows = self.rows(config)
        if config.micro_batch:
            return min(config.micro_batch, rows)
        return rows // self._default_micro_batches(rows) if self.stages > 1 else rows

    def _default_micro_batches(self, rows: int) -> int:
        """Two for each pipeline process where the rows allow it, else one, else as many as there are rows."""
        return next((count for count in (2 * self.pp, self.pp) if rows % count == 0), rows)

    def micro_batches(self, config: "TrainConfig | Job") -> int:
        """Forward passes a step of one process. Raises ``UserError`` for too few for the pipeline's schedule."""
        count = self.rows(config) // self.micro_batch(config)
        if self.schedule == "1f1b" and count < self.stages:
            raise UserError(
                f"parallel: schedule=1f1b over {self.stages} stages needs at least {self.stages} micro-batches a step, "
                f"and {self.rows(config)} sequences in micro-batches of {self.micro_batch(config)} are {count}; lower "
                f"--micro-batch, raise --batch-size, or use schedule=gpipe"
            )
        if self.schedule == "interleaved" and count % self.pp:
            raise UserError(
                f"parallel: schedule=interleaved needs a multiple of pp = {self.pp} micro-batches a step, and "
                f"{self.rows(config)} sequences in micro-batches of {self.micro_batch(config)} are {count}; change "
                f"--micro-batch"
            )
        return count


def stage_blocks(n_layer: int, stages: int) -> list[range]:
    """The blocks of each stage: as equal as can be, the first ones larger by one where it does not divide."""
    size, larger = divmod(n_layer, stages)
    first, found = 0, []
    for stage in range(stages):
        count = size + (stage < larger)
        found.append(range(first, first + count))
        first += count
    return found


def cuts(config: "GPTConfig", plan: ParallelPlan) -> tuple[int, ...]:
    """Sublayers (1 .. L - 1) behind which the pipeline cuts."""
    return tuple(2 * blocks.stop for blocks in stage_blocks(config.n_layer, plan.stages)[:-1])


def units(sizes: Sequence[int], plan: ParallelPlan) -> list[range]:
    """Which blocks, of ``sizes`` bytes, FSDP gathers together; of none, all stay gathered with what is in no block."""
    if plan.unit == 0:
        return [range(i, i + 1) for i in range(len(sizes))]
    found, first, filled = [], 0, 0
    for i, size in enumerate(sizes):
        filled += size
        if filled >= plan.unit << 20:
            found.append(range(first, i + 1))
            first, filled = i + 1, 0
    if found and first < len(sizes):  # too few for a unit of their own
        found[-1] = range(found[-1].start, len(sizes))
    return found
