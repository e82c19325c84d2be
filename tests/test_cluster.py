"""The files of examples/cluster: one command in both, options that exist, and what happens when they are told to stop.

``srun``, ``scontrol``, ``scancel`` and, but for one test, ``torchrun`` are stand-ins that write down how they were
called.
"""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from depthmix import cli, flags
from depthmix.presets import preset

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples/cluster/slurm.sbatch"
SERVICE, JOB = yaml.safe_load_all((ROOT / "examples/cluster/kubernetes.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {entry["name"]: entry.get("value") for entry in CONTAINER["env"]}

STAND_INS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; "$@" & echo $! > "$LOG/torchrun.pid"; wait $!',
    "scontrol": '[ "$1" != show ] || printf "node7\\nnode8\\n"',
    "scancel": 'kill -TERM "$(cat "$LOG/torchrun.pid")"',
    "torchrun": (
        'trap "exit 1" TERM; touch "$LOG/ready"; '
        'i=0; while [ -z "$ENDS" ] && [ $i -lt 600 ]; do sleep 0.05; i=$((i + 1)); done; exit "$ENDS"'
    ),
}


def torchrun_command(text):
    """Words from ``torchrun`` to the end of the command, line continuations joined."""
    (command,) = re.findall(
        r"^[^#\n]*\b(torchrun --.*?)(?: &)?$", text.replace("\\\n", " "), flags=re.MULTILINE
    )
    return shlex.split(command)


SLURM_COMMAND = torchrun_command(SLURM.read_text(encoding="utf-8"))
KUBERNETES_COMMAND = torchrun_command(CONTAINER["args"][0])


def test_both_run_the_same_command():
    assert SLURM_COMMAND == KUBERNETES_COMMAND
    at = SLURM_COMMAND.index("-m")
    launcher, train = SLURM_COMMAND[:at], SLURM_COMMAND[at:]
    assert {"--rdzv-backend=c10d", "--max-restarts=3", "--nproc-per-node=8"} <= set(launcher)
    assert train[:3] == ["-m", "depthmix", "train"] and train[-1] == "--resume"


def test_options_of_torchrun():
    from torch.distributed.run import parse_args

    args = parse_args([word.replace("$NODES", "2") for word in SLURM_COMMAND[1:]])
    assert (args.nnodes, args.nproc_per_node, args.training_script) == ("2", "8", "depthmix")
    assert args.rdzv_endpoint == "$HEAD:29500" and args.rdzv_id == "$RUN_ID"


def test_options_of_train():
    words = SLURM_COMMAND[SLURM_COMMAND.index("train") + 1 :]
    start = cli.Train(training=flags.to_flags(preset("S")))
    args = flags.parse(cli.Train, words, "train", start)
    assert (args.preset, args.out, args.resume) == ("S", "/shared/runs/s", True)
    config = flags.to_config(args.training)
    assert (config.model.residual, config.parallel) == ("mgr-competitive", "dp=2,fsdp=8")


def test_processes_are_as_many_as_the_mesh_has():
    degrees = SLURM_COMMAND[SLURM_COMMAND.index("--parallel") + 1]
    wanted = 1
    for pair in degrees.split(","):
        wanted *= int(pair.partition("=")[2])
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", SLURM.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert int(nodes) * 8 == int(ENVIRONMENT["NODES"]) * 8 == wanted
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_shape_of_the_manifest():
    spec = JOB["spec"]
    assert (JOB["apiVersion"], JOB["kind"], SERVICE["kind"]) == ("batch/v1", "Job", "Service")
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(ENVIRONMENT["NODES"])
    # Pods find each other by the name of job, index and service.
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert ENVIRONMENT["HEAD"] == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    # Kubernetes allows a failure policy only with Never, and reads its rules in order.
    assert POD["restartPolicy"] == "Never"
    saved, disrupted = spec["podFailurePolicy"]["rules"]
    assert saved["action"] == disrupted["action"] == "Ignore"
    assert saved["onExitCodes"] == {
        "containerName": CONTAINER["name"],
        "operator": "In",
        "values": [75],
    }
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {v["name"] for v in POD["volumes"]}


def test_time_to_save():
    """torchrun kills before the cluster does, and depthmix has minutes until then."""
    script = SLURM.read_text(encoding="utf-8")
    (batch,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", script, flags=re.MULTILINE)
    (slurm,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", script, flags=re.MULTILINE)
    assert 300 <= int(slurm) < int(batch)
    assert 300 <= int(ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < POD["terminationGracePeriodSeconds"]


@pytest.fixture
def cluster(tmp_path):
    """Start one of the two scripts among stand-ins: ``start(what, ends)`` with the status torchrun ends with, or ``""``
    for a torchrun that works until it is told to stop."""
    programs, log = tmp_path / "programs", tmp_path / "log"
    programs.mkdir()
    log.mkdir()
    for name, body in STAND_INS.items():
        write_program(programs / name, f'echo "$*" >> "$LOG/{name}"\n{body}\n')
    container = tmp_path / "container.sh"
    container.write_text(CONTAINER["args"][0], encoding="utf-8")
    started = []

    def start(what, ends="", **environment):
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "ENDS": ends,
            "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
            "NODES": "2", "RUN_ID": "42", "HEAD": "node7",
        } | environment  # fmt: skip
        script = SLURM if what == "slurm" else container
        process = subprocess.Popen(
            ["bash", str(script)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    start.log, start.programs = log, programs
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def write_program(path, body):
    path.write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def wait_for(path, process, lines=0, seconds=300):
    """Return when the file is there, with so many lines."""
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def calls(log, name):
    return (log / name).read_text().splitlines() if (log / name).exists() else []


@pytest.mark.parametrize("what", ["slurm", "kubernetes"])
@pytest.mark.parametrize("ends", ["0", "1"])
def test_untold_the_status_is_that_of_torchrun(what, ends, cluster):
    process = cluster(what, ends)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == int(ends), said
    assert not any("requeue" in call for call in calls(cluster.log, "scontrol"))
    (called,) = calls(cluster.log, "torchrun")
    expected = " ".join(SLURM_COMMAND[1:])
    for name, value in {"$NODES": "2", "$RUN_ID": "42", "$HEAD": "node7"}.items():
        expected = expected.replace(name, value)
    assert called == expected


def test_slurm_told_to_stop_queues_again(cluster):
    process = cluster("slurm")
    wait_for(cluster.log / "ready", process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved; run again" in said
    assert calls(cluster.log, "scancel") == ["--signal=TERM 42"]
    assert calls(cluster.log, "scontrol") == ["show hostnames node[7-8]", "requeue 42"]


def test_a_pod_told_to_stop_leaves_with_75(cluster):
    process = cluster("kubernetes")
    wait_for(cluster.log / "ready", process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said


HELD = """
import os, sys, time
from depthmix import cli, train

loop, log_step = train._loop, train._Run.log_step


def watched_loop(run, stop):
    train._stop = stop
    loop(run, stop)


def held_step(run, *arguments, **options):
    log_step(run, *arguments, **options)
    while os.environ.get("HOLD_AT") == str(run.step) and train._stop.received is None:
        time.sleep(0.01)


train._loop, train._Run.log_step = watched_loop, held_step
sys.exit(cli.main())
"""
"""``depthmix`` that takes no step beyond ``$HOLD_AT`` until it is told to stop."""


@pytest.mark.slow
def test_a_pod_saves_and_another_goes_on(cluster, tmp_path):
    """The real torchrun and a small training: stopped it has saved; the same command again finishes it."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97}\n" for i in range(3000)))
    held = tmp_path / "held.py"
    held.write_text(HELD)
    out = tmp_path / "run"
    train = (
        f"train --preset quick --residual mgr-competitive --n-layer 2 --d-model 16 --seq-len 32 --batch-size 4 "
        f"--eval-tokens 64 --steps 20 --eval-interval 0 --checkpoint-interval 0 --quiet --no-report --device cpu "
        f"--val-fraction 0.5 --data {text} --cache-dir {tmp_path / 'cache'} --out {out} --resume"
    )
    write_program(
        cluster.programs / "torchrun",
        f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=1 {held} {train}\n",
    )
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = cluster("kubernetes", PYTHONPATH=path, OMP_NUM_THREADS="1", HOLD_AT="10")
    wait_for(out / "metrics.jsonl", process, lines=10)
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert [saved.name for saved in (out / "checkpoints").glob("step-*")] == ["step-00000010"]
    process = cluster("kubernetes", PYTHONPATH=path, OMP_NUM_THREADS="1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert json.loads((out / "result.json").read_text())["steps"] == 20
