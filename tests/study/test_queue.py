"""The queue with runs that are made up: what it runs, what it keeps, how it goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from depthmix import cli
from depthmix.errors import RunError, UserError
from depthmix.study import command, load, queue, read_records
from depthmix.study.page import page
from depthmix.study.tables import tables_of

from .conftest import STUDY

FAKE = Path(__file__).parent / "fake_cell.py"


@pytest.fixture
def fake_runs(monkeypatch):
    monkeypatch.setenv("THE_TEXT", "texts")
    monkeypatch.setattr(
        queue.StudyRunner,
        "command",
        lambda self, file, folder: [sys.executable, str(FAKE), str(file), str(folder)],
    )
    monkeypatch.setattr(command, "prepare_data", lambda config, again: 320)
    monkeypatch.setattr(command, "_check_test_split", lambda config: None)
    monkeypatch.setattr("depthmix.compare.POLL_SECONDS", 0.01)


def study(path, *words):
    return cli.main(["study", str(path), "--out", str(path.parents[1] / "out"), *words])


def records(path):
    return read_records(load(path).results)


def test_whole_study(fake_runs, study_file, capsys):
    """Rates are settled first, on the validation loss; then all else; nothing twice; the page says it."""
    path = study_file()
    assert study(path, "--plan") == 0
    assert "12 different runs, 0 of them done" in capsys.readouterr().out
    assert study(path, "--jobs", "2") == 0
    said = capsys.readouterr().out
    found = records(path)
    # 12 of rates; of main 9, of which the best point's 4 are there; of sizes 4 small ones.
    assert len(found) == 12 + 9 - 4 + 4
    lines = (path.parents[1] / "results/try/cpu.jsonl").read_text().splitlines()
    assert len(lines) == len(found)
    assert {record["side_by_side"] for record in found.values()} == {2}
    results = {result.table.name: result for result in tables_of(load(path), found)}
    assert {name: point.name for name, point in results["rates"].best.items()} == {
        "prenorm": "middle", "mgr-competitive": "middle",
    }  # fmt: skip
    assert all(result.done == result.wanted for result in results.values())
    row = results["main"].row("mgr-competitive")
    base = results["main"].row("prenorm")
    differences = [row.runs[s]["test_loss"] - base.runs[s]["test_loss"] for s in (0, 1, 2)]
    assert row.difference.mean == pytest.approx(sum(differences) / 3)
    assert not list((path.parents[1] / "out").glob("*/checkpoints"))
    assert "mgr-competitive" in said and "page:" in said
    text = (path.parents[1] / "docs/results/try.md").read_text()
    assert f"{base.mean('test_loss')[0]:.4f} ± " in text and "prenorm` in the table `rates` (middle)" in text
    assert (path.parents[1] / "docs/results/img/try-sizes.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing to do, the same page; also from the records alone.
    assert study(path) == 0
    assert "has its result already" in capsys.readouterr().out
    assert study(path, "--report") == 0
    assert (path.parents[1] / "docs/results/try.md").read_text() == text
    assert (path.parents[1] / "results/try/cpu.jsonl").read_text().splitlines() == lines


def test_tables_by_name_and_a_longer_study(fake_runs, study_file, capsys):
    path = study_file()
    assert study(path, "--tables", "rates") == 0
    assert len(records(path)) == 12
    assert study(path, "--tables", "ratse") == 2
    assert "Did you mean 'rates'" in capsys.readouterr().err
    study_file(STUDY.replace("seeds = 3", "seeds = 4"))
    assert study(path) == 0
    assert len(records(path)) == 12 + 12 - 4 + 4


def test_failed_and_diverged_runs(fake_runs, study_file, capsys, monkeypatch):
    path = study_file()
    cells = {use: cell for use, cell in load(path).uses(load(path).table("rates"))}
    names = {(use.row, use.point, use.seed): cell.name for use, cell in cells.items()}
    low, high = names["prenorm", "low", 0], names["prenorm", "high", 1]
    monkeypatch.setenv("FAKE_FAIL", low)
    monkeypatch.setenv("FAKE_DIVERGE", high)
    assert study(path) == 1
    said = capsys.readouterr()
    assert f"{low} failed: at step 7 of <this> run" in said.err
    # Nothing that waits for PreNorm's rates has begun.
    assert len(records(path)) == 11 and "1 diverged" in said.out
    monkeypatch.delenv("FAKE_FAIL")
    assert study(path) == 0
    found = records(path)
    assert len(found) == 12 + 9 - 4 + 4
    diverged = [record for record in found.values() if record.diverged]
    assert [record["name"] for record in diverged] == [high]
    assert diverged[0]["test_loss"] is None and diverged[0]["steps"] == 15


DRIVER = f"""
import sys
from depthmix import cli, compare
from depthmix.study import command, queue
queue.StudyRunner.command = lambda self, file, folder: [sys.executable, {str(FAKE)!r}, str(file), str(folder)]
command.prepare_data = lambda config, again: 320
command._check_test_split = lambda config: None
compare.POLL_SECONDS = 0.02
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_goes_on_after_any_end(fake_runs, study_file, tmp_path, capsys, number):
    path, out = study_file(), tmp_path / "out"
    rates = [cell for _, cell in load(path).uses(load(path).table("rates"))]
    hold = tmp_path / "hold"
    hold.write_text(" ".join(cell.name for cell in rates[2:4]))
    words = ["study", str(path), "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *words],
        env=os.environ | {"FAKE_HOLD": str(hold), "THE_TEXT": "texts"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    held = [out / cell.name / "metrics.jsonl" for cell in rates[2:4]]
    while not all(file.exists() and file.read_text().count('"train"') >= 2 for file in held):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 75, said
        assert f"go on with: depthmix study {path}" in said
    else:
        # The runs outlive it, and keep a second one away.
        assert study(path) == 2
        assert "still at work" in capsys.readouterr().err
    assert set(records(path)) == {cell.key for cell in rates[:2]}
    first = [out / cell.name / "metrics.jsonl" for cell in rates[:2]]
    before = [file.stat().st_mtime_ns for file in first]
    hold.unlink()
    end = time.monotonic() + 60
    while study(path) == 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(records(path)) == 12 + 9 - 4 + 4
    assert [file.stat().st_mtime_ns for file in first] == before
    for file in held:
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in steps if line["split"] == "train"] == list(range(1, 31))


def test_a_run_that_ended_without_its_line(fake_runs, study_file):
    """Killed between the run's end and the record: the folder is read, not run again."""
    path = study_file()
    assert study(path, "--tables", "rates") == 0
    file = path.parents[1] / "results/try/cpu.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:100])
    name = json.loads(lines[-2])["name"]
    metrics = path.parents[1] / "out" / name / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert study(path, "--tables", "rates") == 0
    assert metrics.stat().st_mtime_ns == before
    again = file.read_text().splitlines(keepends=True)

    def what(line):
        return {key: value for key, value in json.loads(line).items() if key not in ("ended", "commit")}

    assert [what(line) for line in again] == [what(line) for line in lines]


def test_records_of_another_text_are_refused(fake_runs, study_file):
    path = study_file()
    assert study(path, "--tables", "rates") == 0
    file = path.parents[1] / "results/try/cpu.jsonl"
    lines = file.read_text().splitlines()
    values = json.loads(lines[3])
    values["data"]["train"] = "other"
    file.write_text("\n".join([*lines[:3], json.dumps(values), *lines[4:]]) + "\n")
    with pytest.raises(UserError, match=r"line 4 .* made from other text"):
        records(path)
    file.write_text("\n".join([*lines[:3], lines[3][:50], *lines[4:]]) + "\n")
    with pytest.raises(RunError, match="line 4 is damaged"):
        records(path)


def test_records_of_several_machines(fake_runs, study_file):
    path = study_file()
    assert study(path, "--tables", "rates", "--results-file", "gpu.jsonl") == 0
    assert {record.file for record in records(path).values()} == {"gpu.jsonl"}
    assert study(path) == 0
    found = records(path)
    assert {record.file for record in found.values()} == {"cpu.jsonl", "gpu.jsonl"}
    text = page(load(path), found, tables_of(load(path), found), {})
    assert re.search(r"\[cpu.jsonl\].*\[gpu.jsonl\]", text)


def test_through_a_scheduler(fake_runs, study_file, tmp_path):
    """submitit's own local executor: jobs are processes that it starts."""
    path = study_file(STUDY[: STUDY.index("[[table]]\nname = \"main\"")].replace("seeds = 2", "seeds = 1"))  # fmt: skip
    assert study(path, "--jobs", "3", "--scheduler", "cluster=local", "timeout_min=5") == 0
    assert len(records(path)) == 6
    assert list((tmp_path / "out/jobs").glob("*_submission.sh")) or list((tmp_path / "out/jobs").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--devices", "0,0"], "each once"),
        (["--devices", "0,1,2", "--processes", "2"], "do not divide into groups of --processes 2"),
        (["--devices", "0", "--jobs", "2"], "--jobs is for the CPU"),
        (["--results-file", "a/b.jsonl"], "without a folder"),
        (["--scheduler", "cluster"], "takes key=value"),
        (["--scheduler", "cluster=local", "walltime=3"], "walltime"),
    ],
)
def test_wrong_requests(fake_runs, study_file, capsys, words, message):
    assert study(study_file(), *words) == 2
    assert message in capsys.readouterr().err


def test_places():
    def places(**values):
        return [place.variables for place in command._places(command.StudyCommand(Path("x"), **values))]

    assert places(jobs=2, threads_per_run=3) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert places(devices=("0,1",)) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert places(devices=("2", "3"), processes=2) == [{"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert places(jobs=2, scheduler=("cluster=slurm",)) == [{}, {}]


def test_a_text_without_a_test_part(study_file, tmp_path, monkeypatch, capsys):
    """A prepared folder has the splits that it has: refused before the first run."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("".join(f"line {number}\n" for number in range(9000)))
    assert cli.main(["data", "prepare", str(text), "--out", str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    path = study_file(STUDY.replace("$THE_TEXT/*.txt", "$THE_SHARDS"))
    monkeypatch.setenv("THE_SHARDS", str(tmp_path / "shards"))
    assert study(path) == 2
    assert "has no test split; prepare the text again with --test-fraction" in capsys.readouterr().err
    assert not records(path)
