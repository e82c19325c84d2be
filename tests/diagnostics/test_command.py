"""``depthmix diagnose`` on runs that were really trained."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch

from depthmix import GPT, GPTConfig, cli
from depthmix.diagnostics.arrays import Array, Diagnosis
from depthmix.diagnostics.run import PARTS, Extent, diagnose
from depthmix.diagnostics.subject import Run
from depthmix.errors import UserError

SMALL = "--texts 12 --length 16 --removal-texts 6 --gradient-texts 4 --batch 5 --device cpu".split()


def run(capsys, *arguments):
    status = cli.main(["diagnose", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_two_runs_side_by_side(trained, tmp_path, capsys):
    out = tmp_path / "report"
    status, said, errors = run(capsys, trained / "prenorm", trained / "mgr-competitive", "--out", out, *SMALL)
    assert status == 0 and not errors
    assert "prenorm" in said and "mgr-competitive" in said and str(out / "report.html") in said
    page = (out / "report.html").read_text()
    assert "mgr-competitive" in page and (out / "removal.png").stat().st_size > 1000
    for name in ("prenorm", "mgr-competitive"):
        found = Diagnosis.load(out / f"{name}.npz")
        assert found.text["texts"] == 12 and found.text["length"] == 16 and found.text["removal_texts"] == 6
        assert found["output_rms"].shape == (3,) and set(found.seconds) == set(PARTS)
        assert np.isfinite(found["gradient_rms"]).all()
        assert all(isinstance(word, str) for word in found.text["top_tokens"].values())
    assert "gate_mean" in found and "streams" not in found.missing  # the last is MGR
    assert found.subject["kept_because"] == {b: "it appends streams that later blocks read" for b in "01"}
    # The files alone are enough for the same report.
    again = tmp_path / "again"
    status, _, _ = run(capsys, out / "prenorm.npz", out / "mgr-competitive.npz", "--out", again)
    assert status == 0
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in out.iterdir())


def test_the_numbers_are_those_of_the_library(trained, tmp_path, capsys):
    """The same texts by hand give the loss that removal starts from, and twice the command gives the same file."""
    files = []
    for name in "ab":
        assert run(capsys, trained / "prenorm", "--out", tmp_path / name, "--skip", "mixing", *SMALL)[0] == 0
        files.append(Diagnosis.load(tmp_path / name / "prenorm.npz"))
    for key, array in files[0].arrays.items():
        np.testing.assert_array_equal(array.values, files[1][key])
    assert files[0].missing["mixing"] == "not asked for"
    from depthmix.runs import open_run, read_windows

    opened = open_run(trained / "prenorm", "cpu")
    texts = read_windows(opened, (), 16, 12 * 16)[:6]
    with torch.no_grad():
        losses = [opened.model(x[:, :-1], x[:, 1:])[1].item() for x in texts[:, None]]
    assert files[0]["removal_base"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_text_of_ones_own(trained, tmp_path, capsys):
    text = tmp_path / "own.txt"
    text.write_text("line 5: 25 abab\n" * 40)
    status, _, _ = run(capsys, trained / "prenorm", "--data", text, "--out", tmp_path / "o", *SMALL)
    found = Diagnosis.load(tmp_path / "o" / "prenorm.npz")
    assert status == 0 and found.text["source"] == str(text)
    text.write_text("")
    status, _, errors = run(capsys, trained / "prenorm", "--data", text, "--out", tmp_path / "p", *SMALL)
    assert status == 2 and "is empty" in errors and not (tmp_path / "p").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_less_text_than_two_tokens(trained, tmp_path, capsys, monkeypatch, count):
    monkeypatch.setattr("depthmix.runs.encode", lambda *_: torch.zeros(count, dtype=torch.long))
    status, _, errors = run(capsys, trained / "prenorm", "--data", "x", "--out", tmp_path / "o", *SMALL)
    assert status == 2 and f"holds {count} tokens" in errors and not (tmp_path / "o").exists()


def test_one_bad_run_stops_nobody_else_and_nothing_is_overwritten(trained, tmp_path, capsys):
    out = tmp_path / "report"
    assert run(capsys, trained / "prenorm", "--out", out, "--skip", "removal,mixing", *SMALL)[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    empty = tmp_path / "empty"
    empty.mkdir()
    status, _, errors = run(capsys, empty, "--out", out, *SMALL)
    assert status == 2 and "no diagnosis of" in errors and "holds no checkpoint" in errors
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    status, said, errors = run(capsys, empty, trained / "prenorm", "--out", out, "--skip", "removal", *SMALL)
    assert status == 0 and "holds no checkpoint" in errors and "written" in said


def test_a_checkpoint_of_an_unknown_connection(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "prenorm", copy)
    for path in copy.rglob("*.json"):
        if '"prenorm"' in path.read_text():
            path.write_text(path.read_text().replace('"prenorm"', '"postnorm"'))
    status, _, errors = run(capsys, copy, "--out", tmp_path / "o", *SMALL)
    assert status == 2 and not (tmp_path / "o").exists()
    assert "Traceback" not in errors and copy.name in errors


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "give run folders"),
        (["nowhere"], "no folder"),
        (["nowhere.npz"], "no file"),
        ([".", "--skip", "remova"], "Did you mean 'removal'"),
        ([".", "--length", "1"], "at least 2"),
        ([".", "--texts", "0"], "at least 1"),
        ([".", "--removal-texts", "-1"], "at least 0"),
    ],
)
def test_bad_requests(arguments, message, capsys, tmp_path):
    status, _, errors = run(capsys, *arguments, "--out", tmp_path / "o")
    assert status == 2 and message in errors and not (tmp_path / "o").exists()


def test_gradients_are_exact_where_training_inverted(trained, tmp_path):
    from depthmix.runs import open_run

    command = (
        f"train --preset quick --residual mgr-competitive --stream-memory inversion --n-layer 3 --d-model 16 "
        f"--seq-len 32 --steps 1 --batch-size 4 --eval-tokens 64 --val-fraction 0.5 --quiet --tokenizer bpe:300 "
        f"--device cpu --data {trained / 'text.txt'} --cache-dir {trained / 'cache'} --out {tmp_path / 'run'}"
    )
    assert cli.main(command.split()) == 0
    model = open_run(tmp_path / "run", "cpu").model
    store = GPT(dataclasses.replace(model.config, stream_memory="store"))
    store.load_state_dict(model.state_dict())
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(m(ids, ids)[1], [*m.parameters()]) for m in (model, store.eval())]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_same_names_are_told_apart(trained, tmp_path, capsys):
    other = tmp_path / "other" / "prenorm"
    shutil.copytree(trained / "prenorm", other)
    skip = ["--skip", "removal,mixing,gradients"]
    assert run(capsys, trained / "prenorm", other, other, "--out", tmp_path / "o", *skip, *SMALL)[0] == 0
    names = sorted(p.name for p in (tmp_path / "o").glob("*.npz"))
    assert names == ["other-prenorm.npz", "prenorm-2.npz", "prenorm.npz"]


def test_activations_that_are_not_finite_are_reported_by_layer(trained, tmp_path, capsys):
    model = GPT(
        GPTConfig(vocab_size=30, n_layer=3, d_model=8, n_head=2, seq_len=16, residual="prenorm"), seed=0
    )
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight[0, 0] = math.nan
    texts = torch.randint(30, (6, 8), generator=torch.Generator().manual_seed(0))
    found = diagnose(Run(model.eval(), name="broken"), texts, Extent(batch=4))
    assert any("MLP 1" in warning and "attention 1" not in warning for warning in found.warnings)
    assert np.isfinite(found["output_rms"][0]) and np.isfinite(found["top_hidden"][:3]).all()
    path = found.save(tmp_path / "broken.npz")
    status, _, errors = run(capsys, path, "--out", tmp_path / "o")
    assert status == 0 and "MLP 1" in errors and (tmp_path / "o" / "report.html").exists()


def test_a_single_block(tmp_path, capsys):
    model = GPT(GPTConfig(vocab_size=30, n_layer=1, d_model=8, n_head=2, seq_len=16, residual="hc"), seed=0)
    texts = torch.randint(30, (3, 8), generator=torch.Generator().manual_seed(0))
    path = diagnose(Run(model.eval(), name="one"), texts).save(tmp_path / "one.npz")
    assert run(capsys, path, "--out", tmp_path / "o")[0] == 0


@pytest.mark.parametrize(
    "texts",
    [torch.zeros(3, 1), torch.zeros(2, 1).long(), torch.zeros(0, 8).long(), torch.zeros(1, 99).long()],
)
def test_texts_that_do_not_fit(texts):
    model = GPT(
        GPTConfig(vocab_size=30, n_layer=1, d_model=8, n_head=2, seq_len=16, residual="prenorm"), seed=0
    )
    with pytest.raises(UserError, match="texts"):
        diagnose(Run(model.eval(), name="one"), texts)


# --- the file ---------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    one = Diagnosis(
        {"name": "x"}, {"texts": 3}, missing={"gates": "none"}, warnings=["w"], seconds={"a": 1.5}
    )
    one.arrays["k"] = Array(np.array([[1.0, math.nan]]), ("block", "rank"), "nats", "words")
    found = Diagnosis.load(one.save(tmp_path / "x.npz"))
    np.testing.assert_array_equal(found["k"], one["k"])
    assert found.arrays["k"].axes == ("block", "rank") and found.arrays["k"].unit == "nats"
    assert (found.subject, found.text, found.missing, found.warnings, found.seconds) == (
        one.subject, one.text, one.missing, one.warnings, one.seconds,
    )  # fmt: skip
    with np.load(tmp_path / "x.npz") as file:  # by anybody
        assert json.loads(str(file["about"]))["arrays"]["k"]["unit"] == "nats"


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no file that"):
        Diagnosis.load(path)
    np.savez(path, a=1)
    with pytest.raises(UserError, match="no file that"):
        Diagnosis.load(path)


def test_axes_fit_the_shape():
    with pytest.raises(ValueError, match="axes"):
        Array(np.zeros((2, 3)), ("block",), "", "")
