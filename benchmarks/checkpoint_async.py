"""How long training waits for a checkpoint that several processes write in the background.

Weights and two moments, fp32, split over the processes as FSDP does. Each round saves once asynchronously and once not:

blocked   seconds from calling save() to its return: the tensors are copied to memory of their own
whole     seconds from calling save() until the checkpoint is on the disk under its name, hashed and synced
ratio     blocked over whole, of the same save; the median over rounds, and their range

The first save also plans and allocates, and is given apart. Times are those of the slowest process.

    python benchmarks/checkpoint_async.py --out benchmarks/results/checkpoint-async-cpu.json
"""

import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import tyro
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from depthmix.bench.machine import machine
from depthmix.parallel.checkpoint import ShardedCheckpoints


@dataclass
class Options:
    """Time that save() takes of training, and that the whole save takes.

    Example: python benchmarks/checkpoint_async.py --processes 2 --matrices 48
    """

    processes: int = 2
    """Processes on this machine, one thread each."""
    matrices: int = 48
    """Weight matrices of the model."""
    width: int = 768
    """Columns of a matrix; it has as many rows."""
    rounds: int = 7
    """Saves of each kind that are timed."""
    folder: Path | None = None
    """Write checkpoints below this folder, to time its disk. Default: where temporary files go."""
    out: Path | None = None
    """Write the figures here as JSON."""


def slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def process(rank: int, options: Options, port: int, folder: str, results) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    mesh = DeviceMesh("cpu", list(range(options.processes)))

    def tensors(kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {
            f"blocks.{i}.weight{kind}": distribute_tensor(
                torch.randn(options.width, options.width), mesh, [Shard(0)], src_data_rank=None
            )
            for i in range(options.matrices)
            for kind in kinds
        }

    weights, optimizer = tensors(("",)), tensors((":exp_avg", ":exp_avg_sq"))
    step = 0

    def save(checkpoints: ShardedCheckpoints) -> tuple[float, float]:
        nonlocal step
        step += 1
        dist.barrier()
        began = time.perf_counter()
        checkpoints.save(step, weights, optimizer, {"config": {}}, None)
        blocked = time.perf_counter() - began
        checkpoints.wait()
        return slowest(blocked), slowest(time.perf_counter() - began)

    with (
        ShardedCheckpoints(Path(folder), keep_last=1) as background,
        ShardedCheckpoints(Path(folder), keep_last=1, asynchronous=False) as waiting,
    ):
        first = save(background)
        save(waiting)
        rounds = [(save(background), save(waiting)) for _ in range(options.rounds)]
    if rank == 0:
        results.put({"first": first, "rounds": rounds})
    dist.destroy_process_group()


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        multiprocessing.spawn(process, (options, store.port, folder, results), nprocs=options.processes)
        found = results.get()
    background = [pair[0] for pair in found["rounds"]]
    ratios = sorted(blocked / whole for blocked, whole in background)
    figures = {
        "command": shlex.join(["python", "benchmarks/checkpoint_async.py", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "options": {key: value for key, value in asdict(options).items() if key not in ("folder", "out")},
        "bytes": 3 * 4 * options.matrices * options.width**2,
        "blocked_seconds": round(statistics.median(blocked for blocked, _ in background), 4),
        "whole_seconds": round(statistics.median(whole for _, whole in background), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "first_blocked_seconds": round(found["first"][0], 4),
        "synchronous_seconds": round(statistics.median(pair[1][1] for pair in found["rounds"]), 4),
    }
    print(
        f"{figures['bytes'] / 2**20:.0f} MiB by {options.processes} processes: save() blocks "
        f"{figures['blocked_seconds']} s of {figures['whole_seconds']} s, {figures['ratio']:.1%} "
        f"({ratios[0]:.1%} to {ratios[-1]:.1%}); {figures['synchronous_seconds']} s when synchronous"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
