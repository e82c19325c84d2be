"""What the processes of ``test_sharded_checkpoint.py`` do: known tensors in many placements, saved and loaded."""

import errno
import json
import os
import resource
import signal
import threading
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import depthmix.checkpoint as files
from depthmix.checkpoint import load_checkpoint
from depthmix.parallel.checkpoint import ShardedCheckpoints, latest, load_into

SHAPES = {
    "rows": ((10, 6), torch.float32),  # 3, 3, 3, 1 rows on four processes
    "few": ((2, 5), torch.float32),  # fewer rows than processes
    "columns": ((3, 7), torch.float32),
    "grid": ((4, 6), torch.float32),
    "copies": ((6, 3), torch.float32),
    "vector": ((5,), torch.float32),
    "halves": ((9, 4), torch.bfloat16),
    "halves:master": ((9, 4), torch.float32),
    "empty": ((0, 3), torch.float32),
    "step": ((), torch.float32),
    "stage.0": ((5, 4), torch.float32),
    "stage.1": ((5, 4), torch.float32),
    "ends": ((7, 2), torch.float32),  # on the first stage and on the last
}
OPTIMIZER = ("halves:master", "step")

# Placements by name on a mesh "line" of all processes or "grid" of two rows of processes; a name that is not
# there is a plain tensor. "stage": a plan of two pipeline stages, each a row of the grid.
PLANS = {
    "mixed": {
        "rows": ("line", [Shard(0)]),
        "few": ("line", [Shard(0)]),
        "columns": ("line", [Shard(1)]),
        "grid": ("grid", [Shard(0), Shard(1)]),
        "copies": ("grid", [Replicate(), Shard(0)]),
        "halves": ("line", [Shard(0)]),
        "halves:master": ("line", [Shard(0)]),
        "empty": ("line", [Shard(0)]),
        "stage.0": ("stage", [Shard(0)]),
        "stage.1": ("stage", [Shard(0)]),
        "ends": ("stage", [Shard(0)]),
    },
    "other": {
        "rows": ("line", [Shard(1)]),
        "columns": ("line", [Shard(0)]),
        "grid": ("grid", [Shard(1), Shard(1)]),
        "copies": ("line", [Shard(0)]),
        "vector": ("line", [Shard(0)]),
        "halves": ("grid", [Shard(1), Shard(0)]),
        "halves:master": ("grid", [Shard(0), Replicate()]),
        "stage.0": ("line", [Shard(1)]),
        "ends": ("grid", [Shard(0), Shard(1)]),
    },
    "plain": {},
}


def whole(name: str, step: int = 0) -> Tensor:
    """The known values of a tensor: any two elements differ, in all tensors of a dtype."""
    shape, dtype = SHAPES[name]
    count = torch.Size(shape).numel()
    first = 100 * list(SHAPES).index(name) + 10_000 * step
    bits = torch.arange(first, first + count).reshape(shape)
    # bf16: the bits of ordinary numbers from 1 up, as integers of so many bits.
    return (bits.to(torch.int16) + 0x3F80).view(torch.bfloat16) if dtype == torch.bfloat16 else bits.float()


def place(plan: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as this rank holds them under the plan."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    meshes = {"line": init_device_mesh("cpu", (ranks,))}
    if ranks % 2 == 0:
        meshes["grid"] = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("row", "column"))
        meshes["stage"] = meshes["grid"]["column"]
    placed = {}
    for name, tensor in tensors.items():
        mesh, placements = PLANS[plan].get(name, (None, None))
        if mesh == "stage" and name.startswith("stage.") and int(name[-1]) != rank // (ranks // 2):
            continue
        placed[name] = (
            tensor
            if mesh is None
            else distribute_tensor(tensor, meshes[mesh], placements, src_data_rank=None)
        )
    return placed


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and state of the optimiser."""
    weights = {name: tensor for name, tensor in tensors.items() if name not in OPTIMIZER}
    return weights, {name: tensor for name, tensor in tensors.items() if name in OPTIMIZER}


def known(plan: str, step: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return split(place(plan, {name: whole(name, step) for name in SHAPES}))


def save_while_training(folder: Path, plan: str, asynchronous: bool = True) -> str:
    """Save, change every tensor as soon as save() returns, and only then let the thread write."""
    changed = threading.Event()
    write = files.write_tensors

    def held_back(*args):
        assert changed.wait(60) or not asynchronous
        write(*args)

    if asynchronous:
        files.write_tensors = held_back
    weights, optimizer = known(plan)
    with ShardedCheckpoints(folder, keep_last=3, asynchronous=asynchronous) as checkpoints:
        state = {"config": {}, "rank": dist.get_rank()}
        checkpoints.save(7, weights, optimizer, state, {"step": 7, "val_loss": 2.5})
        for tensor in (weights | optimizer).values():
            local(tensor).fill_(-1)
        changed.set()
        return str(checkpoints.wait())


def load_and_compare(checkpoint: Path, plan: str) -> dict:
    """Load into the placements of ``plan``; names of tensors that differ from the known ones, and the state."""
    weights, optimizer = known(plan)
    truth = {name: local(tensor).clone() for name, tensor in (weights | optimizer).items()}
    for tensor in (weights | optimizer).values():
        local(tensor).fill_(-1)
    state = load_into(checkpoint, weights, optimizer)
    found = {name: local(tensor) for name, tensor in (weights | optimizer).items()}
    return {"wrong": [name for name in truth if not torch.equal(truth[name], found[name])], "state": state}


def load_only(checkpoint: Path, change: str) -> None:
    """Load into known tensors, of which ``change`` makes some not fit."""
    weights, optimizer = known("plain")
    if change == "dtype":
        weights["rows"] = weights["rows"].double()
    if change == "shape":
        weights["rows"] = weights["rows"][:9]
    if change == "more":
        weights["more"] = torch.zeros(2)
    if change == "fewer":
        del weights["rows"]
    load_into(checkpoint, weights, optimizer)


def load_weights(checkpoint: Path) -> bool:
    weights, _ = known("other")
    truth = {name: local(tensor).clone() for name, tensor in weights.items()}
    load_into(checkpoint, weights, {})
    return all(torch.equal(truth[name], local(tensor)) for name, tensor in weights.items())


# --- faults ---------------------------------------------------------------------------------------


def save_steps(folder: Path, steps: list[int], keep_last: int = 10) -> list[str]:
    """Save several steps with the values of each; what wait() returned after each."""
    found = []
    with ShardedCheckpoints(folder, keep_last=keep_last) as checkpoints:
        for step in steps:
            checkpoints.save(step, *known("mixed", step), {"config": {}}, {"step": steps[0], "val_loss": 1.0})
            found.append(str(checkpoints.wait()))
        assert latest(folder) == checkpoints.wait()
    return found


def die_while_saving(folder: Path, who: int, moment: str) -> str:
    """Save step 1; then one rank is killed at a moment of saving step 2."""
    with ShardedCheckpoints(folder, keep_last=10) as checkpoints:
        checkpoints.save(1, *known("mixed", 1), {"config": {}}, None)
        checkpoints.wait()
        if dist.get_rank() == who:
            _die_at(moment)
        checkpoints.save(2, *known("mixed", 2), {"config": {}}, None)
        return str(checkpoints.wait())


def _die_at(moment: str) -> None:
    owner, name = {"write": (files, "write_tensors"), "rename": (os, "rename")}[moment.split()[1]]
    function = getattr(owner, name)

    def deadly(*args):
        if moment.startswith("after"):
            function(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def fail_while_saving(folder: Path, who: int, fault: str) -> dict:
    """Save step 1; step 2 with a fault in one rank; step 3 without it. Messages, and what is there each time."""
    seen = {}
    write, fault_here = files.write_tensors, dist.get_rank() == who
    with ShardedCheckpoints(folder, keep_last=10) as checkpoints:

        def attempt(step: int, optimizer=None) -> str:
            weights, kept = known("mixed", step)
            try:
                checkpoints.save(
                    step, weights, kept if optimizer is None else optimizer, {"config": {}}, None
                )
                text = str(checkpoints.wait())
            except files.RunError as error:
                text = str(error)
            dist.barrier()  # all look at the folder before anyone goes on
            seen[step] = {"text": text, "names": sorted(os.listdir(folder))}
            dist.barrier()
            return text

        attempt(1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        broken = None
        if fault_here and fault == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        if fault_here and fault == "no space":
            files.write_tensors = _no_space
        if fault_here and fault == "other tensors":
            broken = {"step": torch.zeros(3)}
        attempt(2, broken)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        files.write_tensors = write
        attempt(3)
    return seen


def _no_space(path: Path, tensors, metadata=None):
    """Half a file, then what the kernel says on a full disk."""
    path.write_bytes(b"\0" * 64)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_on_full_disk(folder: Path) -> str:
    """Save until the disk is full; the message."""
    with ShardedCheckpoints(folder, keep_last=1000) as checkpoints:
        for step in range(1, 1000):
            try:
                checkpoints.save(step, *known("mixed", step), {"config": {}}, None)
                checkpoints.wait()
            except files.RunError as error:
                return str(error)
    return "the disk was large enough"


def save_unfinished_sum(folder: Path) -> None:
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    tensors = {"sum": DTensor.from_local(torch.ones(3), mesh, [Partial()])}
    with ShardedCheckpoints(folder, keep_last=1) as checkpoints:
        checkpoints.save(1, tensors, {}, {"config": {}}, None)


# --- FSDP2 and tensor parallelism -----------------------------------------------------------------


def network(rows: int) -> nn.Sequential:
    model = nn.Sequential(OrderedDict(up=nn.Linear(6, rows), down=nn.Linear(rows, 6, bias=False)))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            first = 1000 * index
            parameter.copy_(torch.arange(first, first + parameter.numel()).view_as(parameter))
    return model


def _parallel(rows: int, tensor_parallel: int) -> nn.Sequential:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
    model = network(rows)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def save_two_dimensions(folder: Path, rows: int, tensor_parallel: int) -> list[str]:
    """Save a network under FSDP2 and tensor parallelism; its placements."""
    weights = dict(_parallel(rows, tensor_parallel).named_parameters())
    optimizer = {f"{name}:momentum": torch.zeros_like(tensor) for name, tensor in weights.items()}
    with ShardedCheckpoints(folder, keep_last=1) as checkpoints:
        checkpoints.save(1, weights, optimizer, {"config": {}}, None)
    return [str(tensor.placements) for tensor in weights.values()]


def load_two_dimensions(checkpoint: Path, rows: int, tensor_parallel: int) -> bool:
    """Load what :func:`save_two_dimensions` saved; whether each shard is as FSDP2 cut it from the known one."""
    weights = dict(_parallel(rows, tensor_parallel).named_parameters())
    truth = {name: local(tensor.data).clone() for name, tensor in weights.items()}
    for tensor in weights.values():
        local(tensor.data).fill_(-1)
    load_into(checkpoint, weights, {})
    return all(torch.equal(local(tensor), truth[name]) for name, tensor in weights.items())


# --- one process and several ----------------------------------------------------------------------


def rewrite(checkpoint: Path, folder: Path) -> None:
    """Load any checkpoint into shards and save it again, by all ranks."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    saved = load_checkpoint(checkpoint)

    def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)]) if tensor.ndim else tensor * 0
            for name, tensor in tensors.items()
        }

    weights, optimizer = zeros(saved.model), zeros(saved.optimizer)
    state = load_into(checkpoint, weights, optimizer)
    kept = {key: value for key, value in state.items() if key not in ("random", "versions", "format", "step")}
    with ShardedCheckpoints(folder, keep_last=10) as checkpoints:
        checkpoints.save(state["step"], weights, optimizer, json.loads(json.dumps(kept)), state.get("best"))
