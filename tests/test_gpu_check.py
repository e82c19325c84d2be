"""``scripts/gpu_check.sh`` where there is no GPU: what it would run, in which order, and how it goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depthmix import flags
from depthmix.bench import command
from depthmix.bench.steps import StepSettings

ROOT = Path(__file__).parents[1]
STAND_IN = """#!{python}
# Stands for a Python with a GPU: notes what it is asked to run.
import json, os, pathlib, sys, time
if "is_available" in sys.argv[2]:
    sys.exit()
if "hashlib" in sys.argv[2]:
    print("digest", os.environ.get("DIGEST", ""), os.getpid() if "DIGEST" in os.environ else "")
    sys.exit()
with open({noted!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
time.sleep(float(os.environ.get("TAKES", "0")))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script: ``(the finished process, what its Python was asked to run)``."""
    import json

    noted = tmp_path / "noted"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(STAND_IN.format(python=sys.executable, noted=str(noted)))
    # compute-sanitizer OPTIONS PYTHON ...: runs the rest.
    (folder / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)

    def check(*steps, **variables):
        noted.unlink(missing_ok=True)
        variables |= {"PYTHON": str(folder / "python"), "RESULTS": str(tmp_path / "results")}
        done = subprocess.run(
            ["sh", str(ROOT / "scripts/gpu_check.sh"), *steps],
            env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
        )
        return done, [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []

    return check


def test_all_steps(check):
    done, asked = check()
    assert done.returncode == 0, done.stderr
    titles = [line.removeprefix("--- ") for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert titles == "kernels ops tests determinism memory steps generation plots sanitizer".split()
    tests = [words for words in asked if "pytest" in words]
    kept = [words[words.index("--kept") + 1].rpartition("/")[2] for words in tests]
    assert kept == ["kernels.txt", "tests.txt", "memcheck.txt", "racecheck.txt"]
    for words in tests:
        assert not [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
    done, asked = check("study")
    assert done.returncode == 0 and asked == [
        ["-m", "depthmix", "study", "studies/xs.toml", "--devices", "0"]
    ]


def test_what_it_would_measure(check):
    """Every ``depthmix bench`` of it is one that the command line takes, and has the rows of Table 1."""
    benches = [words[3:] for words in check()[1] if words[1:3] == ["depthmix", "bench"]]
    measured = [words for words in benches if "--from" not in words]
    assert len(measured) == 1 + 4 + 1
    for words in measured:
        assert words[-1] == "--resume"
        words = ["cpu" if word == "cuda" else word for word in words]
        args = flags.parse(command.Bench, words, "bench")
        plan = command._plan(args)
        assert [*plan.problems(args)]
        if "training-step" not in words:
            continue
        settings = StepSettings(
            plan.device, plan.preset, "bf16", plan.residuals, args.stream_memory, ("auto",), True, 1,
            args.sequences, 1.0, args.n, next(iter(args.width), None), args.layers,
        )  # fmt: skip
        names = {name for name, *_ in settings.variants()}
        memories = ["store", "inversion", "replay"] if args.layers is None else ["replay"]
        assert names >= {
            f"mgr-{gate}:n_streams={n}, {memory}"
            for gate in ("competitive", "independent")
            for n in (4, 8)
            for memory in memories
        }
        assert "prenorm" in names and "attnres-block:blocks=4" in names
        if args.layers is None:
            rest = {"attnres", "attnres-block:blocks=8", "mhc:n_streams=4", "mhc-lite:n_streams=4"}
            assert rest <= names and len(names) == 12 + 2 + len(rest)
    drawn = [
        words[words.index("--from") + 1 : words.index("--plots")] for words in benches if "--from" in words
    ]
    written = [words[words.index("--out") + 1] for words in measured]
    assert drawn[1] == [written[0]]


@pytest.mark.parametrize("step", ["kernels", "study"])
def test_without_time_it_says_so(check, step):
    done, asked = check(step, "determinism", SECONDS_LEFT="3", TAKES="60")
    assert done.returncode == 75 and len(asked) == 1
    assert "no time left; the same command goes on" in done.stderr and "digest" not in done.stdout


def test_failures(check):
    done, asked = check("ops", "memory", STATUS="3")
    assert done.returncode == 3 and len(asked) == 1
    assert check("determinism")[0].returncode == 0
    assert check("determinism", DIGEST="other")[0].returncode == 1
    done, asked = check("opps")
    assert done.returncode == 2 and "no step named 'opps'; steps: kernels ops" in done.stderr and not asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_and_no_torch(tmp_path):
    bare = tmp_path / "bare"  # the same Python without its packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    for python, message in (
        (sys.executable, "torch finds no CUDA device here"),
        (bare, "has no torch; name a"),
    ):
        done = subprocess.run(
            ["sh", str(ROOT / "scripts/gpu_check.sh")],
            env=os.environ | {"PYTHON": str(python), "PYTHONPATH": "", "RESULTS": str(tmp_path / "results")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and done.stderr.startswith("gpu-check: ") and message in done.stderr
