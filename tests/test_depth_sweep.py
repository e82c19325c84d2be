import collections
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from depthmix import GPT, available_residuals, cli, compare, depth_sweep, flags
from depthmix.config import DataConfig, from_dict
from depthmix.data import open_dataset, prepare
from depthmix.presets import preset
from depthmix.report import depth
from depthmix.report.reproduce import depth_sweep_command

FAKE = Path(__file__).parent / "report" / "fabricate.py"
SMALL = ["--sublayers", "8,4", "--residuals", "prenorm,mgr-competitive", "--steps", "30"]

real_train_command = compare.train_command


def fake_command(config_file, folder):
    return [sys.executable, str(FAKE), *real_train_command(config_file, folder)[4:]]


@pytest.fixture
def fake_training(monkeypatch):
    """Cells are ``fabricate.py``; the data is not prepared, and its unigram loss is 2.5."""
    monkeypatch.setattr(compare, "train_command", fake_command)
    monkeypatch.setattr(depth_sweep, "prepare_data", lambda config, again: 320)
    monkeypatch.setattr(depth_sweep, "unigram_loss", lambda config: 2.5)
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.01)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(depth, "_draw", lambda data, title, draw: (b"", "<svg></svg>"))


def sweep(out, *words):
    return cli.main(["depth-sweep", "--out", str(out), *words])


def cells(out):
    return json.loads((out / "depth.json").read_text())["cells"]


def formula(fake, label, seed=0, steps=30):
    return [fake.train_loss(label, seed, step) for step in range(1, steps + 1)]


@pytest.fixture(scope="module")
def fake():
    import importlib.util

    spec = importlib.util.spec_from_file_location("fabricate", FAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whole_sweep(fake_training, fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep(out, *SMALL, "--seeds", "2", "--jobs", "2") == 0
    data = json.loads((out / "depth.json").read_text())
    labels = ["prenorm", "mgr-competitive"]
    assert data["residuals"] == labels and data["sublayers"] == [4, 8] and data["unigram_loss"] == 2.5
    assert [(c["seed"], c["sublayers"], c["label"]) for c in data["cells"]] == [
        (seed, size, label) for seed in (0, 1) for size in (4, 8) for label in labels
    ]
    for cell in data["cells"]:
        config = json.loads((out / cell["name"] / "config.json").read_text())
        assert config["model"]["n_layer"] == cell["sublayers"] // 2
        assert (config["model"]["residual"], config["seed"]) == (cell["label"], cell["seed"])
        # Side by side, each run has one thread.
        environment = json.loads((out / cell["name"] / "environment.json").read_text())
        assert environment["threads"] == "1"
        losses = formula(fake, cell["label"], cell["seed"])
        assert cell["initial_loss"] == losses[0] and cell["largest_loss"] == max(losses)
        assert cell["train_loss"] == pytest.approx(statistics.fmean(losses[-20:]))
        assert cell["val_loss"] == fake.val_loss(cell["label"], cell["seed"], 30)
        norms = [0.1 / step for step in range(1, 31)]
        assert cell["gradient_first"]["initial"] == norms[0]
        assert cell["gradient_first"]["median"] == pytest.approx(statistics.median(norms))
        assert cell["gradient_first"]["final"] == pytest.approx(statistics.median(norms[-20:]))
        assert cell["status"] == "finished"
    # What is said of the connection is what the model is built with.
    start = next(c for c in data["cells"] if c["name"] == "mgr-competitive-L8-s0")
    config = from_dict(json.loads((out / start["name"] / "config.json").read_text())).model
    model = GPT(config, seed=0)
    assert start["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < start["connection_parameters"] < start["parameters"]
    bias = model.blocks[-1].mlp_site.gate_bias
    assert start["initial_bias"] == {"gate_bias": [0.0, bias.max().item()]} and bias.max() > 1
    assert start["options"]["n_streams"] == 4 and start["options"]["gate_base_bias"] == -3.0
    printed = capsys.readouterr().out
    mean = statistics.fmean(c["train_loss"] for c in data["cells"] if c["name"].startswith("prenorm-L4"))
    assert f"{mean:.3f}" in printed and f"{start['parameters']:,}" in printed
    assert "prenorm-L4-s0: finished" in printed
    for name in ("depth-loss.png", "depth-gradient.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "depth.html").read_text()
    assert page.count("<svg") == 2 and "currentColor" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_redraw_needs_depth_json_alone(fake_training, fake, tmp_path, capsys):
    assert sweep(tmp_path / "out", *SMALL) == 0
    before = capsys.readouterr().out
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "out" / "depth.json", alone)
    assert sweep(alone, "--redraw") == 0
    after = capsys.readouterr().out
    assert before.endswith(after.replace(str(alone), str(tmp_path / "out")))
    for name in ("depth-loss.png", "depth-gradient.png"):
        assert (alone / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert sweep(tmp_path, "--redraw") == 2
    assert "holds no depth.json" in capsys.readouterr().err


def test_failed_and_diverged_cells(fake_training, no_figures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "mgr-competitive-L4-s0")
    monkeypatch.setenv("FAKE_DIVERGE", "prenorm-L8-s0")
    out = tmp_path / "out"
    assert sweep(out, *SMALL) == 1
    said = capsys.readouterr()
    assert "mgr-competitive-L4-s0 failed: at step 7 of <this> run" in said.err
    assert "prenorm-L8-s0 failed" not in said.err
    assert "prenorm: diverged at 8 sublayers" in said.out
    assert {c["name"]: c["status"] for c in cells(out)} == {
        "prenorm-L4-s0": "finished",
        "mgr-competitive-L4-s0": "failed",
        "prenorm-L8-s0": "diverged",
        "mgr-competitive-L8-s0": "finished",
    }
    page = (out / "depth.html").read_text()
    assert "at step 7 of &lt;this&gt; run" in page and "step 15 is nan" in page
    # A failure is tried again, a divergence is a result.
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.delenv("FAKE_DIVERGE")
    assert sweep(out, "--resume") == 0
    assert [c["status"] for c in cells(out)] == ["finished", "finished", "diverged", "finished"]
    assert cells(out)[2]["verdict"] == "diverged" and cells(out)[2]["steps"] == 15


DRIVER = f"""
import sys
from depthmix import cli, compare, depth_sweep
from depthmix.report import depth
real = compare.train_command
compare.train_command = lambda config, folder: [sys.executable, {str(FAKE)!r}, *real(config, folder)[4:]]
depth_sweep.prepare_data = lambda config, again: 320
depth_sweep.unigram_loss = lambda config: 2.5
depth._draw = lambda data, title, draw: (b"", "")
compare.POLL_SECONDS = 0.02
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_resume_after_the_end_of_the_command(fake_training, no_figures, fake, tmp_path, capsys, number):
    """Two runs at work: SIGTERM reaches both; after SIGKILL they end by themselves, holding the folder."""
    out = tmp_path / "out"
    words = ["depth-sweep", "--out", str(out), *SMALL, "--jobs", "2"]
    hold = tmp_path / "hold"
    hold.write_text("prenorm-L8-s0 mgr-competitive-L8-s0")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *words],
        env=os.environ | {"FAKE_HOLD": str(hold)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The second pair of four has begun.
    second = [out / f"{name}-L8-s0" / "metrics.jsonl" for name in ("prenorm", "mgr-competitive")]
    while not all(path.exists() and path.read_text().count("\n") >= 2 for path in second):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, complaints = process.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert process.returncode == 75, complaints
        assert f"go on with: depthmix depth-sweep --out {out} --resume --jobs 2" in complaints
        assert "2 of 4 runs unfinished" in complaints
        assert all(path.read_text().count("\n") == 2 for path in second)
    else:
        assert sweep(out, "--resume") == 2
        assert "still at work" in capsys.readouterr().err
    hold.unlink()
    first = out / "prenorm-L4-s0" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    for _ in range(200):
        try:
            os.close(compare.lock_folder(out))
            break
        except ValueError:
            time.sleep(0.1)
    assert sweep(out, "--resume") == 0
    assert first.stat().st_mtime_ns == before
    assert [cell["status"] for cell in cells(out)] == ["finished"] * 4
    assert [cell["steps"] for cell in cells(out)] == [30] * 4
    whole = formula(fake, "mgr-competitive")
    assert cells(out)[3]["train_loss"] == pytest.approx(statistics.fmean(whole[-20:]))


def test_depth_json_alone_is_extended(fake_training, no_figures, tmp_path, capsys):
    """Rows whose run folders are gone stay as they are; only what is new is run."""
    assert sweep(tmp_path / "first", *SMALL) == 0
    other = tmp_path / "second"
    other.mkdir()
    shutil.copy(tmp_path / "first/depth.json", other)
    assert sweep(other, "--resume", "--residuals", "prenorm,mgr-competitive,attnres") == 0
    before, after = (cells(tmp_path / name) for name in ("first", "second"))
    assert [row for row in after if row["label"] != "attnres"] == before
    assert [row["status"] for row in after] == ["finished"] * 6
    ran = {path.name for path in other.iterdir() if path.is_dir()}
    assert ran == {"cells", "attnres-L4-s0", "attnres-L8-s0"}
    assert sweep(other, "--resume", "--steps", "31") == 2
    assert "steps: 30 there, 31 now" in capsys.readouterr().err


def test_resume_takes_more_and_refuses_other(fake_training, no_figures, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep(out, *SMALL) == 0
    for words, message in (
        ([], "--resume goes on with the sweep in it"),
        (["--resume", "--steps", "31"], "steps: 30 there, 31 now"),
        (["--resume", "--sublayers", "4"], "holds a sweep with 8 sublayers too"),
        (["--resume", "--residuals", "prenorm"], "mgr-competitive is there"),
    ):
        assert sweep(out, *words) == 2
        assert message in capsys.readouterr().err
    more = ["--sublayers", "2,4,8", "--residuals", "prenorm,mgr-competitive,mgr-competitive:n_streams=2"]
    assert sweep(out, "--resume", *more, "--seeds", "2") == 0
    assert [cell["status"] for cell in cells(out)] == ["finished"] * 18
    assert sweep(out, "--resume") == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sublayers", "8,7"], "even numbers of at least 2 (a block is an attention and an MLP), got '7'"),
        (["--sublayers", "0"], "got '0'"),
        (["--sublayers", "8,8"], "more than once: 8, 8"),
        (["--sublayers", ","], "names no depth"),
        (["--residuals", "prenrom"], "Did you mean 'prenorm'?"),
        (["--residuals", "prenorm:bias=1"], "has no option"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--threads-per-run", "0"], "--threads-per-run must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--n-layer", "3"], "--n-layer"),
    ],
)
def test_wrong_requests_leave_nothing(fake_training, tmp_path, capsys, words, message):
    assert sweep(tmp_path / "out", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_all_means_every_connection_and_the_command_gives_the_plan_again():
    argv = ["--residuals", "all,mgr-competitive:n_streams=2", "--seeds", "2", "--lr", "0.001", "--steps", "7"]
    again = None
    for _ in range(2):
        args = flags.parse(depth_sweep.DepthSweep, argv, "depth-sweep", depth_sweep._defaults(None))
        plan = depth_sweep.make_plan(args)
        assert again is None or plan == again
        again, argv = plan, shlex.split(depth_sweep_command(plan))[2:]
    assert plan["residuals"] == [*available_residuals(), "mgr-competitive:n_streams=2"]
    assert plan["sublayers"] == [8, 16, 32, 64, 96]


def test_unigram_loss_is_that_of_the_frequencies(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text("the gate opens " * (number + 3))
    data = DataConfig(data=(str(tmp_path / "text"),), cache_dir=str(tmp_path / "cache"), val_fraction=0.3)
    tokens = open_dataset(prepare(data)).train
    counts = collections.Counter(np.array(tokens.read(0, len(tokens))).tolist())
    assert len(counts) > 8 and 256 in counts  # letters, and the end of a document
    entropy = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    config = dataclasses.replace(preset("depth"), data=data)
    assert depth_sweep.unigram_loss(config) == pytest.approx(entropy, rel=1e-12)


def cell(label, final, sublayers=8, seed=0, status="finished", initial=5.5):
    return {
        "label": label, "sublayers": sublayers, "seed": seed, "status": status, "name": f"{label}-{sublayers}",
        "initial_loss": initial, "train_loss": final, "val_loss": final, "largest_loss": initial, "steps": 30,
        "parameters": 1000, "connection_parameters": 10, "initial_bias": {}, "error": "why",
        "gradient_first": {"initial": 0.5, "median": 1e-9 if label == "highway" else 0.1, "final": 0.1},
    }  # fmt: skip


def sweep_data(rows, unigram=3.0):
    residuals = list(dict.fromkeys(row["label"] for row in rows))
    data = {
        "residuals": residuals, "sublayers": sorted({row["sublayers"] for row in rows}), "seeds": 1,
        "unigram_loss": unigram, "cells": rows, "config": preset("depth").to_dict(), "environment": {},
    }  # fmt: skip
    depth.judge(data)
    return data


@pytest.mark.parametrize(
    "row, verdict",
    [
        (cell("review", 2.2), "learns"),
        (cell("review", 2.5), "learns"),  # exactly half of PreNorm's gain of 1
        (cell("review", 2.51), "slow"),
        (cell("review", 2.999), "slow"),
        (cell("review", 3.0), "stalled"),
        (cell("review", 5.5), "stalled"),
        (cell("review", 5.6), "diverged"),
        (cell("review", 2.2, status="diverged"), "diverged"),
        (cell("review", 2.2, status="failed"), None),
        (cell("review", 2.9, sublayers=16), "learns"),  # PreNorm is not there at this depth
        (cell("review", 2.9, seed=1), "learns"),
    ],
)
def test_verdicts(row, verdict):
    assert sweep_data([cell("prenorm", 2.0), row])["cells"][1]["verdict"] == verdict


def test_prenorm_that_stalls_is_no_measure():
    data = sweep_data([cell("prenorm", 3.2), cell("review", 2.9), cell("highway", 3.1)])
    assert [row["verdict"] for row in data["cells"]] == ["stalled", "learns", "stalled"]


def test_statements_name_depths_and_seeds():
    rows = [cell("prenorm", 2.0, size, seed) for size in (8, 96) for seed in (0, 1)]
    rows += [cell("highway", 3.1, 96, 0), cell("highway", 2.1, 96, 1), cell("highway", 2.6, 8, 0)]
    rows += [cell("highway", 2.6, 8, 1)]
    assert depth.statements(sweep_data(rows)) == [
        "highway: slow at 8; stalled at 96 (1 of 2 seeds) sublayers.",
        "Learn at every depth: prenorm.",
    ]


def test_many_connections_look_different():
    names = (
        "mgr-independent mgr-competitive mgr-review attnres attnres-block hc-static hc mhc mhc-lite highway"
    )
    names += " highway-additive review review-convex denseformer siamese moda attnres-block:blocks=8 hc:n_streams=2"
    names += " review-convex:bias=-1.0 review-convex:bias=-2.0 review-convex:bias=-3.0 something-new"
    labels = ["prenorm", *names.split()]
    looks = depth.looks(labels, "#000000")
    assert list(looks) == labels and len(set(looks.values())) == len(labels)
    assert looks["prenorm"][0] == "#000000"
    family = [looks[name][0] for name in ("hc", "mhc", "hc-static", "mhc-lite", "hc:n_streams=2")]
    assert len(set(family)) == 1
    assert len({look[0] for look in looks.values()}) == 10


def test_figures_with_gaps_zeros_and_a_loss_out_of_sight(tmp_path):
    rows = [cell("prenorm", 2.0), cell("prenorm", 2.1, 96), cell("review", 900.0, 96), cell("highway", 3.0)]
    rows += [cell("highway", None, 96, status="failed"), cell("review", 2.0)]
    rows[0]["gradient_first"]["median"] = 0.0  # nothing to show on a logarithmic axis
    for name in ("train_loss", "val_loss", "initial_loss", "largest_loss", "parameters"):
        rows[4][name] = None
    rows[4]["gradient_first"] = dict.fromkeys(("initial", "median", "final"))
    (tmp_path / "depth.json").write_text(json.dumps(sweep_data(rows)))
    page = depth.write_depth_report(tmp_path)
    assert "failed" in page.read_text() and "900.000 diverged" in page.read_text()


@pytest.mark.slow
def test_real_runs(tmp_path, capsys):
    """Nothing faked: one connection that learns, and one whose gates have no initial bias at this depth."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{k} and {k} make {2 * k}.\n" for k in range(20_000)))
    out = tmp_path / "out"
    tiny = {"--d-model": 16, "--seq-len": 16, "--batch-size": 4, "--steps": 60, "--eval-tokens": 256}
    where = {"--data": text, "--cache-dir": tmp_path / "cache", "--device": "cpu", "--sublayers": 4}
    words = [str(word) for pair in (tiny | where).items() for word in pair]
    blind = "mgr-competitive:gate_base_bias=0"
    assert sweep(out, *words, "--residuals", f"prenorm,{blind}", "--jobs", "2") == 1
    said = capsys.readouterr()
    assert "Eq. 14" in said.err
    by_name = {row["name"]: row for row in cells(out)}
    assert by_name["mgr-competitive_gate_base_bias-0.0-L4-s0"]["status"] == "failed"
    learned = by_name["prenorm-L4-s0"]
    assert learned["verdict"] in ("learns", "slow", "stalled")
    assert learned["train_loss"] < learned["initial_loss"] - 1
    assert learned["gradient_first"]["median"] > 0
    assert not (out / "prenorm-L4-s0" / "checkpoints").exists()
    assert not (out / "prenorm-L4-s0" / "report.html").exists()
    assert (out / "depth.html").exists()
