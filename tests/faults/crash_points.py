"""Die at every file operation of saving a checkpoint, and look at what is left.

Run as ``python crash_points.py FOLDER``; prints one JSON line per crash point. A process of its own,
because it forks: each child copies a folder that holds checkpoints 1, 2 and 3, saves checkpoint 4,
makes it the best and prunes, and leaves without any clean-up at the n-th file operation, before or
after doing it; n grows until a child survives. The parent then checks the folder and saves again.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

import depthmix.checkpoint as checkpoint
from depthmix.config import OptimConfig
from depthmix.optim import build_optimizer

KEEP_LAST = 2


def network(step: int):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(8, 8)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return model, build_optimizer(model, OptimConfig())


def save(folder: Path, step: int) -> None:
    checkpoint.save_checkpoint(folder, step, *network(step), {"config": {}})
    checkpoint.record_best(folder, {"step": step, "val_loss": 1 / step})
    checkpoint.prune_checkpoints(folder, KEEP_LAST)


def die_at(countdown: int, before: bool) -> None:
    """From now on the ``countdown``-th file operation is the process's last."""
    calls = 0

    def deadly(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == countdown and before:
                os._exit(9)
            last = calls == countdown
            try:
                return function(*args, **kwargs)
            finally:
                if last:
                    os._exit(9)

        return wrapper

    def torn(function):
        """Also leave half a file: the operation does its work, then loses the second half."""

        def wrapper(tensors, path, metadata):
            nonlocal calls
            calls += 1
            function(tensors, path, metadata)
            if calls == countdown:
                if before:
                    os.truncate(path, os.path.getsize(path) // 2)
                os._exit(9)

        return wrapper

    for name in ("fsync", "rename", "replace", "mkdir", "chmod", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    Path.write_text = deadly(Path.write_text)
    checkpoint.save_file = torn(checkpoint.save_file)


def examine(folder: Path) -> dict:
    names = [path.name for path in checkpoint.list_checkpoints(folder)]
    wrong = [checkpoint.problem(path) for path in checkpoint.list_checkpoints(folder)]
    best = checkpoint.best_checkpoint(folder)
    latest = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(folder))
    values = {value for tensor in latest.model.values() for value in tensor.unique().tolist()}
    return {
        "names": names,
        "wrong": [text for text in wrong if text],
        "best": best.name if best else None,
        "values": sorted(values),
        "step": latest.step,
    }


def main(work: Path) -> None:
    torch.set_num_threads(1)
    start = work / "start"
    for step in (1, 2, 3):
        save(start, step)
    for before in (True, False):
        countdown, survived = 0, False
        while not survived:
            countdown += 1
            folder = work / "folder"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(start, folder)
            child = os.fork()
            if child == 0:
                try:
                    die_at(countdown, before)
                    save(folder, 4)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            survived = status != 9
            found = examine(folder)
            save(folder, 4)
            print(
                json.dumps(
                    {
                        "before": before,
                        "operation": countdown,
                        "status": status,
                        "found": found,
                        "after": examine(folder),
                        "left": sorted(os.listdir(folder)),
                    }
                )
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
