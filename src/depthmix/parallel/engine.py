"""The gradients of one optimiser step, and losses of evaluation, whatever the plan.

An engine holds this process's part of the model and knows how a batch goes through it. Every loss it returns is the
mean over all tokens of all processes, the same bits on each; every gradient it leaves is that of this mean, complete
up to sharding. The loop sees nothing else.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data import eval_batches
from ..model import GPT, mean_loss, own_part
from ..optim import MuonAdamW, build_optimizer
from .plan import cuts
from .world import ManyProcesses, World

if TYPE_CHECKING:
    from .pipeline import GPTStage

Autocast = Callable[[], AbstractContextManager]
Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]
"""The model, wrapped perhaps: token ids and targets, ``[B, T]`` each, to what nobody reads and the mean loss."""
NO_TARGET = -100
"""Target of a token that no loss counts."""


class Engine:
    """A model that one process holds whole.

    Args:
        model: as it is trained, on its device.
        config: of the run.
        world: the processes.
    """

    def __init__(self, model: GPT, config: TrainConfig, world: World, device: torch.device):
        self.model: GPT | None = model
        """The model; ``None`` where this process has not all its blocks."""
        self.config, self.world, self.device = config, world, device
        plan = world.plan
        self.rows, self.micro_batch = plan.rows(config), plan.micro_batch(config)
        if config.activation_checkpointing:
            for block in model.blocks:
                block.checkpointing = True
        self._prepare(model)
        self.optimizer: MuonAdamW = self._optimizer()

    @property
    def whole_model(self) -> GPT:
        """``model``, for those who know that it is here."""
        assert self.model is not None, "this process has some of the blocks alone"
        return self.model

    def _prepare(self, model: GPT) -> None:
        self.parts: list[nn.Module] = [model]
        self.forward: Forward = torch.compile(model) if self.config.compile else model

    def _optimizer(self) -> MuonAdamW:
        return build_optimizer(self.parts, self.config.optim)

    def autocast(self) -> AbstractContextManager:
        """The context of every forward pass."""
        enabled = self.config.precision == "autocast"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the step's tokens, with its gradients left in the parameters (or their masters).

        ``inputs`` and ``targets`` are this process's ``[rows, T]``; all micro-batches are of one size, so the mean of
        their mean losses is the mean over tokens.
        """
        share = self.micro_batch / self.rows
        total = torch.zeros((), device=self.device)
        for micro_inputs, micro_targets in self._micro_batches(inputs, targets):
            with self.autocast():
                _, loss = self.forward(micro_inputs, micro_targets)
            (loss * share).backward()
            self.optimizer.collect_gradients()
            total += loss.detach() * share
        return total

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True)

    def first_sublayer(self) -> list[nn.Parameter]:
        """Parameters of the first attention with its norm, where this process has it."""
        return list(self.whole_model.blocks[0].attn.parameters())

    @torch.no_grad()
    def validate(self, split, tokens: int, stopped: Callable[[], bool]) -> float | None:
        """The mean loss over the first ``tokens`` of ``split``; ``None`` when ``stopped()`` becomes true.

        ``stopped`` is asked before every batch, and answers all processes alike.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        for inputs, targets in eval_batches(split, self.config.model.seq_len, self.micro_batch, tokens):
            if stopped():
                return None
            with self.autocast():
                _, loss = self.forward(inputs.to(self.device), targets.to(self.device))
            total += loss.double().cpu() * targets.numel()
            count += targets.numel()
        return total.item() / count

    def named_weights(self) -> dict[str, Tensor]:
        """Live parameters and persistent buffers of this process by the names that the whole model gives them."""
        named, seen = {}, set()
        for part in self.parts:
            for name, tensor in part.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    named[name] = tensor
        return named


class ShardedEngine(Engine):
    """A model that all processes of the axes dp, fsdp and tp share: no pipeline."""

    world: ManyProcesses

    def _prepare(self, model: GPT) -> None:
        from . import shard

        self.parts = [model]
        self._split_sequences(model)
        wrapped = shard.data_parallel(model, self.world, always_shard=self.always_shard)
        self.world.before_close(self._let_go)
        self.forward = torch.compile(wrapped) if self.config.compile else wrapped

    def _let_go(self) -> None:
        """Drop what holds groups of processes."""
        del self.forward

    always_shard = False
    """Whether FSDP wraps the model even where nothing is to be sharded; to measure what it costs."""

    def _split_sequences(self, part: "GPT | GPTStage") -> None:
        from . import shard

        plan = self.world.plan
        if plan.tp > 1:
            shard.tensor_parallel(part.whole_blocks(), self.world)
            part.sequence_part = self.world.place["tp"], plan.tp

    def _optimizer(self) -> MuonAdamW:
        from . import shard

        return build_optimizer(
            self.parts, self.config.optim, shard.Layout(self.world, self._counted_elsewhere())
        )

    def _counted_elsewhere(self) -> list[nn.Parameter]:
        return []

    def _complete_gradients(self) -> None:
        """Add up what of the gradients is spread over processes in other ways than sharding."""
        from . import shard

        if self.world.plan.tp > 1:
            whole = [p for p in self._parameters() if "tp" not in shard.sharded_axes(p)]
            shard.sum_over_sequence(self.optimizer.collected_gradients(whole), self.world)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for p in part.parameters()]

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # A process's loss is a mean over its part of the tokens; the gradients of tp's parts are summed, those of data
        # averaged.
        share = self.micro_batch / self.rows / self.world.plan.tp
        total = torch.zeros((), device=self.device)
        batches = list(self._micro_batches(inputs, targets))
        for i, (micro_inputs, micro_targets) in enumerate(batches):
            last = i == len(batches) - 1
            with self._synchronised(last), self.autocast():
                _, loss = self.forward(micro_inputs, micro_targets)
                scaled = loss * share
            with self._synchronised(last):
                scaled.backward()
            self.optimizer.collect_gradients()
            total += scaled.detach()
        self._complete_gradients()
        return self._mean(total)

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Gradients meet once a step under DDP, unless they leave for fp32 masters after each micro-batch."""
        import contextlib

        no_sync = getattr(self.forward, "no_sync", None)
        if last or self.config.precision == "bf16" or no_sync is None:
            return contextlib.nullcontext()
        return no_sync()

    def _mean(self, total: Tensor) -> Tensor:
        return self.world.sum(total.double() / self.world.plan.data_ways).to(total.dtype)

    @torch.no_grad()
    def validate(self, split, tokens: int, stopped: Callable[[], bool]) -> float | None:
        # Sums of losses and numbers of tokens.
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        for inputs, targets in self._shares(split, tokens):
            if stopped():
                return None
            self._validate_batch(inputs.to(self.device), targets.to(self.device), found)
        total, count = self.world.sum(found).tolist()
        return total / count

    def _shares(self, split, tokens: int):
        """This process's rows of each batch, equally many on all: filled up with rows that count nothing."""
        rows, ways = self._rows_at_once(), self.world.plan.data_ways
        first = self.world.data_rank * rows
        for inputs, targets in eval_batches(split, self.config.model.seq_len, rows * ways, tokens):
            missing = rows * ways - len(inputs)
            if missing:
                inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])
                targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), NO_TARGET)])
            yield inputs[first : first + rows], targets[first : first + rows]

    def _rows_at_once(self) -> int:
        return self.micro_batch

    def _validate_batch(self, inputs: Tensor, targets: Tensor, found: Tensor) -> None:
        with self.autocast():
            _, loss = self.forward(inputs, targets)
        _count(found, loss, targets if self.model is None else own_part(targets, self.model.sequence_part))


def _count(found: Tensor, loss: Tensor, targets: Tensor) -> None:
    """Add the sum of the losses and the number of the tokens that ``loss`` is the mean of."""
    count = (targets != NO_TARGET).sum()
    found[0] += torch.where(count > 0, loss.double() * count, 0.0)
    found[1] += count


class PipelineEngine(ShardedEngine):
    """A model in stages, each shared by the processes of the axes dp, fsdp and tp."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        world: ManyProcesses,
        device: torch.device,
        *,
        cache: bool = True,
    ):
        self.cached = cache
        super().__init__(model, config, world, device)

    def _prepare(self, model: GPT) -> None:
        from . import pipeline, shard

        plan, config = self.world.plan, self.config
        self.model = None
        self.pipeline = pipeline.Pipeline(model, plan, self.world.place["pp"], cache=self.cached)
        stages = self.pipeline.stages
        self.parts = [*stages]
        called = []
        for stage in stages:
            self._split_sequences(stage)
            called.append(shard.data_parallel(stage, self.world))
        self.world.before_close(self._let_go)
        parameter = next(self.parts[0].parameters())
        self.schedule = pipeline.build_schedule(
            self.pipeline, called, self.world, self._loss, plan.micro_batches(config), self.micro_batch, self.device,
            dtype=parameter.dtype, autocast=config.precision == "autocast", cache=self.cached,
        )  # fmt: skip
        self.has_first, self.has_last = stages[0].first, stages[-1].last

    def _let_go(self) -> None:
        del self.schedule

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        part = own_part(targets, self.pipeline.stages[-1].sequence_part)
        with torch.autocast(self.device.type, enabled=False):
            return mean_loss(logits, part) / self.world.plan.tp

    def _counted_elsewhere(self) -> list[nn.Parameter]:
        if self.has_first or not self.has_last:
            return []
        return list(self.pipeline.stages[-1].embed.parameters())

    def first_sublayer(self) -> list[nn.Parameter]:
        return list(self.pipeline.stages[0].blocks["0"].attn.parameters()) if self.has_first else []

    def _run(self, step: Callable[..., object], inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """The losses of the micro-batches, where the last stage is; ``step``: of the schedule."""
        self.pipeline.start()
        losses: list[Tensor] = []
        # torch 2.11 has a stage refuse what is not laid out as the example it was built with.
        given = (inputs.contiguous(),) if self.has_first else ()
        named = {"target": targets, "losses": losses} if self.has_last else {}
        with self.autocast():
            step(*given, return_outputs=False, **named)
        return losses

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._run(self.schedule.step, inputs, targets)
        total = torch.zeros((), device=self.device)
        if losses:
            total += torch.stack([loss.detach() for loss in losses]).mean()
        if self.world.tied_group is not None:
            from . import shard

            tied = self.pipeline.stages[0 if self.has_first else -1].embed.weight
            assert tied.grad is not None, "the embedding is used on both ends"
            shard.sum_over_tied([tied.grad], self.world)
        self.optimizer.collect_gradients()
        self._complete_gradients()
        return self._mean(total)

    def _rows_at_once(self) -> int:
        return self.rows

    def _validate_batch(self, inputs: Tensor, targets: Tensor, found: Tensor) -> None:
        losses = self._run(self.schedule.eval, inputs, targets)
        for loss, micro_targets in zip(losses, targets.split(self.micro_batch), strict=bool(losses)):
            own = own_part(micro_targets, self.pipeline.stages[-1].sequence_part)
            _count(found, loss * self.world.plan.tp, own)


def build_engine(
    model_of: Callable[[tuple[int, ...]], GPT], config: TrainConfig, world: World, device
) -> Engine:
    """The engine of ``world.plan``; ``model_of(cuts)`` builds the whole model."""
    plan = world.plan
    if world.size == 1:
        return Engine(model_of(()), config, world, device)
    assert isinstance(world, ManyProcesses)
    if plan.pp == 1:
        return ShardedEngine(model_of(()), config, world, device)
    return PipelineEngine(model_of(cuts(config.model, plan)), config, world, device)
