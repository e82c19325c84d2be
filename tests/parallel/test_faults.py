"""Whatever happens to one process of a training, all end soon and say who it was; and the next start loses nothing.

Real processes, and faults at chosen points in them (``fault_points``). Most jobs are forked from a warm server and told
who they are as ``torchrun`` tells it (``jobs``); the last tests start ``torchrun``. A process that does not end is a
``TimeoutError``, which fails the test.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from depthmix.checkpoint import latest_checkpoint, problem, whole_tensors
from depthmix.config import from_dict
from depthmix.parallel.plan import ParallelPlan

sys.path.insert(0, str(Path(__file__).parent))  # the processes import these by name

import fault_points
from fault_record import batches, windows_wrong
from jobs import HANG_S, Ended, Job

STEPS, INTERVAL, EVALUATED, BATCH, SEQ_LEN = 12, 4, 6, 8, 16
TIMEOUT_S = 30
SAID = "depthmix: rank {}: "


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)}\n" for i in range(3000)))
    return (
        f"train --preset quick --residual mgr-competitive --n-layer 2 --d-model 16 --seq-len {SEQ_LEN} "
        f"--batch-size {BATCH} --steps {STEPS} --checkpoint-interval {INTERVAL} --eval-interval {EVALUATED} "
        f"--eval-tokens 1024 --val-fraction 0.2 --device cpu --no-report --data {text} "
        f"--cache-dir {folder / 'cache'}"
    ).split()


class Setup:
    """A plan, a run folder, and the jobs that worked in it."""

    def __init__(self, base: list[str], folder: Path, plan: str, timeout_s: float = TIMEOUT_S):
        self.base, self.folder, self.plan = base, folder, ParallelPlan.parse(plan)
        self.run = folder / "run"
        self.timeout_s = timeout_s
        self.notes: list[Path] = []

    def arguments(self) -> list[str]:
        return [*self.base, "--parallel", str(self.plan), "--out", str(self.run), "--resume",
                "--timeout", str(self.timeout_s)]  # fmt: skip

    def new_notes(self) -> Path:
        self.notes.append(self.folder / f"notes-{len(self.notes)}")
        return self.notes[-1]

    def start(self, fault: dict | None = None) -> Job:
        return Job(self.arguments(), self.plan.processes, self.new_notes(), fault)

    def go(self, fault: dict | None = None) -> list[Ended]:
        stalled = fault["rank"] if fault and fault["do"] in ("stall", "sleep") else None
        return self.start(fault).wait(stalled)

    def batches(self, rank: int) -> list[dict]:
        """Every batch that a rank took, in all lives of all jobs, in the order of time."""
        return [batch for notes in self.notes for batch in batches(notes, rank)]

    def newest(self) -> Path | None:
        return latest_checkpoint(self.run / "checkpoints")


_undisturbed: dict[str, Setup] = {}


@pytest.fixture
def undisturbed(base, tmp_path_factory):
    """``undisturbed(plan)``: a run that nothing happened to."""

    def of(plan: str) -> Setup:
        if plan not in _undisturbed:
            found = Setup(base, tmp_path_factory.mktemp("undisturbed"), plan)
            assert [ended.status for ended in found.go()] == [0] * found.plan.processes
            _undisturbed[plan] = found
        return _undisturbed[plan]

    return of


def assert_nothing_is_lost(found: Setup, undisturbed: Setup) -> None:
    """The same metrics and weights to the last bit; every window read once, in the order of one process."""
    assert (found.run / "metrics.jsonl").read_bytes() == (undisturbed.run / "metrics.jsonl").read_bytes()
    for part in ("model", "optimizer"):
        tensors, expected = (whole_tensors(setup.newest(), part) for setup in (found, undisturbed))
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    config = from_dict(json.loads((found.run / "config.json").read_text()))
    taken = {rank: found.batches(rank) for rank in range(found.plan.processes)}
    assert all({batch["step"] for batch in read} == set(range(1, STEPS + 1)) for read in taken.values())
    assert windows_wrong(config, found.plan, taken) == (0, 0)


def steps_lost(found: Setup) -> int:
    """Of those begun by any rank before the last start: those that were repeated."""
    per_rank = [[batch["step"] for batch in found.batches(rank)] for rank in range(found.plan.processes)]
    return max(len(steps) - len(set(steps)) for steps in per_rank)


def blames(said: str, rank: int, ended: list[Ended], how: str) -> bool:
    """Whether the message names the rank, with its process and machine, and what became of it."""
    return f"rank {rank} (process {ended[rank].pid} on {os.uname().nodename}) {how}" in said


def assert_all_name(ended: list[Ended], rank: int, how: str, found: Setup) -> None:
    """Every other process ended with one message, which names ``rank`` and the last whole checkpoint."""
    for other, process in enumerate(ended):
        if other == rank:
            continue
        assert process.status == 1, (other, process)
        assert blames(process.said, rank, ended, how), (other, process)
        assert process.said.count(SAID.format(other)) == 1 and "Traceback" not in process.said, process.said
        newest = found.newest()
        assert (f"The last checkpoint is {newest};" if newest else "Nothing was saved yet") in process.said


# --- a process that is killed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, fault",
    [
        ("dp=2", {"rank": 0, "at": "loop"}),
        ("pp=2", {"rank": 1, "at": "step", "step": 7}),
        ("dp=2,pp=2", {"rank": 2, "at": "validation"}),
        ("fsdp=2", {"rank": 0, "at": "save", "step": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"rank {value['rank']} at {value['at']}",
)
def test_a_killed_rank_is_named_and_nothing_is_lost(base, undisturbed, tmp_path, plan, fault):
    found = Setup(base, tmp_path, plan)
    ended = found.go({**fault, "do": "kill"})
    assert ended[fault["rank"]].status == -signal.SIGKILL
    assert_all_name(ended, fault["rank"], "is gone", found)
    assert all(
        re.search(r"This rank had done \d+ steps", ended[r].said)
        for r in range(len(ended))
        if r != fault["rank"]
    )
    newest = found.newest()
    assert newest is None or problem(newest) is None
    assert [process.status for process in found.go()] == [0] * len(ended)
    assert_nothing_is_lost(found, undisturbed(plan))
    # The step in flight is not done, and a checkpoint is whole before the step behind it is.
    assert steps_lost(found) - 1 <= INTERVAL


def test_a_rank_that_is_killed_when_all_is_done_changes_nothing(base, undisturbed, tmp_path):
    found = Setup(base, tmp_path, "dp=2")
    ended = found.go({"rank": 1, "at": "end", "do": "kill"})
    assert ended[0].status in (0, -signal.SIGTERM) and (found.run / "result.json").exists()
    assert [process.status for process in found.go()] == [0, 0]
    assert_nothing_is_lost(found, undisturbed("dp=2"))


def test_a_rank_that_fails_by_itself_says_why_to_all(base, tmp_path):
    found = Setup(base, tmp_path, "pp=2")
    ended = found.go({"rank": 1, "at": "step", "step": 6, "do": "fail"})
    assert_all_name(ended, 1, "failed: RuntimeError: as the test wants it", found)


def test_a_rank_that_never_comes(base, tmp_path):
    found = Setup(base, tmp_path, "dp=2", timeout_s=4)
    ended = found.start({"rank": 1, "at": "world", "do": "stall"}).wait(stalled=1)
    assert ended[0].status == 1
    assert "the 2 processes did not find each other within 4 s (rank 1 never came" in ended[0].said
    assert "Traceback" not in ended[0].said


# --- a process that stalls ------------------------------------------------------------------------


@pytest.mark.parametrize("plan, rank", [("dp=2", 0), ("dp=2,pp=2", 3)])
def test_a_stalled_rank_is_given_up(base, undisturbed, tmp_path, plan, rank):
    found = Setup(base, tmp_path, plan, timeout_s=5)
    ended = found.go({"rank": rank, "at": "step", "step": 7, "do": "stall"})
    assert_all_name(ended, rank, "did not answer within 5 s", found)
    found.timeout_s = TIMEOUT_S
    assert [process.status for process in found.go()] == [0] * len(ended)
    assert_nothing_is_lost(found, undisturbed(plan))


def test_a_rank_that_is_busy_with_something_else_is_named_too(base, tmp_path):
    found = Setup(base, tmp_path, "pp=2", timeout_s=5)
    ended = found.go({"rank": 0, "at": "step", "step": 7, "do": "sleep"})
    assert_all_name(ended, 0, "did not answer within 5 s: it is in <lambda> (fault_points.py, line ", found)


# --- no room --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, file, saved",
    [
        ({"rank": 1, "at": "save", "step": 8}, "step-00000008", "step-00000006"),
        ({"rank": 0, "at": "step", "step": 6}, "tensorboard", "step-00000004"),
    ],
    ids=["rank 1, checkpoint", "rank 0, logs"],
)
def test_no_room_on_one_rank(base, undisturbed, tmp_path, fault, file, saved):
    found = Setup(base, tmp_path, "dp=2")
    ended = found.go({**fault, "do": "no room"})
    assert [process.status for process in ended] == [1, 1]
    for rank, process in enumerate(ended):
        assert file in process.said and "File too large" in process.said, process
        assert f"The last checkpoint is {found.run / 'checkpoints' / saved}" in process.said
        assert process.said.count(SAID.format(rank)) == 1 and "Traceback" not in process.said
    named = r"rank 1: .*File too large" if file != "tensorboard" else r"rank 0 \(process \d+ on .*\) failed: "
    assert re.search(named, ended[1].said)
    assert found.newest().name == saved and problem(found.newest()) is None
    assert [process.status for process in found.go()] == [0, 0]
    assert_nothing_is_lost(found, undisturbed("dp=2"))


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, do, said",
    [
        ("dp=2", "poison weight", "step 7 has loss nan and gradient norm nan"),
        ("dp=2", "poison gradient", r"step 7 has loss \d.\d+ and gradient norm nan"),
        ("pp=2", "poison gradient", r"step 7 has loss \d.\d+ and gradient norm nan"),
    ],
    ids=lambda value: value if "step" not in value else "",
)
def test_a_nan_on_one_rank_stops_all_before_the_step_is_applied(base, tmp_path, plan, do, said):
    found = Setup(base, tmp_path, plan)
    ended = found.go({"rank": 1, "at": "step", "step": 7, "do": do})
    for rank, process in enumerate(ended):
        assert process.status == 1, process
        message = process.said.partition(SAID.format(rank))[2]
        assert re.match(
            f"{re.escape(str(found.run))}: {said}, and was not applied; the last checkpoint", message
        )
        assert "step-00000006" in message and "Traceback" not in process.said
    diverged = json.loads((found.run / "diverged.json").read_text())
    assert diverged["step"] == 6 and diverged["message"].startswith("step 7 has loss")
    assert problem(found.newest()) is None and found.newest().name == "step-00000006"


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, rank, do", [("dp=2", 1, "terminate"), ("dp=2", 0, "interrupt"), ("dp=4", 3, "terminate")]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(base, undisturbed, tmp_path, plan, rank, do):
    found = Setup(base, tmp_path, plan)
    ended = found.go({"rank": rank, "at": "step", "step": 7, "do": do})
    assert [process.status for process in ended] == [75] * len(ended)
    for process in ended:
        assert f"after step 7; saved {found.newest()}" in process.said and "Traceback" not in process.said
    assert found.newest().name == "step-00000007"
    assert [process.status for process in found.go()] == [0] * len(ended)
    assert steps_lost(found) == 0
    assert_nothing_is_lost(found, undisturbed(plan))


# --- requests that cannot be met ------------------------------------------------------------------


def test_a_second_job_on_the_folder_is_refused_and_the_first_not_disturbed(base, undisturbed, tmp_path):
    found = Setup(base, tmp_path, "dp=2")
    first = found.start({"rank": 1, "at": "step", "step": 7, "do": "stall"})
    stalled = found.notes[0] / "fault-1-0"
    wait_for(lambda: stalled.exists(), first)
    second = Setup(base, tmp_path, "dp=2")
    second.run, second.folder = found.run, tmp_path / "second"
    ended = second.go()
    alone = subprocess.run(
        [sys.executable, "-m", "depthmix", *base, "--out", str(found.run), "--resume"],
        capture_output=True, text=True, timeout=HANG_S, env=plain_environment(),
    )  # fmt: skip
    refusal = f"{found.run} is in use by process {first.processes[0].pid}; wait for it"
    assert [process.status for process in ended] == [2, 2] and alone.returncode == 2
    assert ended[0].said.count(refusal) == 1 and not ended[1].said and refusal in alone.stderr
    first.send(1, signal.SIGCONT)
    assert [process.status for process in first.wait()] == [0, 0]
    assert_nothing_is_lost(found, undisturbed("dp=2"))


@pytest.mark.parametrize(
    "change, text",
    [
        (["--parallel", "dp=2,zz=3"], "unknown key 'zz'"),
        (["--parallel", "dp=4"], "needs dp x fsdp x tp x pp = 4 x 1 x 1 x 1 = 4 processes, and there are 2"),
        (["--parallel", "dp=3"], "batch_size = 8 sequences cannot be divided among dp x fsdp = 3 processes"),
        (["--parallel", "tp=2", "--n-head", "1"], "tp = 2 must divide the heads, n_head = 1"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_a_request_that_cannot_be_met_ends_before_anybody_waits(base, tmp_path, change, text):
    job = Job([*base, "--out", str(tmp_path / "run"), *change], 2, tmp_path / "notes")
    ended = job.wait()
    assert all(process.status in (2, -signal.SIGTERM) for process in ended) and 2 in [p.status for p in ended]
    said = "".join(process.said for process in ended)
    assert text in re.sub(r"[\s│]+", " ", said)  # it may be in a box
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def wait_for(condition, job: Job) -> None:
    until = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < until and all(p.is_alive() for p in job.processes), job._said()
        time.sleep(0.05)


# --- torchrun -------------------------------------------------------------------------------------


def plain_environment() -> dict[str, str]:
    source = str(Path(fault_points.train.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(found: Setup, fault: dict | None, *options: str) -> subprocess.CompletedProcess:
    """The job under ``torchrun``; what each rank says is in files."""
    notes = found.new_notes()
    notes.mkdir()
    environment = plain_environment() | {"DEPTHMIX_NOTES": str(notes), "DEPTHMIX_FAULT": json.dumps(fault)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={found.plan.processes}",
         "--log-dir", str(notes / "logs"), "--redirects", "3", "--tee", "0", *options,
         fault_points.__file__, *found.arguments()],
        env=environment, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip


def said_by(notes: Path, rank: int, attempt: int = 0) -> str:
    """Standard error of one rank in one life of the job."""
    (file,) = notes.glob(f"logs/*/attempt_{attempt}/{rank}/stderr.log")
    return file.read_text()


def test_torchrun_restarts_from_the_last_whole_checkpoint(base, undisturbed, tmp_path):
    found = Setup(base, tmp_path, "dp=2")
    done = torchrun(found, {"rank": 1, "at": "step", "step": 7, "do": "kill"}, "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    pid = (found.notes[0] / "pid-1-0").read_text()
    said = said_by(found.notes[0], rank=0)
    assert f"rank 1 (process {pid} on {os.uname().nodename}) is gone. This rank had done 6 steps." in said
    assert f"The last checkpoint is {found.run / 'checkpoints' / 'step-00000006'}" in said
    assert "Traceback" not in said and said_by(found.notes[0], rank=0, attempt=1).count("rank 0:") == 0
    assert steps_lost(found) - 1 <= INTERVAL
    assert_nothing_is_lost(found, undisturbed("dp=2"))


def test_terminating_torchrun_saves_and_the_next_start_goes_on(base, undisturbed, tmp_path):
    found = Setup(base, tmp_path, "dp=2")
    done = torchrun(found, {"rank": 1, "at": "step", "step": 6, "do": "terminate launcher"})
    assert done.returncode != 0
    stopped = int(found.newest().name[5:])
    assert stopped >= 6
    for rank in range(2):
        assert f"after step {stopped}; saved {found.newest()}" in said_by(found.notes[0], rank)
    assert all("Traceback" not in said_by(found.notes[0], rank) for rank in range(2))
    assert [process.status for process in found.go()] == [0, 0]
    assert steps_lost(found) == 0
    assert_nothing_is_lost(found, undisturbed("dp=2"))
