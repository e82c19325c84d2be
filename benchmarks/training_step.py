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
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

from depthmix.bench.machine import machine
from depthmix.bench.steps import SEQUENCES, random_batch, train_in_turns, trainee
from depthmix.info import describe
from depthmix.presets import preset
from depthmix.residuals import available_residuals

ROUNDS = {"quick": 30, "xs": 15, "S": 11}


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
    """Timed passes of each connection. 0: 30 for quick, 15 for xs, 11 for S."""
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
    inputs, targets = random_batch(config, sequences, device)
    runs = {}
    counts = {}
    for residual in residuals:
        model_config = dataclasses.replace(config.model, residual=residual)
        run = dataclasses.replace(config, model=model_config, precision="fp32")
        counts[residual] = describe(run)
        runs[residual] = trainee(run, device)
    train_in_turns([*runs.values()], inputs, targets, rounds, passes, device)
    gradients = {residual: run.gradients for residual, run in runs.items()}
    update = {residual: statistics.median(run.updates) for residual, run in runs.items()}
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
