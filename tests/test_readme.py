"""The README's commands and code run as they stand, and its figures are those of the files it names."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(first_word):
    lines = [line.split("   #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(first_word)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "DEPTHMIX_CACHE": str(cache)}


@pytest.mark.slow
def test_command_line(environment, tmp_path):
    """In order and in one folder, as a reader would type them."""
    listed = commands(("depthmix ", "torchrun "))
    assert {words[1] for words in listed if words[0] == "depthmix"} == {
        "info",
        "train",
        "watch",
        "map",
        "diagnose",
        "generate",
        "eval",
        "data",
        "compare",
        "depth-sweep",
        "bench",
        "export",
        "comm",
        "plan",
    }
    modules = {"depthmix": "depthmix", "torchrun": "torch.distributed.run"}
    for words in listed:
        ran = subprocess.run(
            [sys.executable, "-m", modules[words[0]], *words[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert ran.returncode == 0, (words, ran.stderr)
        assert ran.stdout.strip(), words
    assert (tmp_path / "runs/first/report.html").exists()
    assert (tmp_path / "runs/small/report.html").exists()
    assert (tmp_path / "runs/first-map.png").exists()
    assert (tmp_path / "runs/first-diagnosis/report.html").exists()
    assert (tmp_path / "runs/matched/report.html").exists()
    assert (tmp_path / "runs/depth/depth.html").exists()
    assert (tmp_path / "runs/four.safetensors").exists()
    assert (tmp_path / "runs/communication.png").exists()


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, environment, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_make_targets():
    """make test is what runs this; make demo is the comparison, with options the command line takes."""
    targets = [words[1] for words in commands("make ")]
    assert targets == [
        "demo", "test", "test-peers", "test-kernels", "test-integrations", "test-hf", "test-nodes", "gpu-check",
    ]  # fmt: skip
    planned = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "depthmix compare --recipe quick" in planned.stdout and "-m pytest" in planned.stdout
    assert "-m peers" in planned.stdout


def test_figures_are_those_of_the_files():
    """Every number in the two tables comes from the file named above it."""
    demo = json.loads((ROOT / "results/compare-quick.json").read_text(encoding="utf-8"))
    for entry in demo["residuals"]:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{entry['residual']}`"))
        assert f"{entry['parameters']:,.0f}" in row
        for key in ("train_loss", "val_loss"):
            assert f"{entry[key]:.4f}" in row
    steps = json.loads((ROOT / "benchmarks/results/training-step-cpu.json").read_text(encoding="utf-8"))
    for preset in steps["presets"]:
        start = f"| `{preset['preset']}`, {preset['tokens_per_step']:,} tokens |"
        line = next(line for line in README.splitlines() if line.startswith(start))
        for row in preset["rows"]:
            if row["residual"] != "prenorm":
                assert f"{row['ratio']:.2f}" in line


def test_figures_of_kernels_and_memory_are_those_of_the_files():
    words = " ".join(README.split())
    record = json.loads((ROOT / "benchmarks/results/ops-cpu.json").read_text(encoding="utf-8"))
    found = {}
    for problem in record["problems"]:
        if (problem["case"], problem["variant"]) == ("mgr-step", "competitive"):
            (row,) = (row for row in problem["rows"] if row["candidate"] == "depthmix")
            found[problem["n"]] = row["modes"]["both"]
    a, b = found[4], found[8]
    assert f"take {a['ms']:.0f} ms at n = 4 and {b['ms']:.0f} ms at n = 8" in words
    eager, compiled = ([1 / x["over"][k] for x in (a, b)] for k in ("eager", "compile"))
    assert "{:.0f} and {:.0f} times faster than the equations in plain torch".format(*eager) in words
    assert "{:.1f} and {:.1f} times faster than `torch.compile`".format(*compiled) in words
    assert f"{a['copies']:.1f} and {b['copies']:.1f} times the time of copying" in words
    kept = json.loads((ROOT / "benchmarks/results/stream-memory.json").read_text(encoding="utf-8"))
    ratio = {
        (row["n_streams"], row["stream_memory"]): f"{row['ratio']:.2f}"
        for row in kept["rows"]
        if row["precision"] == "fp32" and "stream_memory" in row
    }
    assert f"keeps {ratio[4, 'replay']} times what PreNorm keeps with n = 4" in words
    assert f"{ratio[8, 'replay']} times with n = 8" in words
    assert f"keeps {ratio[4, 'store']} and {ratio[8, 'store']} times" in words


def test_no_placeholder_is_left():
    assert "{{" not in README
