"""``depthmix`` with the arguments given, as a test wants to see it: under torchrun or alone.

Environment: ``RECORD`` is a folder for ``RANK-PID.jsonl`` with a line for each batch, where in the data it began
(``place``), which part of it this process has (``part``) and which windows those are; ``STOP_AT`` is the number of
batches after which this process, if it is rank 0, gets a SIGTERM. It fails if a wrapper of DDP outlives the groups of
processes, as now and then its end would never come; and if a training ends well and groups outlive Python, whose
threads now and then would abort the process.
"""

import atexit
import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from depthmix import cli
from depthmix.data.loader import Loader

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from gloo_threads import gloo_threads

rank = os.environ.get("RANK", "0")
windows: list[int] = []
next_batch, window = Loader.next_batch, Loader._window


def recorded_window(self, row):
    windows.append(window(self, row))
    return windows[-1]


def recorded_batch(self):
    place = self.epoch * self.windows + self.index
    windows.clear()
    batch = next_batch(self)
    if folder := os.environ.get("RECORD"):
        line = {"place": place, "part": self.rank, "parts": self.world_size, "windows": list(windows)}
        with open(Path(folder) / f"{rank}-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    recorded_batch.count += 1
    if rank == "0" and recorded_batch.count == int(os.environ.get("STOP_AT", "0")):
        os.kill(os.getpid(), signal.SIGTERM)
    return batch


def checked_end(group=None):
    if group is None:
        assert not any(type(x) is DistributedDataParallel for x in gc.get_objects()), (
            "a wrapper is still there"
        )
    destroy_process_group(group)


def checked_threads():
    left = gloo_threads()
    if left and checked_threads.status == 0:
        print(f"threads of groups are still there: {left}", file=sys.stderr, flush=True)
        os._exit(70)


checked_threads.status = None
atexit.register(checked_threads)  # first, so that it is called last
recorded_batch.count = 0
destroy_process_group, dist.destroy_process_group = dist.destroy_process_group, checked_end
Loader._window, Loader.next_batch = recorded_window, recorded_batch
torch.set_num_threads(1)
checked_threads.status = cli.main(sys.argv[1:])
sys.exit(checked_threads.status)
