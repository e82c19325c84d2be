"""A training on two nodes that lose each other: two network namespaces of this machine, and a link that is cut.

::

    node 0: 10.77.0.1/24 -- veth pair -- 10.77.0.2/24 :node 1

Each namespace is a node of one ``torchrun`` job with two ranks. The training runs undisturbed once; then again, and
when it has done ``--cut-at`` steps the link goes down: packets vanish and no connection is closed, as with a cable
pulled or a switch that dies. It comes back after ``--down`` seconds. The job must end by itself with the same losses,
and the same weights, as the one that nothing happened to. ``--out`` is written with what happened when.

Needs root, Linux, and ``ip`` of iproute2 (``apt-get install iproute2``). Without them it says so and ends with status
77, which test drivers read as skipped.

The job is started so that it outlives the cut (docs/parallel-faults.md says why)::

    torchrun --nnodes=2 --nproc-per-node=2 --node-rank=K --max-restarts=3 --rdzv-backend=c10d
        --rdzv-endpoint=ADDRESS-OF-NODE-0:29400 --rdzv-conf=is_host=0|1,... --local-addr=ADDRESS-OF-NODE-K
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SKIPPED = 77
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
RENDEZVOUS = {"read_timeout": 60, "keep_alive_interval": 5, "keep_alive_max_attempt": 12, "join_timeout": 300}
INTERVAL = 5


def why_not() -> str | None:
    """What is missing here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "the command ip is missing: apt-get install iproute2"
    probe = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespace can be made here ({probe.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"], check=True)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Network:
    """Two namespaces joined by a veth pair; removed at the end."""

    def __init__(self):
        self.names = [f"depthmix{os.getpid()}-{node}" for node in range(2)]
        self.links = [f"dm{os.getpid() % 100000}n{node}" for node in range(2)]

    def __enter__(self) -> "Network":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "netns", self.names[0], "type", "veth",
           "peer", "name", self.links[1], "netns", self.names[1])  # fmt: skip
        for node, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
        self.set("up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name])

    def set(self, state: str) -> None:
        """Both ends, so that neither notices more than the other. Addresses stay."""
        for name, link in zip(self.names, self.links, strict=True):
            ip("-n", name, "link", "set", link, state)


class Nodes:
    """One torchrun in each namespace."""

    def __init__(self, network: Network, arguments: list[str], logs: Path):
        self.processes, self.logs = [], logs
        logs.mkdir()
        for node in range(2):
            conf = ",".join(
                f"{key}={value}" for key, value in {"is_host": int(node == 0), **RENDEZVOUS}.items()
            )
            command = [
                *("ip", "netns", "exec", network.names[node], sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes=2", "--nproc-per-node=2", f"--node-rank={node}", "--max-restarts=3"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=two-nodes"),
                *(f"--rdzv-conf={conf}", f"--local-addr={ADDRESSES[node]}"),
                *("-m", "depthmix", *arguments),
            ]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": network.links[node], "OMP_NUM_THREADS": "1"}
            with open(logs / f"node-{node}.log", "wb") as log:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )

    def wait(self, timeout_s: float) -> list[int | None]:
        """Exit statuses; ``None`` for a node that does not end in time."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)


def steps_done(run: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return max((line["step"] for line in lines), default=0)
    return 0


def train(args, network: Network, work: Path, name: str, cut: bool) -> dict:
    """Run the job once; what happened."""
    run, began, events = work / name, time.monotonic(), {}
    arguments = [
        *("train", "--preset", "quick", "--residual", "mgr-competitive", "--n-layer", "4", "--d-model", "32"),
        *("--seq-len", "64", "--batch-size", "8", "--steps", str(args.steps), "--eval-tokens", "4096"),
        *("--eval-interval", "20", "--checkpoint-interval", str(INTERVAL), "--parallel", args.parallel),
        *("--device", "cpu", "--timeout", str(args.timeout), "--no-report", "--out", str(run), "--resume"),
    ]
    nodes = Nodes(network, arguments, work / f"{name}-logs")
    try:
        if cut:
            while steps_done(run) < args.cut_at:
                if any(process.poll() is not None for process in nodes.processes) or (
                    time.monotonic() - began > args.limit
                ):
                    break
                time.sleep(0.02)
            events["cut_after_step"], events["cut_at_s"] = steps_done(run), time.monotonic() - began
            network.set("down")
            time.sleep(args.down)
            network.set("up")
            events["restored_at_s"] = time.monotonic() - began
            events["steps_when_restored"] = steps_done(run)
        statuses = nodes.wait(args.limit)
    finally:
        network.set("up")
        nodes.kill()
    logs = [(work / f"{name}-logs" / f"node-{node}.log").read_text(errors="replace") for node in range(2)]
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    said = {line for log in logs for line in log.splitlines() if line.startswith("depthmix: rank")}
    return events | {
        "statuses": statuses,
        "hang": None in statuses,
        "seconds": time.monotonic() - began,
        "steps": steps_done(run),
        "times_started": max(len(re.findall(r"(?m)^mgr-competitive: .* parameters", log)) for log in logs),
        "messages": sorted(line.replace(str(run), "RUN") for line in said),
        "metrics": lines,
    }


def rounded(value):
    return round(value, 2) if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--parallel", default="dp=2,pp=2")
    parser.add_argument("--cut-at", type=int, default=13, help="steps done when the link goes down")
    parser.add_argument("--timeout", type=float, default=20, help="seconds that ranks wait for each other")
    parser.add_argument("--down", type=float, default=25, help="seconds until it comes back")
    parser.add_argument(
        "--limit", type=float, default=400, help="seconds after which a job counts as hanging"
    )
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, otherwise temporary")
    args = parser.parse_args()
    if reason := why_not():
        print(f"two_nodes: skipped: {reason}", file=sys.stderr)
        return SKIPPED
    with contextlib.ExitStack() as stack:
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        network = stack.enter_context(Network())
        found = {
            "undisturbed": train(args, network, work, "undisturbed", cut=False),
            "cut": train(args, network, work, "cut", cut=True),
        }
    metrics = [run.pop("metrics") for run in found.values()]
    same = bool(metrics[0]) and metrics[0] == metrics[1]
    result = {
        "parallel": args.parallel,
        "steps": args.steps,
        "checkpoint_interval": INTERVAL,
        "timeout_s": args.timeout,
        "down_s": args.down,
        "rendezvous": RENDEZVOUS,
        "same_metrics": same,
        "final_loss": json.loads(metrics[1][-1])["loss"] if metrics[1] else None,
        **{name: {key: rounded(value) for key, value in run.items()} for name, run in found.items()},
    }
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)
    return 0 if same and found["cut"]["statuses"] == [0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
