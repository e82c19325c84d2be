"""``depthmix map`` on runs that were really trained, and the maps that a comparison leaves for its report."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from depthmix import MixingMap, cli, mixing_map
from depthmix.checkpoint import load_model
from depthmix.compare import Cell, Runner
from depthmix.map_command import save_run_map
from depthmix.residuals.prenorm import PreNorm

SEQ_LEN = 32


def draw(capsys, *arguments):
    """Exit status, standard output and standard error; nothing is written to the reader's folder."""
    status = cli.main(["map", *map(str, arguments), "--device", "cpu"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def pixels(path):
    import matplotlib.image

    assert Path(path).read_bytes().startswith(b"\x89PNG")
    return matplotlib.image.imread(path)


def test_two_runs(trained, tmp_path, capsys):
    out = tmp_path / "maps" / "both.png"
    runs = [trained / "prenorm", trained / "mgr-competitive"]
    status, said, err = draw(capsys, *runs, "--tokens", "100", "--out", out, "--npz")
    assert (status, err) == (0, "")
    image = pixels(out)
    assert image.shape[0] > 900 and image.shape[1] > 1000 and image[..., :3].std() > 0.1
    prenorm, mgr = (MixingMap.load(out.with_name(f"both-{run.name}.npz")) for run in runs)
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "both-mgr-competitive.npz", "both-prenorm.npz", "both.png",
    ]  # fmt: skip
    assert torch.equal(prenorm.matrix, torch.ones(7, 7).tril())
    assert prenorm.n_tokens == mgr.n_tokens == 128  # whole sequences
    # The same tokens, read here from the shards themselves.
    model, _ = load_model(runs[1])
    (shard,) = (trained / "cache").rglob("val*.bin")
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    ids = np.fromfile(shard, dtype=manifest["dtype"], count=128).astype(np.int64)
    torch.testing.assert_close(mixing_map(model, torch.from_numpy(ids).view(4, SEQ_LEN)).matrix, mgr.matrix)
    for run in runs:
        (line,) = (line for line in said.splitlines() if line.startswith(f" {run.name} "))
        share = (prenorm if run.name == "prenorm" else mgr).embedding_share
        assert line.split()[1] == f"{share:.1%}"
        assert float(line.split()[-1]) < 1e-5
    assert f"written: {out}" in said


def test_one_run_by_its_checkpoint(trained, tmp_path, capsys):
    checkpoint = trained / "mgr-competitive" / "checkpoints" / "step-00000002"
    assert checkpoint.is_dir()
    assert draw(capsys, checkpoint, "--out", tmp_path / "a.png", "--npz")[0] == 0
    assert pixels(tmp_path / "a.png").shape[1] > pixels(tmp_path / "a.png").shape[0]
    model, _ = load_model(checkpoint)
    last, _ = load_model(checkpoint.with_name("step-00000004"))
    found = MixingMap.load(tmp_path / "a-mgr-competitive.npz")
    ids = torch.randint(0, 256, (2, SEQ_LEN))
    assert not torch.equal(mixing_map(model, ids).matrix, mixing_map(last, ids).matrix)
    assert found.residual == "mgr-competitive"


def test_what_has_no_map_stops_nobody(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PreNorm, "not_linear", "it is not linear for this test")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "a.png"
    status, said, err = draw(
        capsys, trained / "prenorm", empty, trained / "mgr-competitive", "--out", out, "--tokens", "32"
    )
    assert status == 0 and out.exists() and " mgr-competitive " in said and " prenorm " not in said
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        f"depthmix: no map of {trained / 'prenorm'}: prenorm has no mixing map: it is not"
    )
    assert lines[1].startswith(f"depthmix: no map of {empty}: {empty} holds no checkpoint")


def test_none_could_be_drawn(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PreNorm, "not_linear", "it is not linear for this test")
    out = tmp_path / "new" / "a.png"
    status, said, err = draw(capsys, trained / "prenorm", "--out", out)
    assert status == 2 and said == "" and not out.parent.exists()
    assert "Connections that have one: mgr-independent, mgr-competitive" in err


def test_damaged_run(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "prenorm", copy)
    for file in copy.rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    status, _, err = draw(capsys, copy, trained / "prenorm", "--out", tmp_path / "a.png", "--tokens", "32")
    assert status == 0 and f"no map of {copy}: checkpoint" in err


def test_gates_that_are_not_finite(trained, tmp_path, capsys, monkeypatch):
    from depthmix.residuals import mgr

    whole = mgr.LerpSite.gates
    monkeypatch.setattr(mgr.LerpSite, "gates", lambda *args: tuple(g * float("nan") for g in whole(*args)))
    runs = trained / "mgr-competitive", trained / "prenorm"
    status, said, err = draw(capsys, *runs, "--out", tmp_path / "a.png", "--tokens", "32")
    assert status == 0 and "not finite on these tokens" in err and " prenorm " in said


def test_untrained(tmp_path, capsys):
    out = tmp_path / "a.png"
    status, _, err = draw(
        capsys, "--residual", "prenorm,mgr-competitive:n_streams=2", "mgr-review:gate=independent",
        "--tokens", "1", "--npz", "--out", out,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-mgr-competitive.npz", "a-mgr-review-gate=independent.npz", "a-prenorm.npz", "a.png",
    ]  # fmt: skip
    found = MixingMap.load(tmp_path / "a-mgr-competitive.npz")
    # Untrained with two streams: the second sublayer's input is the mean of the first two sources.
    torch.testing.assert_close(found.matrix[1, :3], torch.tensor([0.5, 0.5, 0.0]))
    assert found.n_tokens == 128 and len(found.matrix) == 33


def test_equal_names_are_told_apart(trained, tmp_path, capsys):
    run, out = trained / "prenorm", tmp_path / "a.png"
    status, said, _ = draw(capsys, run, run, "--residual", "prenorm", "--tokens", "32", "--npz", "--out", out)
    assert status == 0
    for label in ("prenorm (prenorm) #1", "prenorm (prenorm) #2", "prenorm (untrained)"):
        assert label in said
    assert len({*tmp_path.glob("*.npz")}) == 3


def test_own_text_in_the_runs_tokens(trained, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("line 5: 25 abab\n" * 40)
    run, out = trained / "mgr-competitive", tmp_path / "a.png"
    assert draw(capsys, run, "--data", text, "--tokens", "33", "--out", out, "--npz")[0] == 0
    from depthmix.data import load_tokenizer

    tokenizer = load_tokenizer(json.loads((run / "tokenizer.json").read_text()))
    ids = torch.tensor(tokenizer.encode(text.read_text())[:64]).view(2, SEQ_LEN)
    expected = mixing_map(load_model(run)[0], ids)
    torch.testing.assert_close(MixingMap.load(tmp_path / "a-mgr-competitive.npz").matrix, expected.matrix)
    # Less than a sequence is one short sequence, with the end of the document.
    text.write_text("ab")
    assert draw(capsys, run, "--data", text, "--out", out, "--npz")[0] == 0
    assert MixingMap.load(tmp_path / "a-mgr-competitive.npz").n_tokens == len(tokenizer.encode("ab")) + 1


def test_folder_of_a_comparison(trained, tmp_path, capsys):
    plan = {"cells": [{"name": "mgr-competitive"}, {"name": "not-begun"}]}
    (tmp_path / "compare.json").write_text(json.dumps(plan))
    shutil.copytree(trained / "mgr-competitive", tmp_path / "mgr-competitive")
    status, said, err = draw(capsys, tmp_path, "--out", tmp_path / "a.png", "--tokens", "32")
    assert status == 0 and " mgr-competitive " in said
    assert err.startswith(f"depthmix: no map of {tmp_path / 'not-begun'}: ")


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ([], "give run folders, or --residual NAME for untrained models"),
        (["not/there"], "not/there is no folder"),
        (["--residual", "prenorm,mgr-competitve"], "Did you mean 'mgr-competitive'?"),
        (["--residual", "prenorm:n_streams=2"], "n_streams"),
        (["--residual", "prenorm", "--preset", "quik"], "Did you mean 'quick'?"),
        (["--residual", "prenorm", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--residual", "prenorm", "--out", "a.pdf"], "--out must end in .png, got 'a.pdf'"),
    ],
)
def test_wrong_requests(arguments, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["map", *arguments]) == 2
    said = capsys.readouterr()
    assert hint in said.err and said.out == "" and not [*tmp_path.iterdir()]


# --- the maps of a comparison ---------------------------------------------------------------------


def test_map_of_a_finished_run(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "mgr-competitive", run)
    path = save_run_map(run)
    assert path == run / "mixing-map.npz"
    assert MixingMap.load(path).residual == "mgr-competitive"
    path.write_bytes(b"kept")
    assert save_run_map(run).read_bytes() == b"kept"


def test_comparison_saves_the_map_of_each_connections_first_run(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PreNorm, "not_linear", "it is not linear for this test")
    cells = []
    for name in ("prenorm", "mgr-competitive"):
        for seed in (0, 1):
            shutil.copytree(trained / name, tmp_path / f"{name}-s{seed}")
            cells.append(Cell(f"{name}-s{seed}", name, seed, steps=4, state="finished"))
    cells += [Cell("mgr-review-s0", "mgr-review", 0, steps=4, state="failed")]
    Runner._save_maps(types.SimpleNamespace(cells=cells, out=tmp_path))
    assert [path.parent.name for path in tmp_path.rglob("mixing-map.npz")] == ["mgr-competitive-s0"]
    said = capsys.readouterr().err
    assert said.startswith(
        "depthmix: no mixing map of prenorm-s0: prenorm has no mixing map: it is not linear"
    )
    assert len(said.splitlines()) == 1
