"""Functions on several processes at once, each its rank in one gloo group; what each returns, raises, or dies of.

The processes are forked from a server that has imported torch, so that eight of them cost what one costs.
"""

import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from forks import context


@dataclass(frozen=True)
class Outcome:
    value: Any = None
    error: str | None = None
    """Type and message of what was raised."""
    died: str | None = None
    """The signal or status of a process that left without a word."""


def run_ranks(function, ranks: int, *args, timeout_s: float = 120) -> list[Outcome]:
    """``function(*args)`` in ``ranks`` processes; outcomes by rank.

    A process that is not done after ``timeout_s`` is killed, and ``TimeoutError`` raised.
    """
    # Port 0: the system chooses a free one, which nobody can take in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (function, rank, ranks, store.port, theirs, args)
        process = context.Process(target=_enter, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    deadline = time.monotonic() + timeout_s
    try:
        return [
            _outcome(process, pipe, deadline - time.monotonic())
            for process, pipe in zip(processes, pipes, strict=True)
        ]
    finally:
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            process.kill()


def _outcome(process, pipe: Connection, timeout_s: float) -> Outcome:
    if not wait([pipe, process.sentinel], timeout=max(0.0, timeout_s)):
        raise TimeoutError(f"{process.name} is not done")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        return Outcome(died=signal.Signals(-code).name if code < 0 else str(code))


def _enter(function, rank: int, ranks: int, port: int, pipe: Connection, args) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        pipe.send(Outcome(function(*args)))
    except Exception as error:
        pipe.send(Outcome(error=f"{type(error).__name__}: {error}"))
    finally:
        dist.destroy_process_group()


def values(outcomes: list[Outcome]) -> list:
    """What every process returned; an assertion that none failed."""
    assert all(found.error is None and found.died is None for found in outcomes), outcomes
    return [found.value for found in outcomes]
