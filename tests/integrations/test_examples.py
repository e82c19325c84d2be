"""The scripts of examples/integrations, each by the command at its top: two processes, the losses of the plain loop."""

import argparse
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from depthmix import available_residuals

sys.path.insert(0, str(Path(__file__).parents[1]))

import warm

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/integrations"
BOUND = 1e-5
"""Relative. In fp32 the order of a sum over processes shows in the seventh digit, and ten steps do not enlarge it."""


def commands():
    """Every command in a docstring, as ``(script, words)``."""
    for script in sorted(EXAMPLES.glob("*.py")):
        for line in ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).splitlines():
            if line.startswith("    ") and script.name in line:
                yield pytest.param(script.name, shlex.split(line), id=line.strip())


def run(words, environment, seconds=240):
    """Standard output and error of a command; with all its children it is gone when this returns or raises."""
    while "=" in words[0]:
        name, _, value = words[0].partition("=")
        environment, words = environment | {name: value}, words[1:]
    process = subprocess.Popen(
        words,
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ended = True
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        ended = False
    finally:
        if process.poll() is None:
            # torchrun starts its processes in sessions of their own, and ends them when it is told to stop.
            process.send_signal(signal.SIGTERM)
            try:
                said, _ = process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
    assert ended, f"not done after {seconds} s; it said:\n{said}"
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs of this Python first; the sources of this checkout; nothing left from another launcher."""
    cache = tmp_path_factory.mktemp("cache")
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(
            str(ROOT / folder)
            for folder in ("src", "examples/integrations", "tests/integrations/ends", "tests/shared")
        ),
        "DEPTHMIX_CACHE": warm.cache(cache),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A part of the standard library, so that it is tokenized in no time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(environment, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "plain.json"
    run(["python", "plain.py", "--data", str(text), "--out", str(out)], environment)
    losses = json.loads(out.read_text())["losses"]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.3
    return losses


@pytest.mark.parametrize("script, words", [case for case in commands() if case.values[0] != "plain.py"])
def test_losses_are_those_of_the_plain_loop(script, words, environment, text, plain, tmp_path):
    out = tmp_path / "losses.json"
    if words[0] == "fabric":
        words = [
            *words[:2],
            f"--main-port={free_port()}",
            *words[2:],
        ]  # torchrun --standalone looks for one itself
    ends = tmp_path / "ends"
    ends.mkdir()
    run([*words, "--data", str(text), "--out", str(out)], environment | {"ENDS": str(ends)})
    found = json.loads(out.read_text())
    assert found["processes"] == 2
    assert found["losses"] == pytest.approx(plain, rel=BOUND)
    # A thread of gloo's that outlives Python aborts its process now and then. Those of DeepSpeed do, and so its script
    # ends before Python is taken down.
    left = {path.name: path.read_text() for path in ends.iterdir()}
    assert left == ({} if script == "deepspeed_zero.py" else {"0": "", "1": ""})


def test_a_group_that_is_left_open_is_told_of(environment, tmp_path):
    code = (
        "import os, sitecustomize, torch, torch.distributed as dist; "
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1); "
        "dist.all_reduce(torch.ones(1)); sitecustomize.tell(); os._exit(0)"
    )
    run(["python", "-c", code], environment | {"RANK": "0", "ENDS": str(tmp_path)})
    assert "gloo" in (tmp_path / "0").read_text()


def test_every_connection_under_zero_3(environment, tmp_path):
    worker = Path(__file__).with_name("every_connection_zero3.py")
    out = tmp_path / "cases.json"
    words = ["DS_ACCELERATOR=cpu", "torchrun", "--standalone", "--nproc-per-node=2", str(worker), str(out)]
    run(words, environment, seconds=480)
    cases = json.loads(out.read_text())
    assert {case["case"][0] for case in cases} == set(available_residuals())
    for case in cases:
        assert case["got"] == pytest.approx(case["want"], rel=BOUND), case["case"]
        assert case["let_go"], case["case"]


def test_readme_lists_the_same_commands():
    """And its links lead somewhere."""
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    in_scripts = [case.id for case in commands()]
    assert len(in_scripts) == 7
    assert sorted(line for line in lines if ".py" in line) == sorted(in_scripts)
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "examples" / target).exists(), target
