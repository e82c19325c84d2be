"""Some optimiser steps of a small model on random tokens: by one process, or by those of torchrun.

As a script: ``torchrun ... steps.py CASES OUT`` takes the cases in the JSON file CASES one after the other and leaves
``OUT/CASE-RANK.pt`` with losses, gradient norms and whole weights. ``run`` is the same for one process.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from depthmix import GPT
from depthmix.config import GPTConfig, OptimConfig, TrainConfig
from depthmix.parallel.engine import build_engine
from depthmix.parallel.world import ManyProcesses, World

STEPS = 20


def make_config(case: dict) -> TrainConfig:
    """``case``: fields of the model, and of the run under ``run``."""
    model = {"vocab_size": 64, "n_layer": 8, "d_model": 16, "n_head": 4, "seq_len": 16, "n_streams": 3}
    model |= case.get("model", {})
    run = {"batch_size": 8, "micro_batch": 1, "seed": 3, "device": "cpu", **case.get("run", {})}
    optim = OptimConfig(lr=0.003, muon_lr=0.01, warmup_steps=5)
    return TrainConfig(model=GPTConfig(**model), optim=optim, parallel=case.get("parallel", "dp=1"), **run)


def run(case: dict, world: World) -> dict:
    """Losses and norms of every step, and the whole weights that this process has."""
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
        tokens = torch.randint(
            config.model.vocab_size, (config.batch_size, config.model.seq_len + 1), generator=draw
        )
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


def main() -> None:
    from depthmix.parallel.plan import ParallelPlan

    torch.set_num_threads(1)
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, case in cases.items():
        plan = ParallelPlan.parse(case["parallel"])
        world = ManyProcesses(plan, "cpu", timeout_s=60)
        found = run(case, world)
        if world.place["dp"] == world.place["fsdp"] == world.place["tp"] == 0:
            torch.save(found, out / f"{name}-{world.place['pp']}.pt")
        world.close()


if __name__ == "__main__":
    main()
