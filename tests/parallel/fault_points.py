"""``depthmix`` with one fault, in one rank, at a chosen point; and a record of what every rank did.

Takes the arguments of ``depthmix``; ``torchrun ... fault_points.py train ...`` starts it. The environment says where
the record goes (``DEPTHMIX_NOTES``, a folder) and what is to happen (``DEPTHMIX_FAULT``, JSON)::

    {"rank": 1, "at": "step", "step": 7, "do": "kill"}

or a list of such, each with the life of the job that it is for, ``"attempt": 0`` if nothing is said: what happened once
does not happen again after a restart.

``at``: ``world`` before the processes meet; ``loop`` before the first step; ``step`` before the forward pass of
``step``, or of the one ``after`` so many of this life; ``validation`` in its second batch; ``save`` while checkpoint
``step`` is written, in the background, or any; ``end`` when all is done and the processes have parted. At a step or a
validation the checkpoint before is whole. ``do``: see ``ACTIONS``.

The record: ``pid-RANK-ATTEMPT``; ``fault-RANK-ATTEMPT`` once it has happened; and ``steps-RANK-ATTEMPT.jsonl``, with a
line for each batch taken: its step, and epoch and number of every window that was read for it.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import depthmix.parallel.checkpoint as sharded
from depthmix import cli, train
from depthmix.data import Loader
from depthmix.parallel import engine, world

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def signal_self(number: int):
    def send(run) -> None:
        os.kill(os.getpid(), number)
        if number == signal.SIGKILL:
            time.sleep(60)  # the signal is for the process, and may take another thread first

    return send


def terminate_launcher(run) -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def no_room(run) -> None:
    """From now on no file of this process may grow: as on a full disk, but for the word of the system."""
    metrics = train_folder() / "metrics.jsonl"
    # What it says on standard output may go to a file too.
    limit = max(4096, metrics.stat().st_size if metrics.exists() else 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_folder() -> Path:
    return Path(sys.argv[sys.argv.index("--out") + 1])


@torch.no_grad()
def poison_weight(run) -> None:
    # All of it: one number of an embedding may be of a token that never comes.
    local(next(run.engine.parts[0].parameters())).fill_(float("nan"))


def poison_gradient(run) -> None:
    """In this process alone, once gradients are averaged."""
    clip = run.optimizer.clip_grad_norm

    def poisoned(limit):
        run.optimizer.clip_grad_norm = clip
        with torch.no_grad():
            given = [p.grad for part in run.engine.parts for p in part.parameters() if p.grad is not None]
            local(given[0]).view(-1)[0] = float("nan")
        return clip(limit)

    run.optimizer.clip_grad_norm = poisoned


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fail(run) -> None:
    raise RuntimeError("as the test wants it")


def settle(run) -> None:
    """Let the checkpoint that is being written get whole, so that what is saved does not depend on speed."""
    thread = run.checkpoints.writer._thread
    if thread is not None:
        thread.join()


ACTIONS = {
    "kill": signal_self(signal.SIGKILL),
    "stall": signal_self(signal.SIGSTOP),
    "sleep": lambda run: time.sleep(1000),
    "terminate": signal_self(signal.SIGTERM),
    "interrupt": signal_self(signal.SIGINT),
    "terminate launcher": terminate_launcher,
    "no room": no_room,
    "poison weight": poison_weight,
    "poison gradient": poison_gradient,
    "fail": fail,
}


def before(owner, name: str, action) -> None:
    """Have ``action`` called with the arguments of ``owner.name`` before each of its calls."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        action(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def inject(fault: dict) -> None:
    """Have ``fault`` happen in this process."""
    do, at, step = ACTIONS[fault["do"]], fault["at"], fault.get("step")
    here: list = []

    def once(run) -> None:
        if not here:
            here.append(run)
            if "DEPTHMIX_NOTES" in os.environ:
                Path(os.environ["DEPTHMIX_NOTES"], f"fault-{fault['rank']}-{fault.get('attempt', 0)}").touch()
            if at in ("step", "validation"):
                settle(run)
            do(run)

    runs: list = []
    before(train, "_loop", lambda run, stop: runs.append(run))
    if at == "world":
        before(world.ManyProcesses, "__init__", lambda *_, **__: once(None))
    elif at == "loop":
        before(train, "_loop", lambda run, stop: once(run))
    elif at == "step":
        steps = []

        def in_step(run, *_) -> None:
            steps.append(run.step + 1)
            if steps[-1] == step or len(steps) == fault.get("after"):
                once(run)

        before(train, "_gradients", in_step)
    elif at == "validation":
        batches = []
        for kind in (engine.ShardedEngine, engine.PipelineEngine):
            before(
                kind, "_validate_batch", lambda *_: batches.append(1) or (len(batches) == 2 and once(runs[0]))
            )
    elif at == "save":
        saves = []
        before(sharded.ShardedCheckpoints, "_write_all", lambda self, step, *_: saves.append(step))

        def in_part(self, part, *_) -> None:
            assert threading.current_thread().name == "checkpoint"
            if step in (None, saves[-1]) and part == fault.get("part", "optimizer"):
                once(runs[0])

        before(sharded.ShardedCheckpoints, "_write_part", in_part)
    elif at == "end":
        close = world.ManyProcesses.close

        def closed(self) -> None:
            close(self)
            once(None)

        world.ManyProcesses.close = closed
    else:
        raise ValueError(at)


def record(notes: Path, rank: int, attempt: int) -> None:
    """Write down this process's id and every window that it reads, with the step it is read for."""
    (notes / f"pid-{rank}-{attempt}").write_text(str(os.getpid()))
    file = os.open(notes / f"steps-{rank}-{attempt}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    window, next_batch, seen = Loader._window, train._Run.next_batch, []

    def recorded_window(self, row):
        found = window(self, row)
        seen.append((self.epoch + row // self.windows, found))
        return found

    def recorded_batch(self):
        seen.clear()
        batch = next_batch(self)
        os.write(file, (json.dumps({"step": self.step + 1, "windows": seen}) + "\n").encode())
        return batch

    Loader._window, train._Run.next_batch = recorded_window, recorded_batch


def main() -> int:
    rank, attempt = int(os.environ.get("RANK", "0")), int(os.environ.get(ATTEMPT, "0"))
    torch.set_num_threads(1)
    if notes := os.environ.get("DEPTHMIX_NOTES"):
        record(Path(notes), rank, attempt)
    faults = json.loads(os.environ.get("DEPTHMIX_FAULT") or "null") or []
    for fault in [faults] if isinstance(faults, dict) else faults:
        if fault["rank"] == rank and fault.get("attempt", 0) == attempt:
            inject(fault)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
