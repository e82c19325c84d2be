"""Reading what ``fault_points`` wrote down, and what it should be."""

import json
from pathlib import Path

import numpy as np

from depthmix.config import TrainConfig
from depthmix.data import open_dataset, prepare
from depthmix.data.loader import Shuffle
from depthmix.parallel.plan import ParallelPlan


def batches(notes: Path, rank: int, attempt: int | None = None) -> list[dict]:
    """Every batch that a rank took in one life of the job, or in all, in the order of time."""
    files = sorted(notes.glob(f"steps-{rank}-*"), key=lambda path: int(path.stem.split("-")[2]))
    return [
        json.loads(line)
        for path in files
        if attempt is None or path.stem == f"steps-{rank}-{attempt}"
        for line in path.read_text().splitlines()
    ]


def expected_windows(config: TrainConfig, plan: ParallelPlan, rank: int) -> dict[int, list[list[int]]]:
    """Epoch and number of the windows that a rank reads in each step: its rows of the order of one process."""
    windows = (len(open_dataset(prepare(config.data)).train) - 1) // config.model.seq_len
    place, rows = plan.coordinates(rank), config.batch_size // plan.data_ways
    first = (place["dp"] * plan.fsdp + place["fsdp"]) * rows
    found = {}
    for step in range(1, config.steps + 1):
        positions = [(step - 1) * config.batch_size + first + row for row in range(rows)]
        found[step] = [
            [p // windows, int(Shuffle(windows, config.seed, p // windows)(np.array([p % windows]))[0])]
            for p in positions
        ]
    return found


def windows_wrong(config: TrainConfig, plan: ParallelPlan, taken: dict[int, list[dict]]) -> tuple[int, int]:
    """Windows that the weights never saw, and those that they saw where another belongs.

    ``taken``: the batches of each rank in the order of time. A step that was repeated counts as it was the last time:
    what it did before went with the process.
    """
    skipped = other = 0
    for rank, read in taken.items():
        last = {batch["step"]: batch["windows"] for batch in read}
        for step, expected in expected_windows(config, plan, rank).items():
            got = last.get(step, [])
            skipped += sum(window not in got for window in expected)
            other += sum(window != right for window, right in zip(got, expected, strict=False))
            other += max(0, len(got) - len(expected))
    return skipped, other
