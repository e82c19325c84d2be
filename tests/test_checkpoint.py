"""Bit-exact round trips, damage of every file, and death at every file operation."""

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import depthmix.checkpoint as checkpoint_module
from depthmix import GPT
from depthmix.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    prune_checkpoints,
    record_best,
    restore,
    save_checkpoint,
    write_json,
)
from depthmix.config import GPTConfig, OptimConfig, TrainConfig
from depthmix.errors import RunError, UserError
from depthmix.optim import build_optimizer

CONFIG = TrainConfig(model=GPTConfig(vocab_size=32, n_layer=2, d_model=8, n_head=2, seq_len=8, n_streams=2))
FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(dtype=torch.float32, steps=2, seed=0):
    """A model and an optimiser whose every tensor differs from its initial value."""
    model = GPT(CONFIG.model, seed=seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.arange(16).view(2, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, ids.flip(1))[1].backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, model=None, optimizer=None):
    if model is None:
        model, optimizer = trained()
    return save_checkpoint(folder, step, model, optimizer, {"config": CONFIG.to_dict()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back_bit_for_bit(tmp_path, dtype):
    model, optimizer = trained(dtype)
    torch.manual_seed(5), random.seed(6), np.random.seed(7)
    np.random.standard_normal()  # leaves a second normal number waiting inside numpy's state
    path = save(tmp_path, 40, model, optimizer)
    draws = torch.rand(3).tolist(), random.random(), np.random.standard_normal(3).tolist()

    other, other_optimizer = trained(dtype, steps=1, seed=1)
    loaded = load_checkpoint(path)
    restore(loaded, other, other_optimizer)
    assert (torch.rand(3).tolist(), random.random(), np.random.standard_normal(3).tolist()) == draws
    assert loaded.step == 40 and loaded.config == CONFIG
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b)
    ours, theirs = optimizer.named_state(), other_optimizer.named_state()
    assert ours.keys() == theirs.keys() == loaded.optimizer.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("saved, read", [(4.0, 4.0), (1.0, 4.0), (4.0, 1.0)])
def test_state_is_found_by_name_whatever_the_groups(tmp_path, saved, read):
    def made(factor, seed):
        model = GPT(CONFIG.model, seed=seed)
        optimizer = build_optimizer(model, OptimConfig(connection_lr=factor))
        ids = torch.arange(16).view(2, 8)
        model(ids, ids.flip(1))[1].backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(saved, 0)
    other, other_optimizer = made(read, 1)
    restore(load_checkpoint(save(tmp_path, 40, model, optimizer)), other, other_optimizer)
    ours, theirs = optimizer.named_state(), other_optimizer.named_state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rates = {g["kind"]: g["peak_lr"] for g in other_optimizer.param_groups}
    assert rates.get("connection_no_decay") == (None if read == 1 else 4 * OptimConfig().lr)


def test_files_have_the_permissions_that_the_umask_gives(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "plain").write_text("")
    assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_tied_weight_is_saved_once(tmp_path):
    def tied():
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(4, 4)])
        model.embed, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        model.head.weight = model.embed.weight
        return model, build_optimizer(model, OptimConfig())

    model, optimizer = tied()
    loaded = load_checkpoint(save(tmp_path, 1, model, optimizer))
    assert sorted(loaded.model) == ["blocks.0.bias", "blocks.0.weight", "embed.weight"]
    other, other_optimizer = tied()
    restore(loaded, other, other_optimizer)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)
    assert "head.weight" not in load_checkpoint(save(tmp_path, 2)).model  # the GPT's head is its embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_takes_a_run_or_a_checkpoint(tmp_path, dtype):
    models = {}
    for step in (1, 2):
        models[step], optimizer = trained(dtype, steps=step)
        save(tmp_path / "checkpoints", step, models[step], optimizer)
    before = torch.get_rng_state()
    newest, config = load_model(tmp_path)
    older, _ = load_model(tmp_path / "checkpoints" / "step-00000001")
    assert torch.equal(torch.get_rng_state(), before)
    assert config == CONFIG and not newest.training
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(newest(ids), models[2](ids)) and torch.equal(older(ids), models[1](ids))
        record_best(tmp_path / "checkpoints", {"step": 1, "val_loss": 2.0})
        assert torch.equal(load_model(tmp_path)[0](ids), models[1](ids))
    with pytest.raises(UserError, match=r"nothing holds no checkpoint; give a run folder"):
        load_model(tmp_path / "nothing")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_with_what_to_use_instead(tmp_path, file, damage):
    model, optimizer = trained(steps=1)
    whole, damaged = save(tmp_path, 1, model, optimizer), save(tmp_path, 2, model, optimizer)
    DAMAGES[damage](damaged / file)
    with pytest.raises(RunError) as caught:
        load_checkpoint(damaged)
    message = str(caught.value)
    assert str(damaged) in message and file in message
    assert f"The newest whole checkpoint is {whole}; to resume from it, remove step-00000002" in message
    DAMAGES["missing"](whole / "state.json")
    with pytest.raises(RunError, match="No whole checkpoint lies beside it"):
        load_checkpoint(damaged)


def test_a_checkpoint_that_does_not_fit_the_model(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 1))
    wider = GPT(dataclasses.replace(CONFIG.model, d_model=16), seed=0)
    with pytest.raises(RunError, match=r"model\.safetensors does not fit .*\[8\] saved.*\[16\] needed"):
        restore(loaded, wider, build_optimizer(wider, OptimConfig()))
    deeper = GPT(dataclasses.replace(CONFIG.model, n_layer=3), seed=0)
    with pytest.raises(RunError, match=r"missing: blocks\.2\."):
        restore(loaded, deeper, build_optimizer(deeper, OptimConfig()))


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6), (12, 2.7)):
        save(tmp_path, step)
        if loss <= 2.0 or step == 1:
            record_best(tmp_path, {"step": step, "val_loss": loss})
        prune_checkpoints(tmp_path, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004", "step-00000012"]
    assert latest_checkpoint(tmp_path).name == "step-00000012"
    assert best_checkpoint(tmp_path).name == "step-00000002"
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 2, "val_loss": 2.0, "checkpoint": "step-00000002"}


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "model.safetensors").stat()
    save(tmp_path, 1)
    assert (path / "model.safetensors").stat().st_ino == before.st_ino
    flip_a_bit(path / "model.safetensors")
    save(tmp_path, 1)
    load_checkpoint(path)


def test_everything_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    """What makes a checkpoint survive a power cut, which no test here can stage, is this order."""
    calls = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(old, new):
        calls.append(("rename", str(new)))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    path = save(tmp_path, 3)
    beside = tmp_path / ".saving-step-00000003"
    renamed = calls.index(("rename", str(path)))
    assert {call for call in calls[:renamed]} >= {("fsync", str(beside / name)) for name in FILES}
    assert calls[renamed - 1] == ("fsync", str(beside))  # the folder's own list, after all its files
    assert calls[renamed + 1] == ("fsync", str(tmp_path))


def in_a_child(function) -> str:
    """Run ``function`` in a forked process, which it may restrict; the text it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = function()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, str(text).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("kilobytes", [0, 1, 5, 12])
def test_no_room_on_the_disk(tmp_path, kilobytes):
    """A limit on file sizes makes the kernel refuse a write half way, as a full disk does."""
    model, optimizer = trained()
    kept = save(tmp_path, 1, model, optimizer)

    def attempt():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))
        return save(tmp_path, 2, model, optimizer)

    message = in_a_child(attempt)
    assert message.startswith(f"RunError: cannot write checkpoint {tmp_path / 'step-00000002'}: ")
    assert "File too large" in message and f"The last checkpoint is {kept}." in message
    assert "--resume" in message
    assert os.listdir(tmp_path) == ["step-00000001"]  # what was half written is given back
    load_checkpoint(kept)


def test_a_folder_that_cannot_be_written(tmp_path):
    model, optimizer = trained()
    kept = save(tmp_path / "inner", 1, model, optimizer)
    for folder in (*tmp_path.parents, tmp_path, tmp_path / "inner", kept):
        if folder.stat().st_uid == os.getuid() and "pytest-" in str(folder):
            folder.chmod(0o755)

    def attempt(function):
        def as_nobody():
            if os.getuid() == 0:  # root may write anywhere
                os.setuid(65534)
            else:
                os.chmod(tmp_path / "inner", 0o555)
            return function()

        return as_nobody

    message = in_a_child(attempt(lambda: save(tmp_path / "inner", 2, model, optimizer)))
    assert message.startswith("RunError: cannot write checkpoint") and "Permission denied" in message
    message = in_a_child(attempt(lambda: write_json(tmp_path / "inner" / "best.json", {})))
    assert message.startswith(f"RunError: cannot write {tmp_path / 'inner' / 'best.json'}: Permission denied")
    (tmp_path / "inner").chmod(0o755)
    load_checkpoint(kept)


def test_death_at_every_file_operation(tmp_path):
    """Whatever the operation at which the process dies: all that has a checkpoint's name is whole,
    the newest is at least the one before, the best exists, and the next save clears what was left."""
    script = Path(__file__).parent / "faults" / "crash_points.py"
    source = str(Path(checkpoint_module.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    for before in (True, False):
        deaths = [point for point in points if point["before"] == before]
        assert len(deaths) > 20 and [p["status"] for p in deaths] == [9] * (len(deaths) - 1) + [0]
    for point in points:
        found = point["found"]
        assert found["wrong"] == [], point
        assert found["names"][-1] in ("step-00000003", "step-00000004"), point
        assert found["values"] == [found["step"]], point
        assert found["best"] in found["names"], point
        assert point["left"] == ["best.json", "step-00000003", "step-00000004"], point
        assert point["after"]["wrong"] == [] and point["after"]["best"] == "step-00000004", point
    assert {point["found"]["step"] for point in points} == {3, 4}
