"""Trainings on several processes at once, started as ``torchrun`` starts them, but forked from a warm server.

A process is told who it is by the same variables of the environment, and finds the others through a store that the
launcher keeps. When one fails, the others are sent SIGTERM, as ``torchrun`` does. See ``fault_points`` for the faults.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from forks import context

HANG_S = 150
"""Nothing takes so long, on however busy a machine."""


@dataclass(frozen=True)
class Ended:
    status: int
    """Exit status; minus the number of the signal that ended it."""
    said: str
    """Standard output and error."""
    pid: int


class Job:
    """``depthmix ARGUMENTS`` on ``ranks`` processes, with their record in ``notes``."""

    def __init__(self, arguments: list[str], ranks: int, notes: Path, fault: dict | None = None):
        notes.mkdir(parents=True, exist_ok=True)
        self.notes = notes
        # Port 0: the system chooses a free one, which nobody can take in between.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "DEPTHMIX_NOTES": str(notes),
                "DEPTHMIX_FAULT": json.dumps(fault),
            }
            process = context.Process(
                target=_enter, args=(arguments, environment, self._log(rank)), daemon=True
            )
            process.start()
            self.processes.append(process)

    def _log(self, rank: int) -> Path:
        return self.notes / f"said-{rank}.txt"

    def wait(self, stalled: int | None = None) -> list[Ended]:
        """How each process ended, by rank; ``TimeoutError`` where one does not.

        The ``stalled`` rank is killed when all others have ended.
        """
        until, told = time.monotonic() + HANG_S, False
        try:
            while True:
                alive = [p for rank, p in enumerate(self.processes) if p.is_alive() and rank != stalled]
                if not alive:
                    break
                if time.monotonic() > until:
                    raise TimeoutError(f"a hang: {[p.pid for p in alive]} of {self.notes}, {self._said()}")
                if not told and any(p.exitcode for p in self.processes):
                    told = True
                    for process in self.processes:
                        process.terminate()
                time.sleep(0.05)
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            Ended(process.exitcode, said, process.pid)
            for process, said in zip(self.processes, self._said(), strict=True)
        ]

    def _said(self) -> list[str]:
        return [
            self._log(rank).read_text() if self._log(rank).exists() else ""
            for rank in range(len(self.processes))
        ]

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)


def _enter(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["depthmix", *arguments]
    import fault_points

    status = fault_points.main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)
