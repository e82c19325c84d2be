"""What a connection costs in decoding: one more token of one sequence behind a cache, in turns with PreNorm.

Two figures for each connection, medians over turns of the ratio to the PreNorm token beside it:

cpu    processor time of the token, whatever else the machine does
wall   time by the clock; on a busy machine its spread is wide

    python benchmarks/decode.py --out benchmarks/results/decode-cpu.json

`depthmix bench generation-step --preset S` times the same by the clock alone, on GPUs too, for 1, 8 and 64 sequences.
"""

import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from depthmix import GPT
from depthmix.bench.machine import machine
from depthmix.bench.steps import _decoder, _perturb
from depthmix.presets import preset


@dataclass
class Options:
    """Cost of decoding over PreNorm's.

    Example: python benchmarks/decode.py --preset quick --rounds 20
    """

    preset: str = "S"
    """Preset to build, with random weights."""
    residuals: tuple[str, ...] = ("mgr-independent", "mgr-competitive")
    """Residual connections; prenorm is always there."""
    prefix: int = 512
    """Tokens already in the cache."""
    rounds: int = 60
    """Tokens of each connection that are timed."""
    out: Path | None = None
    """Write the figures here as JSON."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    base = preset(options.preset).model
    ids = torch.randint(
        0, base.vocab_size, (1, options.prefix + 1), generator=torch.Generator().manual_seed(0)
    )
    decoders, took = {}, {}
    for residual in ("prenorm", *options.residuals):
        model = GPT(dataclasses.replace(base, residual=residual), seed=0).eval()
        _perturb(model)
        decoders[residual] = _decoder(model, ids, options.prefix)
        took[residual] = {"cpu": [], "wall": []}
    for turn in range(-3, options.rounds):
        # Forwards and backwards, so that nobody always follows the same other.
        for residual, decode in list(decoders.items())[:: -1 if turn % 2 else 1]:
            began = time.process_time(), time.perf_counter()
            decode()
            ended = time.process_time(), time.perf_counter()
            if turn >= 0:
                for kind, a, b in zip(("cpu", "wall"), began, ended, strict=True):
                    took[residual][kind].append(b - a)
    rows = []
    for residual, seconds in took.items():
        row = {"residual": residual}
        for kind, values in seconds.items():
            ratios = sorted(a / b for a, b in zip(values, took["prenorm"][kind], strict=True))
            row |= {
                f"{kind}_ms": 1e3 * statistics.median(values),
                f"{kind}_ratio": statistics.median(ratios),
                f"{kind}_ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            }
        rows.append(row)
        print(
            f"{residual:<18}{row['cpu_ms']:8.1f} ms of processor, x {row['cpu_ratio']:.3f} "
            f"({row['cpu_ratio_quartiles'][0]:.3f} to {row['cpu_ratio_quartiles'][1]:.3f}); by the clock x "
            f"{row['wall_ratio']:.3f}"
        )
    if options.out is not None:
        record = {
            "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
            "machine": machine(torch.device("cpu")),
            "load": os.getloadavg()[0],
            "preset": options.preset,
            "prefix": options.prefix,
            "rounds": options.rounds,
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
