"""What ``import depthmix`` takes beyond torch's own: fresh processes, one after the other, in turns.

Four kinds of process take turns, in an order that is reversed every other round:

torch      ``import torch``
depthmix   ``import torch, depthmix``
names      the same, with every name of ``depthmix.__all__`` looked up, which imports what defines it
model      the same, with a small model built and run once

Each says what it took inside, from its first statement to its last, by the clock and of the processor; starting Python
is not in it. ``beyond`` is the median over rounds of the difference to the ``torch`` process of the same round. A first
round is thrown away: it leaves files in the page cache, compiled to bytecode.

    python benchmarks/import_time.py --out benchmarks/results/import-time.json
"""

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from depthmix.bench.machine import machine

KINDS = {
    "torch": "import torch",
    "depthmix": "import torch, depthmix",
    "names": "import torch, depthmix; [getattr(depthmix, name) for name in depthmix.__all__]",
    "model": "import torch, depthmix; depthmix.GPT(depthmix.GPTConfig(16, 2, 16, 2, 8))(torch.zeros(1, 8).long())",
}
CLOCKED = """
import time
began = time.perf_counter(), time.process_time()
{statements}
print(time.perf_counter() - began[0], time.process_time() - began[1])
"""


@dataclass
class Options:
    """Time of importing depthmix beyond torch's.

    Example: python benchmarks/import_time.py --rounds 15
    """

    rounds: int = 15
    """Processes of each kind."""
    out: Path | None = None
    """Write the figures here as JSON."""


def clocked(statements: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor that the statements take in a process of their own."""
    ran = subprocess.run(
        [sys.executable, "-c", CLOCKED.format(statements=statements)],
        capture_output=True,
        text=True,
        check=True,
    )
    clock, processor = ran.stdout.split()[-2:]
    return float(clock), float(processor)


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    for statements in KINDS.values():
        clocked(statements)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in list(KINDS)[:: 1 if number % 2 else -1]:
            found[kind].append(clocked(KINDS[kind]))
    rows = []
    for kind, statements in KINDS.items():
        row: dict = {"kind": kind, "statements": statements}
        for i, name in enumerate(("clock", "processor")):
            own = [times[i] for times in found[kind]]
            beyond = sorted(a - b[i] for a, b in zip(own, found["torch"], strict=True))
            row[name] = {"seconds": round(statistics.median(own), 3)}
            if kind != "torch":
                low, middle, high = statistics.quantiles(beyond, n=4)
                row[name] |= {"beyond": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
        rows.append(row)
        print(kind, row["clock"], row["processor"], flush=True)
    results = {
        "command": shlex.join(["python", "benchmarks/import_time.py", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "rounds": options.rounds,
        "rows": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
