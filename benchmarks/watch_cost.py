"""What recording the network's depth costs a training run: whole runs with the record and without, in turns.

A run of a preset with its own evaluation interval, for as many intervals as asked. Two figures for each connection:

share    time spent in recording, over the time of the run, both of the same run: what the clock says, whatever else
         the machine does. The median over runs.
ratio    processor time of a run with the record over that of the run without it that followed or preceded it. The
         median over pairs; their spread says how little a difference of a percent is to be trusted.

    python benchmarks/watch_cost.py --out benchmarks/results/watch-cost-cpu.json
"""

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from depthmix import health
from depthmix.bench.machine import machine
from depthmix.presets import preset
from depthmix.train import _Run, train


@dataclass
class Options:
    """Cost of the record of gates, norms and gradients that training makes at evaluations.

    Example: python benchmarks/watch_cost.py --rounds 5
    """

    preset: str = "quick"
    """Preset to train, with its evaluation interval."""
    residuals: tuple[str, ...] = ("prenorm", "mgr-competitive")
    """Residual connections."""
    intervals: int = 1
    """Evaluations of one run: it has so many times the preset's eval_interval steps."""
    rounds: int = 5
    """Pairs of runs for each connection."""
    threads: int = 1
    """CPU threads."""
    out: Path | None = None
    """Write the figures here as JSON."""


class Clock:
    """Seconds spent in functions of training that it stands before."""

    def __init__(self):
        self.seconds = 0.0

    def before(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args):
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    torch.set_num_threads(options.threads)
    base = preset(options.preset)
    base = dataclasses.replace(base, steps=options.intervals * base.eval_interval, device="cpu")
    clock = Clock()
    clock.before(health, "gradients")
    clock.before(_Run, "record_depth")

    def run(residual: str, record: bool) -> tuple[float, float, float]:
        """Seconds of the run, of the processor, and of recording."""
        model = dataclasses.replace(base.model, residual=residual)
        config = dataclasses.replace(base, model=model, record_depth=record)
        clock.seconds = 0.0
        with tempfile.TemporaryDirectory() as folder:
            began, processor = time.perf_counter(), time.process_time()
            train(config, Path(folder) / "run", quiet=True, report=False)
            return time.perf_counter() - began, time.process_time() - processor, clock.seconds

    command = shlex.join(["python", "benchmarks/watch_cost.py", *sys.argv[1:]])
    results = {
        "command": command,
        "machine": machine(torch.device("cpu")),
        "preset": options.preset,
        "steps": base.steps,
        "eval_interval": base.eval_interval,
        "eval_tokens": base.eval_tokens,
        "rounds": options.rounds,
        "rows": [],
    }
    for residual in options.residuals:
        run(residual, True)  # imports, kernels, data
        pairs = []
        for number in range(options.rounds):
            first = number % 2 == 0
            found = {record: run(residual, record) for record in (first, not first)}
            pairs.append((found[True], found[False]))
        ratios = sorted(on[1] / off[1] for on, off in pairs)
        row = {
            "residual": residual,
            "share": round(statistics.median(on[2] / on[0] for on, _ in pairs), 5),
            "largest_share": round(max(on[2] / on[0] for on, _ in pairs), 5),
            "ms_per_evaluation": round(
                1e3 * statistics.median(on[2] for on, _ in pairs) / options.intervals, 1
            ),
            "run_seconds": round(statistics.median(on[0] for on, _ in pairs), 2),
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
        results["rows"].append(row)
        print(
            f"{residual:<18}{row['share']:.2%} of the run ({row['ms_per_evaluation']} ms an evaluation), "
            f"processor time {row['ratio']:.3f} x, pairs from {ratios[0]:.3f} to {ratios[-1]:.3f}",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
