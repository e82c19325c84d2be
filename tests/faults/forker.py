"""A warm process that starts training runs for tests to kill: importing torch anew takes seconds.

Reads one JSON command a line on standard input and answers each with one line:

    {"start": {"config": .., "run_dir": .., "resume": .., "file_limit": bytes or null, "hold_at": .. or null}}  -> pid
    {"wait": pid}                                                                                -> exit status

``hold_at``: ``["step", n]`` goes no further than the n-th step of this life, ``["save", n]`` than the n-th file of
checkpoints; the run then makes ``RUN_DIR.held`` and waits to be killed.

A run is a forked child, so signals and deaths are real. The parent computes nothing, so that no
thread pool exists when it forks. The child's message, if training raised, is in ``RUN_DIR.message``.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tensorboard.compat.proto import event_pb2  # noqa: F401  (warm, as the next)
from tensorboard.summary.writer import record_writer  # noqa: F401

import depthmix.checkpoint as checkpoint
import depthmix.train
from depthmix.config import from_dict


def hold(run_dir: str, at: str, number: int) -> None:
    owner, name = {"step": (depthmix.train._Run, "log_step"), "save": (checkpoint, "write_tensors")}[at]
    function, calls = getattr(owner, name), []

    def held(*arguments, **options):
        calls.append(None)
        if at == "step":
            function(*arguments, **options)
        if len(calls) == number:
            Path(f"{run_dir}.held").touch()
            while True:
                time.sleep(1)
        if at != "step":
            function(*arguments, **options)

    setattr(owner, name, held)


def run(
    config: dict, run_dir: str, resume: bool, file_limit: int | None, hold_at: tuple[str, int] | None
) -> int:
    if hold_at is not None:
        hold(run_dir, *hold_at)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if file_limit is None else file_limit, hard))
    try:
        depthmix.train.train(from_dict(config), Path(run_dir), resume=resume, quiet=True)
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        Path(f"{run_dir}.message").write_text(f"{type(error).__name__}: {error}")
        return getattr(error, "exit_status", 99)
    return 0


def main() -> None:
    torch.set_num_threads(1)
    depthmix.train._report = lambda run_dir: None  # drawing is not what is tested, and takes a second
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 98
            try:
                status = run(**command["start"])
            finally:
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()
