"""A run that goes on with another number of processes and another plan: the same data, the same losses."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import warm

pytestmark = pytest.mark.slow

BATCH, STEPS = 8, 12
PARTS = [("dp=2,pp=2", 4, 4), ("", 1, 3), ("fsdp=2", 2, 2), ("dp=2,fsdp=2,pp=2", 8, None)]
"""Plan, processes, and after how many steps each is stopped."""


def depthmix(run: Path, text: Path, plan: str, processes: int, stop_at: int | None, **environment) -> None:
    arguments = (
        f"train --preset quick --residual mgr-competitive --n-layer 2 --d-model 16 --seq-len 16 --n-streams 2 "
        f"--steps {STEPS} --batch-size {BATCH} --micro-batch 1 --eval-interval 6 --eval-tokens 200 --device cpu "
        f"--checkpoint-interval 3 --data {text} --cache-dir {text.parent / 'cache'} --val-fraction 0.5 "
        f"--out {run} --resume --no-report --timeout 120"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP_AT": str(stop_at or 0), **environment}
    command = [Path(__file__).with_name("trainer.py"), *arguments.split(), "--parallel", plan]
    if processes == 1:
        ended = [warm.run(command, env=environment, timeout=600)]
    else:
        ended = warm.torchrun(command, processes, env=environment, timeout=600)
    if stop_at is None:
        assert [process.returncode for process in ended] == [0] * processes, ended
        return
    # One that has ended has the others sent SIGTERM, which may meet them on their way out.
    status = [process.returncode for process in ended]
    assert 75 in status and set(status) <= {75, -signal.SIGTERM}, ended
    for process in ended:
        assert process.returncode != 75 or re.search(r"after step \d+; saved", process.stderr), process


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run in four parts and that of one process, each with what was read."""
    folder = tmp_path_factory.mktemp("resume")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)}\n" for i in range(3000)))
    for name, parts in (("whole", [("", 1, None)]), ("parts", PARTS)):
        for number, (plan, processes, stop_at) in enumerate(parts):
            record = folder / f"read-{name}-{number}"
            record.mkdir()
            depthmix(folder / name, text, plan, processes, stop_at, RECORD=str(record))
    return folder


def batches(folder: Path) -> dict[int, list[int]]:
    """Where a batch begins -> its windows, put together from what all processes read."""
    pieces: dict[tuple[int, int], list[int]] = {}
    ways = 0
    for file in folder.glob("*.jsonl"):
        for line in lines(file):
            key = line["place"], line["part"]
            # Processes of one stage, or with parts of one sequence, read the same.
            assert pieces.setdefault(key, line["windows"]) == line["windows"]
            ways = line["parts"]
    places = sorted({place for place, _ in pieces})
    return {place: [w for part in range(ways) for w in pieces[place, part]] for place in places}


def test_no_window_is_read_twice_or_skipped(runs):
    whole = batches(runs / "read-whole-0")
    assert [*whole] == [BATCH * step for step in range(STEPS)]
    found = {}
    for number in range(len(PARTS)):
        part = batches(runs / f"read-parts-{number}")
        assert not part.keys() & found.keys()  # what was stopped had saved its last step
        found |= part
    assert found == whole


def test_metrics_are_those_of_one_process(runs):
    whole, parts = (lines(runs / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert len(whole) == len(parts) == STEPS + 2
    for a, b in zip(whole, parts, strict=True):
        assert {k: a[k] for k in ("split", "step", "tokens")} == {
            k: b[k] for k in ("split", "step", "tokens")
        }
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    whole, parts = (json.loads((runs / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert whole["parameters"] == parts["parameters"]
    assert whole["saved_bytes_per_token"] == pytest.approx(parts["saved_bytes_per_token"], rel=0.05)


def test_export_of_either_is_one_file(runs, tmp_path):
    from safetensors.torch import load_file

    from depthmix import cli

    for name in ("whole", "parts"):
        assert (
            cli.main(["export", str(runs / name), "--to", "safetensors", "--out", str(tmp_path / name)]) == 0
        )
    whole, parts = load_file(tmp_path / "whole"), load_file(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    difference = sum((whole[k] - parts[k]).double().square().sum().item() for k in whole)
    size = sum(whole[k].double().square().sum().item() for k in whole)
    assert (difference / size) ** 0.5 < 1e-5
