"""Faults of all kinds at random moments into trainings under ``torchrun --max-restarts``; what each of them cost.

::

    python benchmarks/faults.py --out results/parallel/faults.json --faults 30

Each job trains a small model with one plan on four processes and gets several faults, one a life; torchrun starts it
again after each. Kinds and moments are drawn from a seed:

==============  =====================================================================================================
kill            SIGKILL from outside, some time after the processes have started: also before they meet
kill in save    SIGKILL in the thread that writes a checkpoint
stall           SIGSTOP from outside
no room         no file of one rank may grow any more, from some checkpoint on
nan             one number in the weights, or in the gradient, of one rank
terminate       SIGTERM to one rank
==============  =====================================================================================================

For each fault: seconds until every process of that life was gone, and until the next life took its first batch; the
steps done that were not in the last whole checkpoint; whether the processes that lived on named the rank (``told``), or
were silent or wrong. At the end of a job its metrics and weights are compared with those of the same plan undisturbed,
and the windows that every rank read with the order of one process. A job that is in ``--out`` is not run again.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parallel"))

import fault_points
import torch
from fault_record import batches, windows_wrong

from depthmix.checkpoint import latest_checkpoint, problem, whole_tensors
from depthmix.config import from_dict
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.world import GRACE_S

RANKS, INTERVAL, TIMEOUT_S = 4, 5, 30
TORCHRUN_S = 30
"""What torchrun gives processes that it has asked to end."""
PLANS = ("dp=2,pp=2", "fsdp=2,tp=2", "dp=4")
KINDS = ("kill", "kill", "kill in save", "stall", "no room", "nan", "terminate")
FAULTS_A_JOB = 6


def arguments(run: Path, plan: str, steps: int) -> list[str]:
    return [
        *("train", "--preset", "quick", "--residual", "mgr-competitive", "--n-layer", "4", "--d-model", "32"),
        *("--seq-len", "64", "--batch-size", "8", "--steps", str(steps), "--eval-interval", "20"),
        *(
            "--eval-tokens",
            "4096",
            "--checkpoint-interval",
            str(INTERVAL),
            "--parallel",
            plan,
            "--device",
            "cpu",
        ),
        *("--no-report", "--out", str(run), "--resume", "--timeout", str(TIMEOUT_S)),
    ]


def draw(seed: int, count: int) -> list[dict]:
    """The faults of one job, one for each life."""
    rng, found = random.Random(seed), []
    for attempt in range(count):
        kind = rng.choice(KINDS)
        fault = {"kind": kind, "rank": rng.randrange(RANKS), "attempt": attempt}
        if kind in ("kill", "stall"):
            # A third of them while the processes start and meet.
            fault |= {"from": "start" if rng.random() < 0.3 else "first batch", "delay_s": rng.uniform(0, 5)}
        elif kind == "kill in save":
            fault |= {"at": "save", "do": "kill", "part": rng.choice(["model", "optimizer"])}
        elif kind == "no room":
            fault |= {"at": "save", "do": "no room", "part": "model"}
        elif kind == "nan":
            fault |= {"at": "step", "do": rng.choice(["poison weight", "poison gradient"])}
            fault |= {"after": rng.randrange(1, 12)}
        else:
            fault |= {"at": "step", "do": "terminate", "after": rng.randrange(1, 12)}
        found.append(fault)
    return found


class Torchrun:
    """One job."""

    def __init__(self, work: Path, plan: str, steps: int, faults: list[dict]):
        self.notes, self.run, self.faults = work / "notes", work / "run", faults
        self.notes.mkdir(parents=True)
        inside = [fault for fault in faults if "at" in fault]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DEPTHMIX_NOTES": str(self.notes),
            "DEPTHMIX_FAULT": json.dumps(inside),
        }
        with open(work / "torchrun.log", "wb") as log:
            self.process = subprocess.Popen(
                [*(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
                 *(f"--max-restarts={max(1, len(faults))}", "--log-dir", str(work / "logs"), "--redirects", "3"),
                 *("--tee", "0", fault_points.__file__), *arguments(self.run, plan, steps)],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.logs = work / "logs"

    def pids(self, attempt: int) -> dict[int, int]:
        found = {}
        for rank in range(RANKS):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = int((self.notes / f"pid-{rank}-{attempt}").read_text())
        return found

    def alive(self, attempt: int) -> list[int]:
        return [pid for pid in self.pids(attempt).values() if state_of(pid) not in ("", "Z", "X")]

    def until(self, condition, limit_s: float) -> bool:
        """Wait for it; whether it came before the limit and the end of the job."""
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                return bool(condition())
            time.sleep(0.02)
        return True

    def said(self, rank: int, attempt: int) -> str:
        return "".join(p.read_text() for p in self.logs.glob(f"*/attempt_{attempt}/{rank}/stderr.log"))

    def done(self, attempt: int) -> int:
        """Steps that some rank had done: the batch in hand is not."""
        return max(
            (found[-1]["step"] - 1 for rank in range(RANKS) if (found := batches(self.notes, rank, attempt))),
            default=0,
        )


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def follow(job: Torchrun, fault: dict, limit_s: float) -> dict | None:
    """Let one fault happen; what came of it, or ``None`` where the job ended before."""
    attempt, rank = fault["attempt"], fault["rank"]
    if not job.until(lambda: len(job.pids(attempt)) == RANKS, limit_s):
        return None
    if "at" not in fault:
        if fault["from"] == "first batch" and not job.until(
            lambda: batches(job.notes, rank, attempt), limit_s
        ):
            return None
        time.sleep(fault["delay_s"])
        if job.process.poll() is not None or rank not in job.pids(attempt):
            return None
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pids(attempt)[rank], signal.SIGKILL if fault["kind"] == "kill" else signal.SIGSTOP)
    else:
        # It has happened when the first process is gone, or when the fault says so.
        if not job.until(lambda: (job.notes / f"fault-{rank}-{attempt}").exists(), limit_s):
            return None
        began = (job.notes / f"fault-{rank}-{attempt}").stat().st_mtime - time.time() + time.monotonic()
    bound = 2 * TIMEOUT_S + GRACE_S + TORCHRUN_S + 60  # the last for a busy machine
    ended = job.until(lambda: not job.alive(attempt), bound)
    seconds = time.monotonic() - began
    done, newest = job.done(attempt), latest_checkpoint(job.run / "checkpoints")
    saved = int(newest.name[5:]) if newest else 0
    whole = newest is None or problem(newest) is None
    job.until(lambda: all(batches(job.notes, r, attempt + 1) for r in range(RANKS)), limit_s)
    return {
        **{key: value for key, value in fault.items() if key not in ("at", "do")},
        "what": fault.get("do", fault["kind"]),
        "steps_done": done,
        "last_whole_checkpoint": saved,
        "checkpoint_whole": whole,
        "steps_lost": max(0, done - saved),
        "seconds_to_end": round(seconds, 2),
        "seconds_to_next_batch": round(time.monotonic() - began, 2),
        "hang": not ended,
        **heard(job, fault),
    }


def heard(job: Torchrun, fault: dict) -> dict:
    """How many ranks told what happened, and how many something else, or nothing."""
    attempt, rank, told, wrong, silent = fault["attempt"], fault["rank"], 0, [], 0
    steps = set()
    for other in range(RANKS):
        said = job.said(other, attempt)
        message = said.partition(f"depthmix: rank {other}: ")[2]
        if fault["kind"] in ("kill", "stall", "kill in save"):
            if other == rank:
                continue
            right = f"rank {rank} (process {job.pids(attempt)[rank]} on " in message and not re.search(
                rf"rank [^{rank}] \(process", message
            )
        elif fault["kind"] == "no room":
            right = f"rank {rank}: " in message and "File too large" in message
        elif fault["kind"] == "nan":
            right = re.search(r"step (\d+) has loss", message)
            steps |= {right[1]} if right else set()
        else:
            right = re.search(r"after step (\d+); saved", message)
            steps |= {right[1]} if right else set()
        if right:
            told += 1
        elif message or "Traceback" in said:
            wrong.append(said[-600:].replace(str(job.run), "RUN"))
        else:
            silent += 1
    return {"told": told, "silent": silent, "wrong": wrong, "same_step": len(steps) <= 1}


def run_job(seed: int, plan: str, faults: list[dict], steps: int, work: Path, reference: Path) -> dict:
    job, found = Torchrun(work, plan, steps, faults), []
    try:
        for fault in faults:
            result = follow(job, fault, limit_s=300)
            print(json.dumps(result), flush=True)
            if result is None:
                break
            found.append(result)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(600)
        status = job.process.returncode
    finally:
        if job.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGTERM)
            job.process.wait(60)
    result = {"seed": seed, "plan": plan, "steps": steps, "status": status, "hang": status is None}
    if status == 0:
        result |= compare(job, plan, reference)
    return result | {"faults": found}


def compare(job: Torchrun, plan: str, reference: Path) -> dict:
    config = from_dict(json.loads((job.run / "config.json").read_text()))
    taken = {rank: batches(job.notes, rank) for rank in range(RANKS)}
    skipped, other = windows_wrong(config, ParallelPlan.parse(plan), taken)
    same = True
    for part in ("model", "optimizer"):
        one, two = (
            whole_tensors(latest_checkpoint(run / "checkpoints"), part) for run in (job.run, reference)
        )
        same &= one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (job.run, reference)]
    return {
        "windows_skipped": skipped,
        "windows_out_of_order": other,
        "same_metrics": metrics[0] == metrics[1],
        "same_weights": same,
    }


def summary(jobs: list[dict]) -> dict:
    faults = [fault for job in jobs for fault in job["faults"]]
    by_kind = {}
    for kind in sorted({fault["kind"] for fault in faults}):
        of = [fault for fault in faults if fault["kind"] == kind]
        by_kind[kind] = {
            "faults": len(of),
            "steps_lost_max": max(fault["steps_lost"] for fault in of),
            "seconds_to_end_max": max(fault["seconds_to_end"] for fault in of),
            "seconds_to_next_batch_max": max(fault["seconds_to_next_batch"] for fault in of),
        }
    finished = [job for job in jobs if job["status"] == 0]
    return {
        "faults": len(faults),
        "hangs": sum(fault["hang"] for fault in faults) + sum(job["hang"] for job in jobs),
        "steps_lost_max": max((fault["steps_lost"] for fault in faults), default=0),
        "lost_more_than_one_interval": sum(fault["steps_lost"] > INTERVAL for fault in faults),
        "checkpoints_damaged": sum(not fault["checkpoint_whole"] for fault in faults),
        "ranks_that_told": sum(fault["told"] for fault in faults),
        "ranks_silent": sum(fault["silent"] for fault in faults),
        "ranks_wrong": sum(len(fault["wrong"]) for fault in faults),
        "not_the_same_step": sum(not fault["same_step"] for fault in faults),
        "jobs": len(jobs),
        "jobs_finished": len(finished),
        "jobs_with_other_metrics_or_weights": sum(
            not (job["same_metrics"] and job["same_weights"]) for job in finished
        ),
        "windows_skipped": sum(job["windows_skipped"] for job in finished),
        "windows_out_of_order": sum(job["windows_out_of_order"] for job in finished),
        "by_kind": by_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=60, help="no job begins later than that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, otherwise temporary")
    args = parser.parse_args()
    began = time.monotonic()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"jobs": []}
    with contextlib.ExitStack() as stack:
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        number = 0
        while sum(len(job["faults"]) for job in found["jobs"]) < args.faults:
            seed, plan = args.seed * 1000 + number, PLANS[number % len(PLANS)]
            number += 1
            if any(job["seed"] == seed for job in found["jobs"]):
                continue
            if time.monotonic() - began > 60 * args.minutes:
                break
            reference = work / f"undisturbed-{plan}"
            if not (reference / "run" / "result.json").exists():
                Torchrun(reference, plan, args.steps, []).process.wait(900)
            job = run_job(
                seed, plan, draw(seed, FAULTS_A_JOB), args.steps, work / f"job-{seed}", reference / "run"
            )
            found["jobs"].append(job)
            found["setting"] = {
                "processes": RANKS, "steps": args.steps, "checkpoint_interval": INTERVAL, "timeout_s": TIMEOUT_S,
                "cores": os.cpu_count(), "torch": torch.__version__,
            }  # fmt: skip
            found["summary"] = summary(found["jobs"])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({key: found[key] for key in ("setting", "summary", "jobs")}, indent=2)
            args.out.with_suffix(".new").write_text(text + "\n")
            args.out.with_suffix(".new").replace(args.out)
    print(json.dumps(found.get("summary"), indent=2))


if __name__ == "__main__":
    main()
