"""Some optimiser steps of a small model on random tokens: by one process, or by those of torchrun.

``run`` takes one case; ``run_many`` starts this file on several processes with many, one after the other in the same;
``differences`` says how far two results are from each other. Used by the tests and by
``benchmarks/parallel_exactness.py``.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from depthmix import GPT
from depthmix.config import GPTConfig, OptimConfig, TrainConfig
from depthmix.parallel.engine import build_engine
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.world import ManyProcesses, World

STEPS = 20


def make_config(case: dict) -> TrainConfig:
    """``case``: ``parallel``, fields of the model under ``model``, of the optimiser and of the run under theirs."""
    model = {"vocab_size": 64, "n_layer": 4, "d_model": 16, "n_head": 4, "seq_len": 16, "n_streams": 3}
    model |= case.get("model", {})
    run = {"batch_size": 4, "micro_batch": 1, "seed": 3, "device": "cpu", **case.get("run", {})}
    optim = OptimConfig(lr=0.003, muon_lr=0.01, warmup_steps=5, **case.get("optim", {}))
    return TrainConfig(model=GPTConfig(**model), optim=optim, parallel=case.get("parallel", ""), **run)


def run(case: dict, world: World) -> dict:
    """Losses and gradient norms of ``case["steps"]`` steps, and the whole weights that this process has then.

    ``case["dtype"]``: of the weights.
    """
    config = make_config(case)
    dtype = getattr(torch, case.get("dtype", "float32"))

    def model_of(cuts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GPT(config.model, seed=config.seed, cuts=cuts)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    engine = build_engine(model_of, config, world, torch.device("cpu"))
    draw = torch.Generator().manual_seed(5)
    rows, losses, norms = engine.rows, [], []
    for step in range(case.get("steps", STEPS)):
        shape = config.batch_size, config.model.seq_len + 1
        tokens = torch.randint(config.model.vocab_size, shape, generator=draw)
        own = tokens[world.data_rank * rows : (world.data_rank + 1) * rows]
        engine.optimizer.zero_grad()
        engine.optimizer.set_lr_fraction(config.optim.lr_fraction(step, STEPS))
        losses.append(engine.backward(own[:, :-1], own[:, 1:]).item())
        norms.append(engine.optimizer.clip_grad_norm(config.optim.grad_clip).item())
        engine.optimizer.step()
    weights = {name: whole(x).detach().clone() for name, x in engine.named_weights().items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def run_alone(case: dict) -> dict:
    """``run`` in this process, with one thread as torchrun's have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run({**case, "parallel": ""}, World())
    finally:
        torch.set_num_threads(threads)


def torchrun(arguments: list[str], processes: int, timeout_s: float = 600) -> None:
    """``python ARGUMENTS`` on as many processes, to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", *arguments], capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def run_many(cases: dict[str, dict], processes: int, start=torchrun) -> dict[str, dict]:
    """``run`` of every case by as many processes, which ``start`` starts; the weights of all stages together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps(list(cases.values())))
        start([__file__, str(folder)], processes)
        found = {}
        for number, (key, case) in enumerate(cases.items()):
            stages = range(ParallelPlan.parse(case["parallel"]).pp)
            parts = [torch.load(folder / f"{number}-{stage}.pt") for stage in stages]
            tied = [part["weights"]["embed.weight"] for part in (parts[0], parts[-1])]
            assert torch.equal(*tied), "both ends of the pipeline must have the same embedding"
            assert all(part["losses"] == parts[0]["losses"] for part in parts), "one loss on all processes"
            assert all(part["norms"] == parts[0]["norms"] for part in parts), "one norm on all processes"
            found[key] = parts[0]
            for part in parts[1:]:
                found[key]["weights"] |= part["weights"]
        return found


def differences(found: dict, wanted: dict) -> dict[str, float]:
    """Largest relative difference of a loss and of a gradient norm; of the weights that of all together, in the 2-norm
    (``weights``), and that of the tensor where it is largest (``worst_tensor``)."""
    assert found["weights"].keys() == wanted["weights"].keys()

    def relative(key: str) -> float:
        a, b = (torch.tensor(x[key], dtype=torch.float64) for x in (found, wanted))
        return ((a - b).abs() / b.abs()).max().item()

    pairs = [
        (found["weights"][name].double(), wanted["weights"][name].double()) for name in wanted["weights"]
    ]
    squares = [((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs]
    total, size = map(sum, zip(*squares, strict=True))
    worst = max(part / whole if whole else float(part > 0) for part, whole in squares)
    return {
        "loss": relative("losses"),
        "grad_norm": relative("norms"),
        "weights": (total / size) ** 0.5,
        "worst_tensor": worst**0.5,
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        world = ManyProcesses(ParallelPlan.parse(case["parallel"]), "cpu", timeout_s=120)
        found = run(case, world)
        if world.data_rank == world.place["tp"] == 0:
            torch.save(found, folder / f"{number}-{world.place['pp']}.pt")
        world.close()


if __name__ == "__main__":
    main()
