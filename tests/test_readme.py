"""Commands and code of README and tutorial run as they stand; the README's figures are those of the files it names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import warm

ROOT = Path(__file__).parents[1]
MODULES = {"depthmix": "depthmix", "torchrun": "torch.distributed.run"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(first_word):
    lines = [line.split("   #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(first_word)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "DEPTHMIX_CACHE": warm.cache(tmp_path_factory.mktemp("cache"))}


def run(words, folder, environment):
    ran = warm.run(["-m", MODULES[words[0]], *words[1:]], cwd=folder, env=environment, timeout=600)
    assert ran.returncode == 0, (words, ran.stderr)
    assert ran.stdout.strip(), words


@pytest.fixture(scope="module")
def readers_folder(environment, tmp_path_factory):
    """Where the README's commands ran, in order, as a reader would type them."""
    folder = tmp_path_factory.mktemp("reader")
    for words in commands(("depthmix ", "torchrun ")):
        run(words, folder, environment)
    return folder


@pytest.mark.slow
def test_command_line(readers_folder):
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
    made = (
        "first/report.html", "small/report.html", "first-map.png", "first-diagnosis/report.html",
        "matched/report.html", "depth/depth.html", "four.safetensors", "communication.png",
    )  # fmt: skip
    assert [name for name in made if not (readers_folder / "runs" / name).exists()] == []


def without_place(words):
    """A command but for where it writes, and that place."""
    if "--out" not in words:
        return tuple(words), None
    at = words.index("--out")
    return (*words[:at], *words[at + 2 :]), words[at + 1]


@pytest.mark.slow
def test_commands_of_the_tutorial(readers_folder, environment, tmp_path):
    """In order and in one folder; what the README has word for word, but for ``--out``, has run and is copied."""
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    assert len(lines) >= 9
    done = dict(without_place(words) for words in commands(("depthmix ", "torchrun ")))
    copied = 0
    for line in lines:
        words = shlex.split(line)
        if words[0] not in MODULES:
            subprocess.run(["bash", "-euc", line], cwd=tmp_path, check=True, timeout=300)
            continue
        command, place = without_place(words)
        if place is not None and done.get(command):
            source, target = readers_folder / done[command], tmp_path / place
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            copied += 1
        else:
            run(words, tmp_path, environment)
    assert copied >= 2
    assert (tmp_path / "runs/first-map.png").read_bytes().startswith(b"\x89PNG")
    assert "mgr-competitive" in (tmp_path / "runs/compared/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, environment, tmp_path):
    ran = warm.run(["-c", code], cwd=tmp_path, env=environment)
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
