"""What dividing the work costs and gains on this machine: ratios of one run, one thread a process, gloo.

* ``data_parallel``: tokens/s of two processes with ``dp=2`` over those of one, same global batch. The two sides take
  turns, and while one process works the other waits.
* ``fsdp_overhead``: time of a step wrapped in FSDP2, with nobody to share with, over the plain step's.
* ``muon``: time of an optimiser step on two processes: each computing every update (``repeated``), each its half of the
  matrices (``divided``, what depthmix does), with whole weights (dp=2) and with sharded ones (fsdp=2), where repeating
  means to gather every matrix on both; and that of one process.
* ``loader``: tokens/s of the loader alone over those of training.

Each figure is a median over rounds, with the quartiles of the rounds' ratios.

    python benchmarks/parallel_speed.py --out benchmarks/results/parallel-speed-cpu.json
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from depthmix.bench.machine import machine
from depthmix.checkpoint import write_json
from depthmix.config import TrainConfig
from depthmix.data import Loader, open_dataset, prepare
from depthmix.parallel.engine import Engine, ShardedEngine
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.world import ManyProcesses, World
from depthmix.presets import preset
from depthmix.train import build_model

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NAMES = ("prenorm", "mgr-competitive")


def config_of(name: str, size: str = "quick") -> TrainConfig:
    """``xs`` with two sequences of 512 tokens in fp32, so that a step takes seconds."""
    config = preset(size)
    changes = {} if size == "quick" else {"batch_size": 2, "micro_batch": 0, "precision": "fp32"}
    length = config.model.seq_len if size == "quick" else 512
    model = dataclasses.replace(config.model, residual=name, seq_len=length)
    return dataclasses.replace(config, model=model, device="cpu", **changes)


def step(engine: Engine, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    engine.optimizer.zero_grad()
    engine.backward(inputs, targets)
    engine.optimizer.clip_grad_norm(1.0)
    engine.optimizer.step()


def batch(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = config.batch_size, config.model.seq_len + 1
    ids = torch.randint(config.model.vocab_size, shape, generator=draw)
    return ids[:, :-1], ids[:, 1:]


def timed(function, *arguments, times: int = 1) -> float:
    """Seconds of one call, of ``times`` calls in a row."""
    began = time.perf_counter()
    for _ in range(times):
        function(*arguments)
    return (time.perf_counter() - began) / times


def against(ours: list[float], theirs: list[float]) -> dict:
    """Medians in seconds, and the ratio ours / theirs by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds": statistics.median(ours),
        "seconds_of_other": statistics.median(theirs),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "rounds": len(ratios),
    }


# --- by two processes -----------------------------------------------------------------------------


def two_processes(rounds: int) -> dict:
    """On both ranks; what rank 0 returns counts."""
    import torch.distributed as dist

    found: dict = {"data_parallel": {}, "muon": {}}
    for size, count, times in (("quick", rounds, 2), ("xs", max(3, rounds // 3), 1)):
        for name in NAMES:
            config = config_of(name, size)
            inputs, targets = batch(config)
            alone = Engine(build_model(config, CPU), config, World(), CPU) if dist_rank() == 0 else None
            world = ManyProcesses(ParallelPlan(dp=2), "cpu")
            both = ShardedEngine(build_model(config, CPU), config, world, CPU)
            rows = slice(world.data_rank * both.rows, (world.data_rank + 1) * both.rows)
            one, two = [], []
            for number in range(count + 1):
                dist.barrier()
                if alone is not None:
                    one.append(timed(step, alone, inputs, targets, times=times))
                dist.barrier()
                two.append(timed(step, both, inputs[rows], targets[rows], times=times))
                if number == 0:
                    one.clear(), two.clear()
            if alone is not None:
                found["data_parallel"][f"{size} {name}"] = against(one, two)
            if (size, name) == ("quick", NAMES[0]):
                found["muon"] |= muon("dp=2", both, alone, rounds)
            world.close()
    world = ManyProcesses(ParallelPlan(fsdp=2), "cpu")
    config = config_of(NAMES[0])
    inputs, targets = batch(config)
    both = ShardedEngine(build_model(config, CPU), config, world, CPU)
    rows = slice(world.data_rank * both.rows, (world.data_rank + 1) * both.rows)
    both.backward(inputs[rows], targets[rows])
    found["muon"] |= muon("fsdp=2", both, None, rounds)
    world.close()
    return found


def dist_rank() -> int:
    return int(os.environ["RANK"])


def muon(label: str, engine: ShardedEngine, alone: Engine | None, rounds: int) -> dict:
    """Seconds of an optimiser step with the gradients that ``engine`` holds."""
    import torch.distributed as dist

    layout = engine.optimizer.layout

    def repeat(parts, like, function, dtype):
        """Every process gathers every matrix and computes it."""
        from torch.distributed.tensor import DTensor, Replicate

        if not isinstance(like[0], DTensor):
            return function(parts)
        given = list(zip(parts, like, strict=True))
        whole = function(
            [
                DTensor.from_local(
                    x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                ).full_tensor()
                for x, p in given
            ]
        )
        copies = [DTensor.from_local(x, like[0].device_mesh, [Replicate()], run_check=False) for x in whole]
        return [x.redistribute(placements=p.placements).to_local() for x, p in zip(copies, like, strict=True)]

    divided, repeated, one = [], [], []
    for number in range(rounds + 1):
        dist.barrier()
        divided.append(timed(engine.optimizer.step))
        layout.whole_matrices = repeat
        dist.barrier()
        repeated.append(timed(engine.optimizer.step))
        del layout.whole_matrices
        dist.barrier()
        if alone is not None:
            one.append(timed(alone.optimizer.step))
        if number == 0:
            divided.clear(), repeated.clear(), one.clear()
    found = {label: against(divided, repeated)}
    if alone is not None:
        found[f"{label} against one process"] = against(divided, one)
    return found


# --- by one process -------------------------------------------------------------------------------


def fsdp_overhead(rounds: int) -> dict:
    class Wrapped(ShardedEngine):
        always_shard = True

    found = {}
    for size, count in (("quick", rounds), ("xs", max(3, rounds // 3))):
        for name in NAMES:
            config = config_of(name, size)
            inputs, targets = batch(config)
            plain = Engine(build_model(config, CPU), config, World(), CPU)
            world = ManyProcesses(ParallelPlan(), "cpu")
            wrapped = Wrapped(build_model(config, CPU), config, world, CPU)
            ours, theirs = [], []
            for number in range(count + 1):
                theirs.append(timed(step, plain, inputs, targets))
                ours.append(timed(step, wrapped, inputs, targets))
                if number == 0:
                    ours.clear(), theirs.clear()
            found[f"{size} {name}"] = against(ours, theirs)
            world.close()
    return found


def loader_speed(training_tokens_per_s: float, folder: Path) -> dict:
    config = preset("quick")
    dataset = open_dataset(prepare(config.data))
    loader = Loader(dataset.train, config.model.seq_len, config.batch_size, 0)
    seconds = statistics.median(timed(loader.next_batch, times=50) for _ in range(9))
    speed = config.tokens_per_step / seconds
    return {
        "tokens_per_s": speed,
        "training_tokens_per_s": training_tokens_per_s,
        "ratio": speed / training_tokens_per_s,
    }


def torchrun(processes: int, part: str, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        command += [__file__, "--part", part, "--rounds", str(rounds), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=3600)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/parallel-speed-cpu.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=("two", "one"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.part is not None:
        found = two_processes(args.rounds) if args.part == "two" else fsdp_overhead(args.rounds)
        if dist_rank() == 0:
            args.out.write_text(json.dumps(found))
        return
    found = torchrun(2, "two", args.rounds) | {"fsdp_overhead": torchrun(1, "one", args.rounds)}
    config = preset("quick")
    speed = config.tokens_per_step / found["data_parallel"]["quick prenorm"]["seconds"]
    found["loader"] = loader_speed(speed, ROOT)
    found |= {"machine": machine(CPU), "load_average": os.getloadavg()}
    write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
