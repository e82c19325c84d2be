"""Train one model: the loop, and what makes a run survive whatever stops it.

One optimiser step on ``batch_size`` sequences, in micro-batches::

    loss = mean over all tokens of the step;  clip;  learning rate;  Muon and AdamW

The loop is :func:`_loop`. Everything it needs to go on is in a checkpoint, so a run that was
stopped and resumed computes the same bits on a CPU as one that never stopped, and its
``metrics.jsonl`` is the same file: at resume it is cut back to where the checkpoint left it.
Wall-clock times, which never repeat, are in ``timing.jsonl``.

One line of ``metrics.jsonl`` an optimiser step (``"split": "train"``)::

    step, tokens          done so far
    loss                  nats per token, mean over the step's tokens
    grad_norm             2-norm of the whole gradient, before clipping
    grad_norm_first       of that, the part of the first sublayer's own parameters (the first attention
                          with its norm): what depth leaves of the gradient at the bottom
    lr, muon_lr           learning rates of AdamW and of Muon
    connection_lr         AdamW's for the connection's own parameters, where it is another

and one an evaluation (``"split": "val"``): step, tokens, loss. A run that ends because a loss is not finite
leaves ``diverged.json``, which says at which step. ``depth.jsonl`` has a line an evaluation too, of what the
network does in depth (:mod:`depthmix.health`); it repeats like ``metrics.jsonl``.

**Many processes.** Under ``torchrun`` every rank runs this loop on its part of the model and of the batch
(:mod:`depthmix.parallel`). Whatever decides how the loop goes on is the same on all of them: losses and norms are those
of all tokens, and a signal that one has received stops all after the same step. Rank 0 alone holds the folder, writes
the logs and speaks.

TensorBoard events are always written. Weights & Biases is used when the environment variable
WANDB_PROJECT names a project (the extra ``wandb`` must be installed).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import signal
import socket
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from . import health
from .checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    record_best,
    restore,
    save_checkpoint,
    start_from,
    versions,
    write_json,
)
from .config import TrainConfig, from_dict
from .data import Loader, open_dataset, prepare
from .device import find_device
from .errors import Interrupted, RunError, UserError
from .info import parameter_counts
from .memory import saved_bytes
from .model import GPT
from .ops import native
from .parallel.engine import Engine, build_engine
from .parallel.plan import ParallelPlan
from .parallel.world import TIMEOUT_S, ManyProcesses, World, launched

if TYPE_CHECKING:
    from rich.progress import Progress

MAY_CHANGE_ON_RESUME = (
    "device", "compile", "keep_last", "checkpoint_interval", "data.cache_dir", "parallel", "micro_batch",
    "activation_checkpointing",
)  # fmt: skip
"""Fields of the configuration that alter neither the training nor the metrics, beyond rounding on
another device or in another order. Any other difference is refused: the result would be of no one configuration."""

DIVERGED = "diverged.json"
"""In the folder of a run that ended because a loss was not finite: the step and the message."""


def train(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    init_from: str | Path | None = None,
    quiet: bool = False,
    report: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> dict:
    """Train ``config`` in ``run_dir`` and return what it also writes to ``result.json``.

    ``resume`` goes on from the newest checkpoint, or from the beginning where there is none yet; a
    finished run is returned as it is. ``init_from``, a run or checkpoint folder, gives the initial weights; to a run
    that is resumed it makes no difference. ``quiet`` prints nothing. ``report`` draws ``loss.png`` and
    ``report.html`` at the end. Under ``torchrun`` called by all processes, with a folder that all see; they divide the
    work as ``config.parallel`` says, and wait at most ``timeout_s`` seconds for each other.

    Raises ``UserError`` for a folder in use or not empty, a configuration that differs from the one
    being resumed, a device or data that do not exist, a number of processes that does not fit; ``RunError`` when the
    loss is not finite, a file cannot be written, a checkpoint is damaged or a process is lost, which it names;
    ``Interrupted`` after SIGINT, SIGTERM or SIGHUP, once the step in progress is done and saved.
    """
    began = time.monotonic()
    run_dir = Path(run_dir)
    if not timeout_s > 0:
        raise UserError(f"timeout must be more than 0 seconds, got {timeout_s:g}")
    device = _own_device(config)
    if launched():
        # Before anybody waits for anybody: it may take hours, and not the same everywhere.
        prepare(config.data)
    with (
        contextlib.ExitStack() as until_the_end,
        _open_world(config, device, timeout_s) as world,
        contextlib.ExitStack() as held,
    ):
        run: _Run | None = None
        stop = _StopSignals(quiet or not world.first, several=world.size > 1)

        def where() -> str:
            latest = latest_checkpoint(run_dir / "checkpoints")
            step = f"This rank had done {run.step} steps. " if run else "Training had not begun. "
            return step + (
                f"The last checkpoint is {latest}; go on with --resume" if latest else "Nothing was saved yet"
            )

        def begin() -> dict | None:
            """Hold the folder for this run and write what describes it; the result where it is finished."""
            _check_folder(run_dir, resume)
            held.enter_context(_locked(run_dir))
            _check_folder(run_dir, resume)
            dataset = open_dataset(prepare(config.data, progress=not quiet and sys.stdout.isatty()))
            whole = _with_vocabulary(config, dataset.tokenizer.vocab_size)
            if init_from is not None:
                _check_same_tokenizer(dataset.tokenizer, Path(init_from))
            if resume:
                _check_same_config(whole, run_dir / "config.json")
                if (run_dir / "result.json").exists():
                    if report and not (run_dir / "report.html").exists():
                        _report(run_dir)
                    return _read_json(run_dir / "result.json")
            (run_dir / DIVERGED).unlink(missing_ok=True)
            write_json(run_dir / "config.json", whole.to_dict())
            write_json(run_dir / "tokenizer.json", dataset.tokenizer.to_dict())
            write_json(run_dir / "environment.json", _environment(device, world))
            return None

        with world.blame(where), _errors_named(run_dir):
            finished = world.decide(begin)
            if finished is not None:
                return finished
            dataset = open_dataset(prepare(config.data))
            config = _with_vocabulary(config, dataset.tokenizer.vocab_size)
            run = _Run(config, run_dir, dataset, device, world, resume, init_from, quiet, began)
            if world.size > 1:
                # When one process fails, torchrun terminates the others, which have yet to find out and say why they
                # end. Not before training begins: in the making of a group a process would be deaf until the timeout.
                until_the_end.enter_context(stop)
            with run.logs, run.display, run.checkpoints, stop:
                _loop(run, stop)
            result = _finish(run)
    if report and world.first:
        _report(run_dir)
    return result


def _own_device(config: TrainConfig) -> torch.device:
    """The device of this process; of several on a machine with GPUs, each has its own."""
    device = find_device(config.device)
    if device.type == "cuda":
        if launched() and device.index is None:
            device = find_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _open_world(config: TrainConfig, device: torch.device, timeout_s: float) -> Iterator[World]:
    """The processes of this run, agreed on the plan; left in peace when the run is through."""
    world: World
    if launched():
        # Without a plan all are copies.
        plan = ParallelPlan.parse(config.parallel or f"dp={os.environ['WORLD_SIZE']}")
        plan.check(config)
        world = ManyProcesses(plan, device.type, timeout_s)
    else:
        ParallelPlan.parse(config.parallel).check_processes(1)
        world = World()
    try:
        yield world
    except Interrupted:
        world.close()
        raise
    world.close()


# --- the loop -------------------------------------------------------------------------------------


def _loop(run: "_Run", stop: "_StopSignals") -> None:
    """Evaluate, save and step until all steps are done.

    A run resumes at the top of the loop. An evaluation that a signal cut short is not on record, so
    it is due again there: the metrics come out the same.
    """
    config = run.config
    while True:
        finished = run.step == config.steps
        improved = False
        if run.evaluated < run.step and _evaluated_at(config, run.step):
            improved = run.evaluate(stop)
        stopped, unsaved = map(bool, run.world.max([stop.received is not None, run.checkpoints.failed]))
        if unsaved:
            run.durable()  # raises
        stopped = stopped and not (finished and run.evaluated == run.step)
        if improved or finished or stopped or _due(run.step, config.checkpoint_interval):
            run.save()
        if stopped:
            by = stop.received.name if stop.received else "a signal to another process"
            raise Interrupted(f"stopped by {by} after step {run.step}; saved {run.durable()}")
        if finished:
            run.durable()
            return

        started = time.perf_counter()
        inputs, targets = run.next_batch()
        run.optimizer.set_lr_fraction(config.optim.lr_fraction(run.step, config.steps))
        run.optimizer.zero_grad()
        loss, grad_norm, grad_norm_first = _gradients(run, inputs, targets)
        if run.world.any(not (math.isfinite(loss) and math.isfinite(grad_norm))):
            raise _step_not_finite(run, loss, grad_norm)
        # A checkpoint is whole before the step that follows it is done: no more is ever lost than what is between two.
        run.durable()
        run.optimizer.step()
        run.step += 1
        run.log_step(loss, grad_norm, grad_norm_first, seconds=time.perf_counter() - started)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step > 0 and step % interval == 0


def _evaluated_at(config: TrainConfig, step: int) -> bool:
    return step == config.steps or _due(step, config.eval_interval)


def _gradients(run: "_Run", inputs: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Mean loss over the step's tokens, and the norm of its gradient before clipping: whole, and of the
    first sublayer's parameters.

    ``inputs`` and ``targets`` are this process's ``[rows, T]``.
    """
    total = run.engine.backward(inputs, targets)
    first = run.optimizer.grad_norm(run.engine.first_sublayer())
    recorded = run.records_depth and _evaluated_at(run.config, run.step + 1)
    run.gradients = health.gradients(run.engine.whole_model, run.optimizer) if recorded else None
    grad_norm = run.optimizer.clip_grad_norm(run.config.optim.grad_clip)
    # One transfer from the device for all numbers.
    loss, grad_norm, grad_norm_first = torch.stack([total, grad_norm, first]).tolist()
    return loss, grad_norm, grad_norm_first


def _step_not_finite(run: "_Run", loss: float, grad_norm: float) -> RunError:
    """Of all processes, though it may be in the memory of one alone."""
    seen = run.world.gather((loss, grad_norm))
    rank = next(rank for rank, numbers in enumerate(seen) if not all(map(math.isfinite, numbers)))
    (loss, grad_norm), alone = seen[rank], any(all(map(math.isfinite, numbers)) for numbers in seen)
    what = f"step {run.step + 1} has loss {loss} and gradient norm {grad_norm}"
    return _not_finite(run, f"{what}{f' on rank {rank}' if alone else ''}, and was not applied")


def _not_finite(run: "_Run", what: str) -> RunError:
    latest = run.durable()
    where = f"the last checkpoint is {latest}" if latest else "no checkpoint was saved yet"
    message = (
        f"{run.run_dir}: {what}; {where}. Training "
        f"repeats exactly, so --resume would end here again: start a new run with a lower --lr and "
        f"--muon-lr, more --warmup-steps, or --precision fp32"
    )
    if run.world.first:
        write_json(run.run_dir / DIVERGED, {"step": run.step, "message": what})
    return RunError(message)


# --- the run: everything the loop works on --------------------------------------------------------


class _Run:
    """Model, optimiser, data, logs and progress of one run, built fresh or from a checkpoint."""

    def __init__(self, config, run_dir, dataset, device, world: World, resume: bool, init_from, quiet, began):
        self.config: TrainConfig = config
        self.run_dir: Path = run_dir
        self.device: torch.device = device
        self.world = world
        self.began = began
        self.val = dataset.val
        self.data = {"train": dataset.train.fingerprint, "val": dataset.val.fingerprint}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.engine: Engine = build_engine(
            lambda cuts: build_model(config, device, cuts=cuts, init_from=init_from), config, world, device
        )
        self.optimizer = self.engine.optimizer
        self.loader = Loader(
            dataset.train, config.model.seq_len, self.engine.rows, config.seed,
            rank=world.data_rank, world_size=world.plan.data_ways,
        )  # fmt: skip

        self.step = 0
        """Optimiser steps done."""
        self.evaluated = 0
        """The step of the last evaluation."""
        self.gradients: health.Gradients | None = None
        """Of the step before an evaluation, to be recorded with it."""
        self.best: dict | None = None
        self.latest: Path | None = None
        """The newest checkpoint, perhaps still being written."""
        self.seconds_before = 0.0
        self.peak_before = 0
        self.checkpoints = (_Checkpoints if world.size == 1 else _ManyCheckpoints)(self)
        saved = self.checkpoints.open_latest() if resume else None
        if saved is not None:
            state = saved.state
            if state["data"] != self.data:
                raise UserError(
                    f"the data are not those that {saved.folder} was trained on: "
                    f"fingerprints {self.data}, there {state['data']}; start a new run"
                )
            self.loader.load_state_dict(state["loader"])
            self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
            self.seconds_before, self.peak_before = state["seconds"], state["peak_memory_bytes"]
            if state.get("gradient_rms"):
                self.gradients = health.Gradients(state["gradient_rms"], samples=[])
            self.latest = saved.folder
            # A process that died between these writes left them one checkpoint behind.
            if world.first:
                record_best(self.checkpoints.folder, self.best)
                prune_checkpoints(self.checkpoints.folder, config.keep_last)
        self.display = _Display(self, quiet or not world.first)
        self.logs: _Logs | _NoLogs = _NoLogs()
        if world.first:
            offsets = {} if saved is None else saved.state["offsets"]
            self.logs = _Logs(run_dir, config, self.step, offsets)

        # Last, as importing some libraries draws numbers. Nothing in training does; what somebody
        # adds one day shall repeat too.
        if saved is None:
            random.seed(config.seed)
            np.random.seed(config.seed % 2**32)
            torch.manual_seed(config.seed)
        else:
            self.checkpoints.restore(saved)
            if changed := _changes(saved.state["environment"], _environment(device, world)):
                self.display.note(f"this machine is not as at the checkpoint, so bits may differ: {changed}")
        if config.record_depth and not self.records_depth:
            self.display.note(
                "what the network does in depth is not recorded, as no process holds the whole model with fsdp, tp or "
                "pp; depthmix diagnose shows it for any checkpoint"
            )

    @property
    def records_depth(self) -> bool:
        """Whether depth.jsonl gets a line an evaluation: where every process holds the whole model."""
        plan = self.world.plan
        return self.config.record_depth and plan.fsdp * plan.tp * plan.pp == 1

    @property
    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    def parameter_counts(self) -> dict[str, int]:
        """Of the whole model."""
        if self.world.size == 1:
            return parameter_counts(self.engine.whole_model)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parameter_counts(GPT(self.config.model))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.loader.next_batch()
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def log_step(self, loss: float, grad_norm: float, grad_norm_first: float, seconds: float) -> None:
        fraction = self.config.optim.lr_fraction(self.step - 1, self.config.steps)
        optim = self.config.optim
        rates = {"lr": optim.lr * fraction, "muon_lr": optim.muon_lr * fraction}
        if optim.connection_lr != 1:
            rates["connection_lr"] = optim.lr * optim.connection_lr * fraction
        speed = self.config.tokens_per_step / seconds
        self.logs.metrics(
            {"split": "train", "step": self.step, "tokens": self.tokens, "loss": loss}
            | {"grad_norm": grad_norm, "grad_norm_first": grad_norm_first}
            | rates
        )
        self.logs.timing({"step": self.step, "seconds": seconds, "tokens_per_s": speed, "time": time.time()})
        self.display.step(loss, speed)

    @torch.no_grad()
    def evaluate(self, stop: "_StopSignals") -> bool:
        """Measure and log the validation loss; True when it is the lowest so far.

        Given up, with nothing logged, when a signal arrives: what runs the job may not wait long.
        """
        loss = self.engine.validate(
            self.val, self.config.eval_tokens, lambda: self.world.any(stop.received is not None)
        )
        if loss is None:
            return False
        if self.records_depth and self.world.first:
            self.record_depth()  # also of a model whose loss is not finite: it shows where
        if not math.isfinite(loss):
            raise _not_finite(self, f"the validation loss after step {self.step} is {loss}")
        self.logs.metrics({"split": "val", "step": self.step, "tokens": self.tokens, "loss": loss})
        self.display.validation(loss)
        self.evaluated = self.step
        if self.best is not None and loss >= self.best["val_loss"]:
            return False
        self.best = {"step": self.step, "val_loss": loss}
        return True

    def record_depth(self) -> None:
        """Log what the network does in depth."""
        ids = health.text_of(self.val, self.config.model.seq_len).to(self.device)
        found = health.measure(self.engine.whole_model, ids, self.engine.autocast())
        gradient_rms = self.gradients.rms if self.gradients else None
        line = {"step": self.step, "tokens": self.tokens, **found.record, "gradient_rms": gradient_rms}
        self.logs.depth(line, health.histograms(found, self.gradients))

    def save(self) -> None:
        """Have this step made durable: first the metrics up to here, then the checkpoint, then drop old ones."""
        offsets = self.logs.sync()
        state = {
            "config": self.config.to_dict(),
            "data": self.data,
            "loader": self.loader.state_dict(),
            "evaluated": self.evaluated,
            "best": self.best,
            "gradient_rms": self.gradients.rms if self.gradients else None,
            "offsets": offsets,
            "seconds": self.seconds_before + time.monotonic() - self.began,
            "peak_memory_bytes": self.peak_memory(),
            "environment": _environment(self.device, self.world),
        }
        self.checkpoints.save(state)

    def durable(self) -> Path | None:
        """The newest checkpoint, whole on the disk."""
        return self.checkpoints.wait()

    def peak_memory(self) -> int:
        """Bytes: of the device's allocator on CUDA, of the process's resident memory elsewhere."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _peak_resident_bytes()
        return max(self.peak_before, int(self.world.max([peak])[0]))


class _Checkpoints:
    """The checkpoints of a run of one process. A context: what is in flight at its end is finished."""

    def __init__(self, run: _Run):
        self.run, self.folder = run, run.run_dir / "checkpoints"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def open_latest(self) -> "_Saved | None":
        newest = latest_checkpoint(self.folder)
        return None if newest is None else _Saved(newest, load_checkpoint(newest))

    def restore(self, saved: "_Saved") -> None:
        # A second copy of its tensors is not to be held all along.
        restore(saved.take(), self.run.engine.whole_model, self.run.optimizer)

    def save(self, state: dict) -> None:
        run = self.run
        if run.latest is None or run.latest.name != f"step-{run.step:08d}":
            model = run.engine.whole_model
            run.latest = save_checkpoint(self.folder, run.step, model, run.optimizer, state)
        record_best(self.folder, run.best)
        prune_checkpoints(self.folder, run.config.keep_last)

    def wait(self) -> Path | None:
        return self.run.latest

    failed = False
    """Whether ``wait`` will raise."""


class _ManyCheckpoints(_Checkpoints):
    """Those that all processes write together, while training goes on."""

    def __init__(self, run: _Run):
        from .parallel.checkpoint import ShardedCheckpoints

        super().__init__(run)
        self.writer = ShardedCheckpoints(
            self.folder, keep_last=run.config.keep_last, timeout_s=run.world.timeout_s
        )

    def __exit__(self, kind, *_):
        # When a process is lost, the thread that writes waits for it as well, and not longer.
        if kind is None or issubclass(kind, Interrupted):
            self.writer.close()

    def open_latest(self):
        newest = self.run.world.decide(lambda: latest_checkpoint(self.folder))
        return None if newest is None else _Saved(newest, None)

    def restore(self, saved):
        from .parallel.checkpoint import load_into

        load_into(saved.folder, self.run.engine.named_weights(), self.run.optimizer.named_state())

    def save(self, state):
        run = self.run
        self.writer.save(run.step, run.engine.named_weights(), run.optimizer.named_state(), state, run.best)
        run.latest = self.folder / f"step-{run.step:08d}"

    def wait(self):
        return self.writer.wait()

    @property
    def failed(self):
        return self.writer.failed


class _Saved:
    """The checkpoint that a run goes on from."""

    def __init__(self, folder: Path, checkpoint):
        self.folder, self._checkpoint = folder, checkpoint
        self.state = read_state(folder) if checkpoint is None else checkpoint.state

    def take(self):
        """The whole of it, once."""
        checkpoint, self._checkpoint = self._checkpoint, None
        return checkpoint


def build_model(
    config: TrainConfig,
    device: torch.device,
    *,
    cuts: tuple[int, ...] = (),
    init_from: str | Path | None = None,
) -> GPT:
    """The model as it is trained: seeded weights, on ``device``, in bf16 for ``precision="bf16"``.

    With ``init_from`` the weights are those of a run or checkpoint folder; ``RunError`` where they do not fit.
    """
    model = GPT(config.model, seed=config.seed, cuts=cuts)
    if init_from is not None:
        start_from(model, Path(init_from))
    return _in_precision(model.to(device), config)


def _in_precision(model: GPT, config: TrainConfig) -> GPT:
    if config.precision == "bf16":
        # Parameters only: tables of constants keep their precision.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def _finish(run: _Run) -> dict:
    """Write ``result.json`` from the files of the finished run; the same result on every process."""
    peak = run.peak_memory()
    return run.world.decide(lambda: _result(run, peak))


def _result(run: _Run, peak: int) -> dict:
    lines = _read_lines(run.run_dir / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    timing = _read_lines(run.run_dir / "timing.jsonl")
    steps = run.config.steps
    counts = run.parameter_counts()
    assert run.best is not None, "the last step is evaluated"
    result = {
        "status": "finished",
        "residual": run.config.model.residual,
        "n_streams": run.config.model.n_streams,
        "seed": run.config.seed,
        "steps": steps,
        "tokens": run.tokens,
        "parameters": counts["total"],
        "connection_parameters": counts["connection"],
        "train_loss": statistics.fmean(losses[-min(200, max(1, steps // 10)) :]),
        "val_loss": next(line["loss"] for line in reversed(lines) if line["split"] == "val"),
        "best_val_loss": run.best["val_loss"],
        "best_step": run.best["step"],
        "tokens_per_s": statistics.median(t["tokens_per_s"] for t in timing if t["step"] > 0.1 * steps),
        "peak_memory_bytes": peak,
        "saved_bytes_per_token": _saved_bytes_per_token(run),
        "wall_seconds": run.seconds_before + time.monotonic() - run.began,
    }
    write_json(run.run_dir / "result.json", result)
    return result


def _saved_bytes_per_token(run: _Run) -> float:
    """Bytes of activations that one sequence leaves for its backward pass, over its tokens, in a whole model."""
    config = run.config
    with contextlib.ExitStack() as stack:
        if run.world.size > 1:  # numbers are not needed, and nobody may have them all
            stack.enter_context(FakeTensorMode())
            model = _in_precision(GPT(config.model, seed=config.seed), config)
        else:
            model = run.engine.whole_model
        ids = torch.zeros(1, config.model.seq_len, dtype=torch.int64, device=model.embed.weight.device)
        with run.engine.autocast():
            return saved_bytes(model, ids, ids) / ids.numel()


def _report(run_dir: Path) -> None:
    try:
        from .report import write_run_report

        write_run_report(run_dir)
    except Exception as error:  # the run is finished and saved; a drawing must not undo that
        print(f"depthmix: warning: no report for {run_dir}: {error}", file=sys.stderr)


# --- logs -----------------------------------------------------------------------------------------


class _Appended:
    """A file that grows at the end, can be cut back, and names itself when it cannot be written.

    Unbuffered: what was written is in the file, and nothing waits for a close that would fail again
    on a full disk.
    """

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        self.file = open(path, "ab", buffering=0)
        length = self.file.seek(0, os.SEEK_END)
        if length < keep:
            self.file.close()
            raise RunError(
                f"{path} has {length} bytes where the checkpoint recorded {keep}; "
                f"restore it from a copy, or start a new run"
            )
        self.file.truncate(keep)
        self.length = keep

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                written = self.file.write(rest)
                self.length += written
                rest = rest[written:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def line(self, value: dict) -> None:
        self.write((json.dumps(value, allow_nan=False) + "\n").encode())

    def sync(self) -> int:
        """Put it on the disk; its length in bytes."""
        os.fsync(self.file.fileno())
        return self.length


class _TensorBoard:
    """Scalars, histograms and images as TensorBoard events, one file a process.

    Not torch's SummaryWriter: that writes from a thread of its own, in which a full disk ends in a
    traceback instead of a message.
    """

    def __init__(self, folder: Path, step: int):
        # Heavy to import, so only once training is certain.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # Files are read in the order of their names.
        number = len(list(folder.iterdir()))
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{number}"
        self.file = _Appended(folder / name)
        self._records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        # What an earlier process logged of later steps will be repeated: readers drop it.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def _write(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._values([{"tag": tag, "simple_value": value} for tag, value in values.items()], step)

    def histograms(self, values: dict[str, dict], step: int) -> None:
        """Tag -> fields of a ``HistogramProto``."""
        self._values([{"tag": tag, "histo": fields} for tag, fields in values.items()], step)

    def images(self, values: dict[str, health.Picture], step: int) -> None:
        self._values([{"tag": tag, "image": self._image(picture)} for tag, picture in values.items()], step)

    def _image(self, picture: health.Picture):
        return self._summary.Image(
            width=picture.width, height=picture.height, colorspace=3, encoded_image_string=picture.png
        )

    def _values(self, entries: list[dict], step: int) -> None:
        summary = self._summary(value=[self._summary.Value(**entry) for entry in entries])
        self._write(step=step, summary=summary)


class _Logs:
    """metrics.jsonl, timing.jsonl, depth.jsonl, TensorBoard and, on request, Weights & Biases.

    ``offsets``: how much of each file the checkpoint being resumed counts on, in bytes.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, step: int, offsets: dict[str, int]):
        names = ("metrics", "timing", "depth") if config.record_depth else ("metrics", "timing")
        self._files = {name: _Appended(run_dir / f"{name}.jsonl", offsets.get(name, 0)) for name in names}
        self._depth_lines = _read_lines(run_dir / "depth.jsonl") if config.record_depth else []
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", step)
        self._wandb = _wandb_run(run_dir, config)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for appended in (*self._files.values(), self._tensorboard.file):
            appended.file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def metrics(self, line: dict) -> None:
        self._files["metrics"].line(line)
        split = line["split"]
        values = {key: line[key] for key in line if key not in ("split", "step", "tokens")}
        self._show({f"{split}/{key}": value for key, value in values.items()}, line["step"])

    def timing(self, line: dict) -> None:
        self._files["timing"].line(line)
        self._show({"train/tokens_per_s": line["tokens_per_s"]}, line["step"])

    def depth(self, line: dict, histograms: dict[str, dict]) -> None:
        self._files["depth"].line(line)
        self._depth_lines.append(line)
        self._show(health.scalars(line), line["step"])
        self._tensorboard.histograms(histograms, line["step"])
        self._tensorboard.images(health.images(self._depth_lines), line["step"])

    def _show(self, values: dict[str, float], step: int) -> None:
        self._tensorboard.scalars(values, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sync(self) -> dict[str, int]:
        """Put every line on the disk; the lengths of the files in bytes."""
        return {name: appended.sync() for name, appended in self._files.items()}


class _NoLogs:
    """What every process but the first logs."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def metrics(self, line: dict) -> None:
        pass

    timing = metrics

    def depth(self, line: dict, histograms: dict[str, dict]) -> None:
        pass

    def sync(self) -> dict[str, int]:
        return {}


def _wandb_run(run_dir: Path, config: TrainConfig):
    """A Weights & Biases run when WANDB_PROJECT asks for one; the same one again at resume."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        import wandb
    except ImportError:
        print(
            'depthmix: warning: WANDB_PROJECT is set but wandb is missing: pip install "depthmix[wandb]"',
            file=sys.stderr,
        )
        return None
    path = run_dir.resolve()
    return wandb.init(
        project=os.environ["WANDB_PROJECT"],
        name=run_dir.name,
        id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
        dir=str(path),
        config=config.to_dict(),
        resume="allow",
    )


class _Display:
    """Progress on standard output: one live line on a terminal, a line now and then elsewhere."""

    SECONDS_BETWEEN_LINES = 10

    def __init__(self, run: _Run, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.run, self.quiet = run, quiet
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.first_step, self.began, self.printed = run.step, time.monotonic(), 0.0
        self.loss: float | None = None
        self.tokens_per_s = 0.0
        self.val_loss: float | None = None
        self.live: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.live = Progress(BarColumn(20), TextColumn("{task.description}"), console=self.console)
            self.task = self.live.add_task("", total=run.config.steps, completed=run.step)

    def __enter__(self):
        if self.quiet:
            return self
        config, world = self.run.config, self.run.world
        count = self.run.parameter_counts()["total"]
        where = str(self.run.device) if world.size == 1 else f"{world.size} processes, {world.plan}"
        self.note(
            f"{config.model.label}: {count:,} parameters, {config.steps:,} steps of "
            f"{config.tokens_per_step:,} tokens on {where}, in {self.run.run_dir}"
        )
        if self.run.step:
            self.note(f"going on from step {self.run.step:,}")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        # A reader that went away (a pipe into head) is no reason to stop training.
        with contextlib.suppress(OSError):
            self.console.print(text, markup=False)

    def step(self, loss: float, tokens_per_s: float) -> None:
        self.loss, self.tokens_per_s = loss, tokens_per_s
        if self.live is not None:
            self._update(self.live)
        elif not self.quiet and time.monotonic() - self.printed >= self.SECONDS_BETWEEN_LINES:
            self.note(self._line())
            self.printed = time.monotonic()

    def validation(self, loss: float) -> None:
        self.val_loss = loss
        if self.live is not None:
            self._update(self.live)
        else:
            self.note(f"step {self.run.step:,}/{self.run.config.steps:,}  validation loss {loss:.4f}")

    def _update(self, live: "Progress") -> None:
        live.update(self.task, completed=self.run.step, description=self._line())

    def _line(self) -> str:
        done, of = self.run.step, self.run.config.steps
        parts = [f"step {done:,}/{of:,}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.val_loss is not None:
            parts.append(f"val {self.val_loss:.4f}")
        if self.loss is not None:
            pace = (time.monotonic() - self.began) / (done - self.first_step)
            minutes, seconds = divmod(int(pace * (of - done)), 60)
            parts += [
                f"{self.tokens_per_s:,.0f} tokens/s",
                f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left",
            ]
        return "  ".join(parts)


# --- before the loop ------------------------------------------------------------------------------


def _check_folder(run_dir: Path, resume: bool) -> None:
    """Refuse to mix a run with what is in the folder already."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; choose another folder with --out")
    names = {entry.name for entry in run_dir.iterdir()} if run_dir.is_dir() else set()
    # What a process leaves that died before its configuration was written.
    names = {name for name in names if name != "lock" and not name.endswith(".new")}
    if names and not resume:
        raise UserError(
            f"{run_dir} is not empty; go on with it by --resume, or choose another folder with --out"
        )
    if names and "config.json" not in names:
        raise UserError(f"{run_dir} is not a run folder: it has no config.json; nothing to resume there")


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends."""
    import fcntl

    with _errors_named(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / "lock", "a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by process {file.read().strip() or 'unknown'}; "
                f"wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            print(f"depthmix: warning: {run_dir} cannot be locked ({error.strerror})", file=sys.stderr)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _errors_named(run_dir: Path) -> Iterator[None]:
    """Turn an error of the operating system into a message with the path and what is safe."""
    try:
        yield
    except OSError as error:
        latest = latest_checkpoint(run_dir / "checkpoints")
        kept = f"The last checkpoint is {latest}; once that is mended, go on with --resume" if latest else ""
        raise RunError(
            f"{error.filename or run_dir}: {error.strerror or error}. {kept}".rstrip(". ")
        ) from error


def _with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
    model = dataclasses.replace(config.model, vocab_size=padded_vocabulary(vocab_size))
    return dataclasses.replace(config, model=model)


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding: the tokenizer's vocabulary rounded up to a multiple of 64, which matrix products like."""
    return -(-vocab_size // 64) * 64


def _flat(config: TrainConfig) -> dict:
    values: dict = {}
    for key, value in config.to_dict().items():
        nested = value if isinstance(value, dict) else None
        values |= {f"{key}.{k}": v for k, v in nested.items()} if nested else {key: value}
    return values


def _check_same_tokenizer(tokenizer, start: Path) -> None:
    """Refuse to start from weights whose ids stand for other text."""
    for folder in (start, *start.resolve().parents[:2]):
        saved = _read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
        if saved is not None:
            if saved != tokenizer.to_dict():
                raise UserError(
                    f"--init-from {start}: its tokenizer is another ({saved.get('name')}) than that of the data "
                    f"({tokenizer.name}); prepare the data with the same one"
                )
            return


def _check_same_config(config: TrainConfig, path: Path) -> None:
    """Refuse to go on with another configuration than the saved one, naming each difference."""
    if not path.exists():
        return
    saved = _flat(from_dict(_read_json(path)))
    asked = _flat(config)
    differences = [
        f"{key}: {saved[key]!r} there, {asked[key]!r} asked for"
        for key in asked
        if key not in MAY_CHANGE_ON_RESUME and saved[key] != asked[key]
    ]
    if differences:
        raise UserError(
            f"{path} was started with another configuration. {'; '.join(differences)}. "
            f"Resume with the saved values, or start a new run with --out"
        )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); restore it from a copy, or start a new run") from error


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _environment(device: torch.device, world: World) -> dict[str, str]:
    """What besides the configuration decides the bits and the speed."""
    cuda = device.type == "cuda"
    return {
        **versions(),
        "platform": platform.platform(),
        "device": str(device) if world.size == 1 else device.type,
        "parallel": str(world.plan),
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cuda": str(torch.version.cuda) if cuda else "none",
        "threads": str(torch.get_num_threads()),
        "cpu_kernels": "none" if cuda else native.status(),
    }


def _changes(before: dict, now: dict) -> str:
    return ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key])


def _peak_resident_bytes() -> int:
    # getrusage counts what the parent had when it started this process; the kernel's own line does not.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class _StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into a request that the loop sees after the step.

    Further signals change nothing: the save that follows is not interrupted. Outside of the main
    thread Python delivers no signals, and none are taken over; neither is a SIGHUP that nohup ignores.
    """

    def __init__(self, quiet: bool, several: bool = False):
        self.quiet = quiet
        self._text = "\nstopping after this step and a checkpoint\n"
        if several:  # a launcher says the same when one of them is lost
            self._text = "\nstopping after this step and a checkpoint, where all other processes are there\n"
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._entered = 0

    def __enter__(self):
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if not self.quiet:
                # Not print(): the handler may have interrupted one. A terminal that hung up is gone.
                with contextlib.suppress(OSError):
                    os.write(2, self._text.encode())

    def __exit__(self, *_):
        self._entered -= 1
        if not self._entered:
            for number, handler in self._before.items():
                signal.signal(number, handler)
