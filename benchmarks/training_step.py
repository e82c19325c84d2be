"""Time of a training step with each residual connection, over PreNorm's, in one process.

A step is forward and backward over the preset's batch, clipping and the optimiser, on random tokens.
Where that batch would take minutes, a part of it is timed and its time multiplied; the optimiser's is
not. The connections take turns, so that a machine that slows down slows all of them; figures are
medians.

    python benchmarks/training_step.py --residuals mgr-independent mgr-competitive \
        --out benchmarks/results/training-step-cpu.json
    python benchmarks/training_step.py --presets quick --out benchmarks/results/connections-cpu.json
"""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

from depthmix.info import describe
from depthmix.ops import native
from depthmix.optim import build_optimizer
from depthmix.presets import preset
from depthmix.residuals import available_residuals
from depthmix.train import build_model

SEQUENCES = {"quick": 16, "xs": 1, "S": 1}
"""Sequences timed at once; a preset's batch is a multiple of them."""
ROUNDS = {"quick": 30, "xs": 9, "S": 5}


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
    """Timed passes of each connection. 0: 30 for quick, 9 for xs, 5 for S."""
    threads: Annotated[int, arg(help_behavior_hint="(default: all cores)")] = os.cpu_count() or 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """Write the figures here as JSON."""


def measure(name: str, residuals: list[str], rounds: int, device: torch.device) -> dict:
    """``{"preset", "rows": [{"residual", "ms", "ratio", ...}], ...}``: milliseconds of a whole step."""
    config = preset(name)
    sequences = SEQUENCES.get(name, 1)
    passes = config.batch_size // sequences
    shape = (2, sequences, config.model.seq_len)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)
    runs = {}
    counts = {}
    for residual in residuals:
        model_config = dataclasses.replace(config.model, residual=residual)
        run = dataclasses.replace(config, model=model_config, precision="fp32")
        counts[residual] = describe(run)
        model = build_model(run, device)
        runs[residual] = model, build_optimizer(model, config.optim)
    gradients = {residual: [] for residual in residuals}
    updates = {residual: [] for residual in residuals}
    for round_ in range(-1, rounds):  # one round to warm up
        for residual, (model, optimizer) in runs.items():
            began = now(device)
            model(inputs, targets)[1].backward()
            done = now(device)
            if round_ >= 0:
                gradients[residual].append(done - began)
            if passes == 1 or round_ < 2:
                optimizer.clip_grad_norm(1.0)
                optimizer.step()
                if round_ >= 0:
                    updates[residual].append(now(device) - done)
            optimizer.zero_grad()
    update = {residual: statistics.median(times) for residual, times in updates.items()}
    rows = []
    for residual, times in gradients.items():
        # Pass by pass: both of a pair ran within the same moments.
        ratios = [
            (passes * a + update[residual]) / (passes * b + update["prenorm"])
            for a, b in zip(times, gradients["prenorm"], strict=True)
        ]
        rows.append(
            {
                "residual": residual,
                "ms": round(1e3 * (passes * statistics.median(times) + update[residual]), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ms_per_pass": round(1e3 * statistics.median(times), 1),
                "ms_optimizer": round(1e3 * update[residual], 1),
                "parameters": counts[residual]["parameters"]["total"],
                "connection_parameters": counts[residual]["parameters"]["connection"],
                "saved_bytes_per_token": round(counts[residual]["activation_bytes_per_token"]),
            }
        )
    return {
        "preset": name,
        "tokens_per_step": config.tokens_per_step,
        "tokens_timed": inputs.numel(),
        "rounds": rounds,
        "rows": rows,
    }


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_kernels": native.status(),
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
    command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    results = {"command": command, "machine": machine(device), "presets": []}
    for name in options.presets:
        result = measure(name, residuals, options.rounds or ROUNDS.get(name, 5), device)
        results["presets"].append(result)
        print(
            f"{name}: a step of {result['tokens_per_step']:,} tokens, from medians of {result['rounds']} passes "
            f"over {result['tokens_timed']:,}"
        )
        for row in result["rows"]:
            print(f"  {row['residual']:<18}{row['ms']:>14,.1f} ms   {row['ratio']:.2f} x PreNorm")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
