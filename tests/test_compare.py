import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from depthmix import GPT, available_residuals, cli, compare, flags
from depthmix.compare import Cell, Tail, _clock, print_table
from depthmix.config import from_dict
from depthmix.errors import UserError
from depthmix.presets import preset
from depthmix.report.reproduce import compare_command

FAKE = Path(__file__).parent / "report" / "fabricate.py"
SHORT = ["--steps", "8", "--eval-interval", "4", "--eval-tokens", "128"]


def fake_command(config_file, folder):
    real = compare_train_command(config_file, folder)
    assert real[:4] == [sys.executable, "-m", "depthmix", "train"]
    return [sys.executable, str(FAKE), *real[4:]]


compare_train_command = compare.train_command


@pytest.fixture
def fake_training(monkeypatch):
    """Cells are ``fabricate.py``; the data is not prepared."""
    monkeypatch.setattr(compare, "train_command", fake_command)
    monkeypatch.setattr(compare, "prepare_data", lambda config, again: None)
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.01)


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures, which take most of a report's time; the tables stay."""
    monkeypatch.setattr("depthmix.report.plots.png", lambda groups, baseline: b"")
    monkeypatch.setattr("depthmix.report.plots.svgs", lambda groups, baseline: [])


def results(out):
    return json.loads((out / "results.json").read_text())


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == "train"]


def test_whole_comparison(fake_training, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), "--seeds", "2", *SHORT]) == 0
    plan = json.loads((out / "compare.json").read_text())
    assert [cell["name"] for cell in plan["cells"]] == [
        f"{name}-s{seed}" for seed in (0, 1) for name in ("prenorm", "mgr-independent", "mgr-competitive")
    ]
    for cell in plan["cells"]:
        config = json.loads((out / cell["name"] / "config.json").read_text())
        assert (config["model"]["residual"], config["seed"]) == (cell["residual"], cell["seed"])
        shared = plan["config"]
        assert config["model"] | {"residual": ""} == shared["model"] | {"residual": ""}
        assert {**config, "model": 0, "seed": 0} == {**shared, "model": 0, "seed": 0}
        assert steps_of(out / cell["name"]) == list(range(1, 9))
    for name in ("report.html", "loss.png", "results.json"):
        assert (out / name).exists()
    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in printed
    assert "prenorm-s0: running" in printed or "prenorm-s0: finished" in printed
    rival = results(out)["residuals"][2]
    assert f"{rival['val_loss_difference']:+.4f}".replace("-", "−") in printed
    assert "2 paired seeds" in printed


def test_failed_cell_stays_in_its_row(fake_training, no_figures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_FAIL", "mgr-independent-s0")
    assert cli.main(["compare", "--out", str(out), *SHORT]) == 1
    said = capsys.readouterr()
    assert "mgr-independent-s0 failed: at step 7 of <this> run" in said.err
    assert "--resume" in said.err
    assert "mgr-independent (0 of 1 finished)" in said.out
    assert [run["status"] for run in results(out)["runs"]] == ["finished", "failed", "finished"]
    # Once the cause is gone, the same comparison goes on where that run stopped.
    monkeypatch.delenv("FAKE_FAIL")
    before = (out / "prenorm-s0" / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main(["compare", "--out", str(out), "--resume"]) == 0
    assert steps_of(out / "mgr-independent-s0") == list(range(1, 9))
    assert (out / "prenorm-s0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert [run["status"] for run in results(out)["runs"]] == ["finished"] * 3
    assert json.loads((out / "compare.json").read_text())["failures"] == {}


def test_killed_cell_says_so(fake_training, no_figures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_KILL", "prenorm-s0")
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), "--residuals", "prenorm,mgr-competitive", *SHORT]) == 1
    assert (
        "prenorm-s0 failed: ended by SIGKILL (often the system, when memory runs out)"
        in capsys.readouterr().err
    )


DRIVER = f"""
import sys
from depthmix import cli, compare
real = compare.train_command
compare.train_command = lambda config, folder: [sys.executable, {str(FAKE)!r}, *real(config, folder)[4:]]
compare.prepare_data = lambda config, again: None
compare.POLL_SECONDS = 0.02
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on(tmp_path, number):
    out = tmp_path / "out"
    arguments = ["compare", "--out", str(out), "--residuals", "prenorm,mgr-competitive", *SHORT]
    command = [sys.executable, "-c", DRIVER, *arguments]
    hold = tmp_path / "hold"
    hold.write_text("prenorm-s0")
    process = subprocess.Popen(
        command,
        env=os.environ | {"FAKE_HOLD": str(hold)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "prenorm-s0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, complaints = process.communicate(timeout=30)
    assert process.returncode == 75, complaints
    assert f"go on with: depthmix compare --out {out} --resume" in complaints
    assert "2 of 2 runs unfinished" in complaints
    assert "Traceback" not in complaints
    done = steps_of(out / "prenorm-s0")
    assert done == [1, 2]
    assert not (out / "mgr-competitive-s0").exists()
    again = subprocess.run(
        [sys.executable, "-c", DRIVER, "compare", "--out", str(out), "--resume"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    for name in ("prenorm-s0", "mgr-competitive-s0"):
        assert steps_of(out / name) == list(range(1, 9))


def test_second_comparison_in_the_same_folder_is_kept_away(fake_training, no_figures, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), *SHORT]) == 0
    descriptor = compare.lock_folder(out)
    try:
        assert cli.main(["compare", "--out", str(out), "--resume"]) == 2
        assert "still at work" in capsys.readouterr().err
    finally:
        os.close(descriptor)
    assert cli.main(["compare", "--out", str(out), "--resume"]) == 0


def test_folder_that_is_there_needs_resume(fake_training, no_figures, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert cli.main(["compare", "--out", str(tmp_path), *SHORT]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_resume_refuses_another_recipe_and_names_the_fields(fake_training, no_figures, tmp_path, capsys):
    out = tmp_path / "out"
    start = ["compare", "--out", str(out), "--residuals", "prenorm,mgr-competitive"]
    assert cli.main([*start, *SHORT]) == 0
    saved = (out / "compare.json").read_text()
    for options, expected in (
        (["--steps", "9"], "steps: 8 there, 9 now"),
        (["--lr", "0.5", "--n-layer", "3"], "optim.lr: 0.003 there, 0.5 now"),
        (["--recipe", "xs"], "recipe: quick there, xs now"),
        (["--residuals", "prenorm"], "residuals: mgr-competitive is there"),
    ):
        assert cli.main(["compare", "--out", str(out), "--resume", *options]) == 2
        assert expected in capsys.readouterr().err
    assert (out / "compare.json").read_text() == saved


SPECS = "prenorm,mgr-competitive:n_streams=2,mgr-review:gate=independent,mgr-competitive:n_streams=4"


def test_specs_are_cells_of_their_own(fake_training, no_figures, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), "--residuals", SPECS, *SHORT]) == 0
    names = ["prenorm", "mgr-competitive:n_streams=2", "mgr-review:gate=independent", "mgr-competitive"]
    plan = json.loads((out / "compare.json").read_text())
    assert plan["residuals"] == names  # four streams are what all have
    assert plan["config"]["model"]["n_streams"] == 4 and plan["config"]["model"]["residual_options"] == {}
    folders = ["prenorm", "mgr-competitive_n_streams-2", "mgr-review_gate-independent", "mgr-competitive"]
    assert [cell["name"] for cell in plan["cells"]] == [f"{folder}-s0" for folder in folders]
    built = [json.loads((out / f"{folder}-s0" / "config.json").read_text())["model"] for folder in folders]
    assert [(m["residual"], m["n_streams"], m["residual_options"]) for m in built] == [
        ("prenorm", 4, {}),
        ("mgr-competitive", 2, {}),
        ("mgr-review", 4, {"gate": "independent"}),
        ("mgr-competitive", 4, {}),
    ]
    assert [entry["residual"] for entry in results(out)["residuals"]] == names
    assert [entry["seeds"] for entry in results(out)["residuals"]] == [[0]] * 4
    page = (out / "report.html").read_text()
    printed = capsys.readouterr().out
    for name in names:
        assert name in page and name in printed
    # The saved plan goes on by itself, and a further spec may join it.
    assert cli.main(["compare", "--out", str(out), "--resume"]) == 0
    more = f"{SPECS},mgr-competitive:n_streams=8"
    assert cli.main(["compare", "--out", str(out), "--resume", "--residuals", more]) == 0
    assert [entry["seeds"] for entry in results(out)["residuals"]] == [[0]] * 5


def test_command_of_a_comparison_gives_its_plan_again():
    argv = ["--residuals", SPECS, "--seeds", "2", "--steps", "7", "--n-streams", "8", "--match-params"]
    again = None
    for _ in range(2):
        plan = compare.make_plan(flags.parse(compare.Compare, argv, "compare", compare._defaults(None, None)))
        assert again is None or plan == again
        again, argv = plan, shlex.split(compare_command(plan))[2:]
    assert plan["residuals"][-1] == "mgr-competitive:n_streams=4" and plan["seeds"] == 2


@pytest.mark.parametrize(
    "words, expected",
    [
        (["all"], available_residuals()),
        (["prenorm", "all"], available_residuals()),
        (["all,mgr-competitive:n_streams=2"], [*available_residuals(), "mgr-competitive:n_streams=2"]),
        # Written out, a connection stands where it is written.
        (["all", "prenorm"], [*available_residuals()[1:], "prenorm"]),
        (["mgr-review:score_scale=unit:gate=independent:n_streams=4"],
         ["mgr-review:score_scale=unit:gate=independent"]),
        (["mgr-competitive:gate_base_bias=-2"], ["mgr-competitive:gate_base_bias=-2.0"]),
    ],
)  # fmt: skip
def test_labels(words, expected):
    assert compare.labels(words, preset("quick").model) == expected


@pytest.mark.parametrize("residual", available_residuals())
def test_every_connection_survives_the_way_through_its_configuration_file(residual, tmp_path):
    """As a cell gets it: written by the comparison, read by ``train --config``."""
    plan = compare.make_plan(
        compare.Compare(flags.to_flags(preset("quick"), flags.SharedFlags), residuals=(residual,))
    )
    config = compare.cell_config(plan, plan["cells"][0])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    read = flags.load_config(path)
    args = flags.parse(cli.Train, [], "train", cli.Train(training=flags.to_flags(read)))
    assert flags.to_config(args.training) == config == read


def test_options_survive_the_way_through_the_configuration_file(tmp_path):
    model = dataclasses.replace(preset("quick").model, residual="mgr-review:gate=independent:n_streams=2")
    config = dataclasses.replace(preset("quick"), model=model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    args = flags.parse(cli.Train, [], "train", cli.Train(training=flags.to_flags(flags.load_config(path))))
    assert flags.to_config(args.training) == config
    assert model.label == "mgr-review:gate=independent"


def test_matched_parameters(fake_training, no_figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "prepare_data", lambda config, again: 320)
    out = tmp_path / "out"
    # At eight streams and eight sublayers Eq. 14 has no solution: that cell is not counted.
    start = ["compare", "--out", str(out), "--n-layer", "4", "--match-params", *SHORT]
    assert (
        cli.main([*start, "--residuals", "prenorm,mgr-review:n_streams=2,mgr-competitive:n_streams=8"]) == 0
    )
    plan = json.loads((out / "compare.json").read_text())
    assert list(plan["matched"]) == ["prenorm", "mgr-review:n_streams=2"]
    model = from_dict(plan["config"]).model
    counts = {
        name: sum(p.numel() for p in GPT(dataclasses.replace(model, residual=name), seed=0).parameters())
        for name in plan["matched"]
    }
    assert plan["target"] == max(counts.values())
    for cell in plan["cells"][:2]:
        config = json.loads((out / cell["name"] / "config.json").read_text())
        parameters = sum(p.numel() for p in GPT(from_dict(config).model, seed=0).parameters())
        assert abs(parameters / plan["target"] - 1) <= 0.01
    assert "within 1 %" in capsys.readouterr().out
    # What joins is matched to the same target; without matching it would be another experiment.
    more = [
        "--residuals",
        "prenorm,mgr-review:n_streams=2,mgr-competitive:n_streams=8,mgr-review:n_streams=3",
    ]
    assert cli.main(["compare", "--out", str(out), "--resume", *more]) == 0
    later = json.loads((out / "compare.json").read_text())
    assert later["target"] == plan["target"] and len(later["matched"]) == 3
    assert cli.main(["compare", "--out", str(out), "--resume", "--no-match-params"]) == 2
    assert "match_params" in capsys.readouterr().err


def test_widths_that_cannot_be_found_leave_nothing(fake_training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "prepare_data", lambda config, again: 320)

    def refuse(config, target):
        raise UserError("no width")

    monkeypatch.setattr("depthmix.match.match_params", refuse)
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), "--match-params"]) == 2
    assert "no width" in capsys.readouterr().err and not out.exists()


def test_seeds_may_join(fake_training, no_figures, tmp_path):
    out = tmp_path / "out"
    start = ["compare", "--out", str(out), "--residuals", "prenorm", "mgr-competitive"]
    assert cli.main([*start, *SHORT]) == 0
    assert cli.main(["compare", "--out", str(out), "--resume", "--seeds", "2"]) == 0
    assert results(out)["residuals"][1]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--residuals", "prenorm,mgr-competetive"], "Did you mean 'mgr-competitive'?"),
        (["--residuals", "prenorm,prenorm"], "names prenorm more than once"),
        (["--residuals", "all,prenorm,all"], "all more than once"),
        (
            ["--residuals", "mgr-review,mgr-review:gate=competitive"],
            "(mgr-review and mgr-review:gate=competitive mean the same)",
        ),
        (["--residuals", "mgr-competitive,mgr-competitive:n_streams=4"], "mean the same"),
        (["--residuals", "prenorm:n_streams=2"], "has no option 'n_streams'"),
        (["--residuals", "mgr-competitive:n_streams=two"], "must be a whole number"),
        (["--residuals", "mgr-competitive:n_streams=65"], "between 1 and 64"),
        (["--residuals", ","], "names no residual"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--recipe", "quik"], "Did you mean 'quick'?"),
        (["--residual", "prenorm"], "--residuals"),
    ],
)
def test_wrong_requests_leave_nothing(fake_training, tmp_path, capsys, options, message):
    assert cli.main(["compare", "--out", str(tmp_path / "out"), *options]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert not (tmp_path / "out").exists()


def test_what_alters_no_result_may_change(fake_training, no_figures, tmp_path):
    out = tmp_path / "out"
    start = ["compare", "--out", str(out), "--residuals", "prenorm"]
    assert cli.main([*start, *SHORT]) == 0
    assert cli.main(["compare", "--out", str(out), "--resume", "--device", "cpu", "--keep-last", "1"]) == 0
    assert json.loads((out / "compare.json").read_text())["config"]["device"] == "cpu"


def test_resume_of_what_was_killed_before_its_plan_and_of_an_older_version(
    fake_training, no_figures, tmp_path
):
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    assert cli.main(["compare", "--out", str(out), "--resume", "--residuals", "prenorm", *SHORT]) == 0
    plan = json.loads((out / "compare.json").read_text())
    del plan["config"]["model"]["norm_eps"]
    (out / "compare.json").write_text(json.dumps(plan))
    assert cli.main(["compare", "--out", str(out), "--resume"]) == 0


@pytest.mark.slow
def test_real_runs_from_comparison_to_generated_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{k} and {k} make {2 * k}.\n" for k in range(20_000)))
    out = tmp_path / "out"
    tiny = ["--n-layer", "2", "--d-model", "16", "--seq-len", "16", "--batch-size", "2", "--steps", "6"]
    sparse = ["--eval-interval", "3", "--eval-tokens", "64", "--cache-dir", str(tmp_path / "cache")]
    assert (
        cli.main(["compare", "--out", str(out), "--data", str(text), "--device", "cpu", *tiny, *sparse]) == 0
    )
    rows = results(out)["runs"]
    assert [row["status"] for row in rows] == ["finished"] * 3
    # Same embedding and sublayers, same first batch; PreNorm and MGR differ from the first sum on.
    assert len({row["parameters"] for row in rows}) == 3
    firsts = [
        json.loads((out / f"{row['residual']}-s0" / "metrics.jsonl").read_text().splitlines()[0])
        for row in rows
    ]
    assert [line["tokens"] for line in firsts] == [32] * 3
    assert all((out / f"{row['residual']}-s0" / "report.html").exists() for row in rows)
    capsys.readouterr()
    arguments = [
        "generate",
        str(out / "mgr-competitive-s0"),
        "--prompt",
        "7 and ",
        "--tokens",
        "9",
        "--seed",
        "1",
    ]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("7 and ")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_tail_reads_whole_lines_once_and_notices_a_cut_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.read() == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert tail.read() == [{"step": 3}]
    path.write_text('{"step": 1}\n')
    assert tail.read() == [{"step": 1}]


def test_time_left(tmp_path):
    plan = {
        "config": {"steps": 100},
        "cells": [
            {"name": f"{r}-s{s}", "residual": r, "seed": s} for s in (0, 1) for r in ("prenorm", "mgr")
        ],
    }
    runner = compare.Runner(tmp_path, plan, "", 0)
    a, b, _, _ = runner.cells
    assert runner.total_left() is None
    a.state, a.seconds_per_step = "finished", 1.0
    b.state, b.step, b.seconds_per_step = "running", 40, 2.0
    # 60 steps of b, 100 at prenorm's pace, 100 at mgr's.
    assert runner.total_left() == 60 * 2.0 + 100 * 1.0 + 100 * 2.0
    assert [_clock(s) for s in (None, 0, 59.2, 3599.5)] == ["…", "0:00", "1:00", "1:00:00"]


def test_display_keeps_the_active_run_in_sight(tmp_path):
    cells = [{"name": f"prenorm-s{s}", "residual": "prenorm", "seed": s} for s in range(40)]
    runner = compare.Runner(tmp_path, {"config": {"steps": 9}, "cells": cells}, "", 0)
    display = compare._display(runner)
    display.console = Console(width=80, height=20, file=io.StringIO())
    assert len(display._visible()) == 40
    runner.active = ["running"]
    for active in (0, 20, 39):
        runner.cells[active].state = "running"
        seen = display._visible()
        assert runner.cells[active] in seen and len(seen) == 13
        display.console.print(display._table())
        assert f"prenorm-s{active} " in display.console.file.getvalue()


def test_train_loss_shown_is_the_mean_of_the_last_twenty_steps():
    assert Cell("", "", 0, 1).train_loss is None
    assert Cell("", "", 0, 1, train_losses=[100.0] + [1.0] * 10 + [3.0] * 10).train_loss == 2.0


@pytest.mark.parametrize("width", [60, 80, 140])
def test_table_fits_the_terminal(fake_training, no_figures, tmp_path, width, capsys):
    out = tmp_path / "out"
    cli.main(["compare", "--out", str(out), *SHORT])
    screen = io.StringIO()
    print_table(results(out), Console(file=screen, width=width, force_terminal=True, no_color=True))
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert max(map(len, text.splitlines())) <= width
    for number in ("1,000", "1,100", "300", "5,000", "1.50"):
        assert number in text
