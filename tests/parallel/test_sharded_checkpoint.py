"""Checkpoints of several processes: what one plan saves, any other loads bit for bit; faults in one rank reach all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from depthmix import cli
from depthmix.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    problem,
    save_checkpoint,
    write_one_file,
)
from depthmix.config import OptimConfig
from depthmix.errors import RunError
from depthmix.parallel.checkpoint import ShardedCheckpoints, load_into

sys.path.insert(0, str(Path(__file__).parent))  # the processes import these by name

import checkpoint_ranks as work
from ranks import run_ranks, values


def wrong_tensors(checkpoint: Path, step: int = 0) -> list[str]:
    """Names whose whole tensors, read by one process, are not the known ones bit for bit."""
    loaded = load_checkpoint(checkpoint)
    assert (set(loaded.model) | set(loaded.optimizer)) == set(work.SHAPES)
    assert set(loaded.optimizer) == set(work.OPTIMIZER)
    return [
        name
        for name, tensor in (loaded.model | loaded.optimizer).items()
        if tensor.dtype != work.whole(name, step).dtype or not torch.equal(tensor, work.whole(name, step))
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of four processes; every tensor was changed between save() and the first byte written."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    found = values(run_ranks(work.save_while_training, 4, folder, "mixed"))
    assert set(found) == {str(folder / "step-00000007")}
    return folder / "step-00000007"


def copy_of(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


# --- round trips ----------------------------------------------------------------------------------


def test_one_process_reads_whole_tensors_as_they_were_when_save_returned(saved):
    assert wrong_tensors(saved) == []
    state = load_checkpoint(saved).state
    assert (state["format"], state["layout"], state["step"], state["rank"]) == (1, "sharded", 7, 0)
    assert best_checkpoint(saved.parent) == saved


@pytest.mark.parametrize(
    "plan, ranks", [("mixed", 4), ("other", 4), ("other", 2), ("mixed", 8), ("plain", 3)]
)
def test_any_number_of_processes_and_any_placement_reads_it(saved, plan, ranks):
    found = values(run_ranks(work.load_and_compare, ranks, saved, plan))
    assert [rank["wrong"] for rank in found] == [[]] * ranks
    assert all(rank["state"] == found[0]["state"] for rank in found) and found[0]["state"]["step"] == 7


@pytest.mark.parametrize("plan, ranks", [("other", 2), ("plain", 3), ("other", 8)])
def test_any_plan_writes_it_also_synchronously(tmp_path, plan, ranks):
    values(run_ranks(work.save_while_training, ranks, tmp_path, plan, ranks == 3))
    assert wrong_tensors(tmp_path / "step-00000007") == []


def test_one_process_without_a_group_saves_and_loads(tmp_path):
    tensors = {name: work.whole(name) for name in work.SHAPES}
    with ShardedCheckpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, *work.split(tensors), {"config": {}}, None)
    assert wrong_tensors(tmp_path / "step-00000001") == []
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert load_into(tmp_path / "step-00000001", *work.split(zeros))["step"] == 1
    assert all(torch.equal(zeros[name], tensors[name]) for name in tensors)


def test_torchs_own_reader_reads_the_folders(saved):
    tensors = {name: torch.zeros_like(work.whole(name)) for name in work.SHAPES if name not in work.OPTIMIZER}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(saved / "model")), no_dist=True)
    assert all(torch.equal(tensor, work.whole(name)) for name, tensor in tensors.items())


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
    with ShardedCheckpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, {"a": torch.ones(2)}, {"a:momentum": torch.ones(2)}, {"config": {}}, None)
    beside, path = tmp_path / ".saving-step-00000001", tmp_path / "step-00000001"
    written = [file.relative_to(path) for file in path.rglob("*")]
    assert len(written) == 6  # two folders of one file each, state, manifest
    renamed = calls.index(("rename", str(path)))
    assert {call for call in calls[:renamed]} >= {("fsync", str(beside / name)) for name in written}
    assert calls[renamed - 1] == ("fsync", str(beside))
    assert calls[renamed + 1] == ("fsync", str(tmp_path))


def test_each_box_is_written_once_and_the_work_is_shared(saved):
    boxes, bytes_of = [], []
    for file in sorted((saved / "model").iterdir()):
        with safe_open(file, "pt") as opened:
            begins = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            boxes += [(name, *begins[name]["saved_offsets"]) for name in opened.keys()]
            bytes_of.append(sum(opened.get_tensor(name).nbytes for name in opened.keys()))
    assert len(boxes) == len(set(boxes))
    total = sum(work.whole(name).nbytes for name in work.SHAPES if name not in work.OPTIMIZER)
    assert sum(bytes_of) == total and len(bytes_of) == 4 and max(bytes_of) < 1.3 * total / 4


@pytest.mark.parametrize("rows, ranks, parallel", [(8, 4, 2), (7, 4, 2), (7, 6, 2), (5, 8, 2)])
def test_fsdp_and_tensor_parallel_shards(tmp_path, rows, ranks, parallel):
    """Also where rows divide by neither; saved and loaded as FSDP2 itself cuts the weights."""
    placements = values(run_ranks(work.save_two_dimensions, ranks, tmp_path, rows, parallel))
    assert "_StridedShard" in placements[0][0]
    checkpoint = tmp_path / "step-00000001"
    truth = dict(work.network(rows).named_parameters())
    loaded = load_checkpoint(checkpoint).model
    assert loaded.keys() == truth.keys()
    assert all(torch.equal(loaded[name], truth[name]) for name in truth)
    for others, parallel_then in ((4, 4), (ranks, parallel)):
        assert all(values(run_ranks(work.load_two_dimensions, others, checkpoint, rows, parallel_then)))


def test_weights_alone_need_no_optimizer_files(saved, tmp_path):
    checkpoint = copy_of(saved, tmp_path)
    shutil.rmtree(checkpoint / "optimizer")
    assert all(values(run_ranks(work.load_weights, 2, checkpoint)))
    assert set(load_checkpoint(checkpoint, training=False).model) == set(work.SHAPES) - set(work.OPTIMIZER)
    with pytest.raises(RunError, match=r"optimizer/shard-\d+\.safetensors is missing"):
        load_checkpoint(checkpoint)


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    found = values(run_ranks(work.save_steps, 2, tmp_path, [1, 2, 3, 4], 2))
    assert found[0] == found[1] == [str(tmp_path / f"step-0000000{step}") for step in (1, 2, 3, 4)]
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == ["step-00000001", "step-00000003", "step-00000004"]
    assert wrong_tensors(tmp_path / "step-00000004", step=4) == []


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    values(run_ranks(work.save_steps, 2, tmp_path, [1]))
    file = tmp_path / "step-00000001" / "model" / "shard-00002.safetensors"
    before = file.stat().st_ino
    values(run_ranks(work.save_steps, 2, tmp_path, [1]))
    assert file.stat().st_ino == before
    flip_a_bit(file)
    values(run_ranks(work.save_steps, 2, tmp_path, [1]))
    assert wrong_tensors(tmp_path / "step-00000001", step=1) == []


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("who, moment", [(2, "before write"), (3, "after write"), (0, "after write"),
                                         (0, "before rename"), (0, "after rename")])  # fmt: skip
def test_a_killed_rank_leaves_a_whole_checkpoint(tmp_path, who, moment):
    outcomes = run_ranks(work.die_while_saving, 4, tmp_path, who, moment)
    assert outcomes[who].died == "SIGKILL"
    survivors = [found for rank, found in enumerate(outcomes) if rank != who]
    assert all(
        "cannot write checkpoint" in found.error and "lost another" in found.error for found in survivors
    )
    newest = latest_checkpoint(tmp_path)
    assert newest.name == ("step-00000002" if moment == "after rename" else "step-00000001")
    assert wrong_tensors(newest, step=int(newest.name[-1])) == []
    values(run_ranks(work.save_steps, 2, tmp_path, [3]))
    assert sorted(os.listdir(tmp_path)) == sorted(
        {"best.json", "step-00000001", newest.name, "step-00000003"}
    )
    assert wrong_tensors(tmp_path / "step-00000003", step=3) == []


@pytest.mark.parametrize(
    "who, fault, text",
    [
        (1, "file size", "rank 1: Error while serializing: I/O error: File too large"),
        (0, "no space", "rank 0: No space left on device"),
        (3, "no space", "rank 3: No space left on device"),
        (2, "other tensors", "rank 2: names, shapes or placements of the tensors are not those"),
    ],
)
def test_one_rank_that_fails_makes_all_raise_and_the_next_save_works(tmp_path, who, fault, text):
    seen = values(run_ranks(work.fail_while_saving, 4, tmp_path, who, fault))
    assert all(found == seen[0] for found in seen)
    message, names = seen[0][2]["text"], seen[0][2]["names"]
    assert message.startswith(f"cannot write checkpoint {tmp_path / 'step-00000002'}: {text}")
    assert f"The last checkpoint is {tmp_path / 'step-00000001'}" in message
    assert names == ["step-00000001"]  # what was half written is given back
    assert seen[0][3]["text"] == str(tmp_path / "step-00000003")
    for step in (1, 3):
        assert wrong_tensors(tmp_path / f"step-0000000{step}", step) == []


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        outcomes = values(run_ranks(work.save_on_full_disk, 4, disk))
        assert len(set(outcomes)) == 1 and "No space left on device" in outcomes[0]
        newest = latest_checkpoint(disk)
        assert f"The last checkpoint is {newest}" in outcomes[0]
        assert all(problem(path) is None for path in list_checkpoints(disk))
        assert wrong_tensors(newest, int(newest.name[5:])) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_sum_that_is_not_done_is_refused_by_all(tmp_path):
    outcomes = run_ranks(work.save_unfinished_sum, 2, tmp_path)
    assert all("rank 0, 1: sum is placed (Partial(sum),), which no" in found.error for found in outcomes)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file",
    [f"{part}/shard-0000{number}.safetensors" for part in ("model", "optimizer") for number in (1, 2)]
    + ["state.json", "manifest.json"],
)
def test_damage_is_named(saved, tmp_path, file, damage):
    checkpoint = copy_of(saved, tmp_path)
    DAMAGES[damage](checkpoint / file)
    with pytest.raises(RunError) as caught:
        load_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value) and file in str(caught.value)
    assert "No whole checkpoint lies beside it" in str(caught.value)


@pytest.mark.parametrize("file", ["model/shard-00003.safetensors", "manifest.json"])
def test_damage_is_named_in_all_processes(saved, tmp_path, file):
    checkpoint = copy_of(saved, tmp_path)
    flip_a_bit(checkpoint / file)
    errors = {found.error for found in run_ranks(work.load_and_compare, 2, checkpoint, "other")}
    assert len(errors) == 1
    error = errors.pop()
    assert error.startswith(f"RunError: checkpoint {checkpoint}: {file} is damaged")


def test_a_file_that_the_manifest_does_not_list_is_not_read(saved, tmp_path):
    checkpoint = copy_of(saved, tmp_path)
    shutil.copy(
        checkpoint / "model" / "shard-00001.safetensors", checkpoint / "model" / "shard-00000.safetensors"
    )
    flip_a_bit(checkpoint / "model" / "shard-00000.safetensors")
    assert wrong_tensors(checkpoint) == []


@pytest.mark.parametrize(
    "change, text",
    [
        ("dtype", "of another shape: rows (torch.float32 [10, 6] saved, torch.float64 [10, 6] needed)"),
        ("shape", "of another shape: rows (torch.float32 [10, 6] saved, torch.float32 [9, 6] needed)"),
        ("more", "missing: more"),
        ("fewer", "not in the model: rows"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_all(saved, change, text):
    for found in run_ranks(work.load_only, 2, saved, change):
        assert found.error.startswith(f"RunError: {saved / 'model'} does not fit the model; {text}")


def test_no_checkpoint_is_a_wrong_request(tmp_path):
    for found in run_ranks(work.load_only, 2, tmp_path / "nothing", ""):
        assert found.error.startswith("UserError: ") and "is not a checkpoint folder" in found.error


# --- one process and several ----------------------------------------------------------------------


def files_of_run(run: Path) -> dict[str, bytes]:
    newest = latest_checkpoint(run / "checkpoints")
    names = ("model.safetensors", "optimizer.safetensors")
    return {"metrics": (run / "metrics.jsonl").read_bytes()} | {n: (newest / n).read_bytes() for n in names}


def test_a_run_goes_on_from_what_several_processes_wrote(tmp_path, capsys):
    """One process trains; two rewrite its checkpoint in shards; one goes on from it to the same last bit."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97}\n" for i in range(3000)))
    command = (
        f"train --preset quick --residual mgr-competitive --n-layer 2 --d-model 16 --seq-len 32 --steps 4 --device cpu "
        f"--batch-size 4 --eval-tokens 64 --eval-interval 2 --checkpoint-interval 2 --quiet --no-report "
        f"--data {text} --cache-dir {tmp_path / 'cache'} --out {tmp_path}/"
    )
    assert cli.main((command + "straight").split()) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    checkpoints = tmp_path / "resumed" / "checkpoints"
    (tmp_path / "resumed" / "result.json").unlink()
    middle = tmp_path / "middle"
    shutil.copytree(checkpoints / "step-00000002", middle / "step-00000002")
    shutil.rmtree(checkpoints)
    values(run_ranks(work.rewrite, 2, middle / "step-00000002", checkpoints))
    assert load_checkpoint(latest_checkpoint(checkpoints)).state["layout"] == "sharded"

    out = tmp_path / "one.safetensors"
    run = str(tmp_path / "resumed")
    assert (
        cli.main(["generate", run, "--prompt", "li", "--tokens", "2", "--device", "cpu", "--seed", "1"]) == 0
    )
    assert cli.main(["export", run, "--to", "safetensors", "--out", str(out)]) == 0
    exported, original = load_file(out), load_file(middle / "step-00000002" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)

    assert cli.main((command + "resumed --resume").split()) == 0
    assert files_of_run(tmp_path / "resumed") == files_of_run(tmp_path / "straight")


def test_a_checkpoint_of_one_process_loads_into_shards(tmp_path):
    from depthmix import GPT
    from depthmix.config import GPTConfig, TrainConfig
    from depthmix.optim import build_optimizer

    config = TrainConfig(
        model=GPTConfig(vocab_size=32, n_layer=2, d_model=8, n_head=2, seq_len=8, n_streams=2)
    )
    model = GPT(config.model, seed=3)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # so that there are fp32 masters
    path = save_checkpoint(
        tmp_path / "one", 5, model, build_optimizer(model, OptimConfig()), {"config": config.to_dict()}
    )
    values(run_ranks(work.rewrite, 3, path, tmp_path / "three"))
    one, three = load_checkpoint(path), load_checkpoint(tmp_path / "three" / "step-00000005")
    for ours, theirs in ((one.model, three.model), (one.optimizer, three.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert three.state["config"] == one.state["config"] and three.random == {}


# --- export ---------------------------------------------------------------------------------------


def test_export_writes_whole_weights_to_one_file(saved, tmp_path, capsys):
    out = tmp_path / "new" / "weights.safetensors"
    assert cli.main(["export", str(saved), "--to", "safetensors", "--out", str(out)]) == 0
    weights = load_file(out)
    assert set(weights) == set(work.SHAPES) - set(work.OPTIMIZER)
    assert all(torch.equal(weights[name], work.whole(name)) for name in weights)
    assert os.listdir(out.parent) == [out.name] and str(out) in capsys.readouterr().out

    before = out.read_bytes()
    refused = {
        f"{saved} --out {out}": "exists; --overwrite replaces it",
        f"{saved} --to pickle --out {out} --overwrite": "unknown format of --to 'pickle'",
        f"{saved}": "--out names the file",
        f"{saved} --out {tmp_path}": "is a folder; name a file",
        f"{tmp_path} --out {tmp_path / 'x'}": "holds no checkpoint",
    }
    for command, message in refused.items():
        assert cli.main(["export", *command.split()]) == 2
        assert message in capsys.readouterr().err
    out.write_bytes(b"something else")
    assert cli.main(["export", str(saved), "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes() == before


def test_an_export_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
    out = tmp_path / "weights.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr("depthmix.checkpoint.write_tensors", work._no_space)
    with pytest.raises(RunError, match=r"cannot write .*weights\.safetensors: No space left on device"):
        write_one_file(saved, out)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == [out.name]
