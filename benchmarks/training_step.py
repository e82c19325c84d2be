"""Time of a training step with each residual connection, over PreNorm's, in one process.

A step is forward, backward, clipping and the optimiser, on random tokens. The connections take
turns step by step, so that a machine that slows down slows all of them; each figure is a median.

    python benchmarks/training_step.py --out benchmarks/results/training-step-cpu.json
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

from depthmix.optim import build_optimizer
from depthmix.presets import preset
from depthmix.residuals import available_residuals
from depthmix.train import build_model

BATCH = {"quick": 16, "xs": 2, "S": 1}
"""Sequences per step where the preset's own batch would take minutes: the ratio is per token."""
ROUNDS = {"quick": 30, "xs": 8, "S": 5}


@dataclass
class Options:
    """Median time of a training step for each residual connection, over PreNorm's.

    Example: python benchmarks/training_step.py --presets quick xs --threads 2
    """

    presets: tuple[str, ...] = ("quick", "xs", "S")
    """Presets to time."""
    residuals: tuple[str, ...] = ()
    """Residual connections; PreNorm is always timed. Default: all."""
    rounds: int = 0
    """Timed steps of each connection. 0: 30 for quick, 8 for xs, 5 for S."""
    threads: Annotated[int, arg(help_behavior_hint="(default: all cores)")] = os.cpu_count() or 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """Write the figures here as JSON."""


def measure(name: str, residuals: list[str], rounds: int, device: torch.device) -> dict:
    """``{"preset", "batch", "rounds", "rows": [{"residual", "ms", "ratio", ...}]}``."""
    config = preset(name)
    batch = BATCH.get(name, 1)
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch, config.model.seq_len)
    inputs, targets = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)
    steps = {}
    for residual in residuals:
        run = dataclasses.replace(
            config, model=dataclasses.replace(config.model, residual=residual), precision="fp32"
        )
        model = build_model(run, device)
        optimizer = build_optimizer(model, run.optim)

        def step(model=model, optimizer=optimizer):
            model(inputs, targets)[1].backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        steps[residual] = step
    seconds = {residual: [] for residual in residuals}
    for round_ in range(-2, rounds):  # two rounds to warm up
        for residual, step in steps.items():
            began = time.perf_counter()
            step()
            if round_ >= 0:
                seconds[residual].append(time.perf_counter() - began)
    base = seconds["prenorm"]
    return {
        "preset": name,
        "batch": batch,
        "seq_len": config.model.seq_len,
        "rounds": rounds,
        "rows": [
            {
                "residual": residual,
                "ms": round(1e3 * statistics.median(times), 2),
                # Round by round: both of a pair ran within the same moments.
                "ratio": round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 3),
            }
            for residual, times in seconds.items()
        ],
    }


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    residuals = ["prenorm", *(r for r in options.residuals or available_residuals() if r != "prenorm")]
    results = {"command": "python benchmarks/training_step.py", "machine": machine(device), "presets": []}
    for name in options.presets:
        result = measure(name, residuals, options.rounds or ROUNDS.get(name, 5), device)
        results["presets"].append(result)
        print(f"{name}: {result['batch']} x {result['seq_len']} tokens, medians of {result['rounds']} steps")
        for row in result["rows"]:
            print(f"  {row['residual']:<18}{row['ms']:>10.1f} ms   {row['ratio']:.2f} x PreNorm")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
