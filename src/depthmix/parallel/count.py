"""Counts what this process hands to its process groups: every collective and every tensor sent, by kind, axis, cut.

All traffic of ``torch.distributed`` goes through operators of torch's dispatcher (``c10d::*``, and
``_c10d_functional::*`` on top of them), also what C++ issues, as DDP's reducer does. :class:`Counter` is a mode of the
dispatcher and sees each of them with its tensors and its group. An operator that it does not know fails, so nothing
is left out by silence. What the operating system was given for the sockets of this process (:func:`socket_bytes`)
is a second account, which knows nothing of operators.

As a script, ``torchrun ... -m depthmix.parallel.count CASES OUT``: runs a few optimiser steps of each configuration
in the JSON file CASES and writes to OUT what every rank sent in one of them.
"""

import contextlib
import json
import os
import socket
import struct
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import TrainConfig
from .plan import AXES, ParallelPlan
from .volume import Volume

WARM_UP = 2
"""Steps before the one that is counted: in the first two DDP arranges its buckets anew and says so to the others."""

Key = tuple[str, str, str, int | None, str]
"""Kind, axis, phase, cut, direction."""
PHASES = {"updates": "update", "norm": "norm"}
"""What of :class:`Volume` is sent in another phase than ``backward``."""


class Counter(TorchDispatchMode):
    """``with Counter(world, stages) as counter``: bytes and calls by key, in ``counter.sent``.

    Args:
        world: whose groups are the axes.
        stages: this process's ``PipelineStage``s, whose tensors are told apart by cut and direction.
    """

    def __init__(self, world, stages=()):
        super().__init__()
        self.sent: dict[Key, list[int]] = defaultdict(lambda: [0, 0])
        self.phase = "backward"
        self._axes = _axes(world)
        self._stages = stages
        self._labels: dict[int, tuple[Tensor, int, str]] = {}

    def __enter__(self):
        for stage in self._stages:
            number = stage.stage_index
            self._label(stage, "get_fwd_send_ops", number, "forward")
            self._label(stage, "get_bwd_send_ops", number - 1, "backward")
        return super().__enter__()

    def __exit__(self, *error):
        for stage in self._stages:
            del stage.get_fwd_send_ops, stage.get_bwd_send_ops
        return super().__exit__(*error)

    def _label(self, stage, name: str, cut: int, direction: str) -> None:
        made = getattr(stage, name)

        def labelled(chunk):
            operations = made(chunk)
            for operation in operations:
                # Kept until it is sent: its identity names it.
                self._labels[id(operation.tensor)] = operation.tensor, cut, direction
            return operations

        setattr(stage, name, labelled)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            self._count(name.partition(".")[0], list(args) + list(kwargs.values()))
        return func(*args, **kwargs)

    def _count(self, name: str, args: list) -> None:
        if name in _SILENT:
            return
        if name not in _KINDS:
            raise RuntimeError(
                f"a collective that is not counted: {name}; say in {__name__}._KINDS what it is"
            )
        kind, which = _KINDS[name]
        group = _group_of(args)
        cut, direction = None, ""
        if kind == "point-to-point":
            (tensor,) = args[0]
            _, cut, direction = self._labels.pop(id(tensor), (None, None, "unknown"))
        size = _bytes(args[which])
        if kind == "all-gather" and name in _BY_INPUT:
            size *= group.size()
        axis = self._axes.get(group.group_name, f"group of {group.size()}")
        total = self.sent[kind, axis, self.phase, cut, direction]
        total[0] += size
        total[1] += 1


# Operator -> its kind, and which argument is the payload.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "all_reduce_": ("all-reduce", 0),
    "all_reduce_coalesced": ("all-reduce", 0),
    "all_reduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_coalesced_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", 0),
    "all_gather_into_tensor_out": ("all-gather", 0),
    "all_gather_into_tensor_coalesced": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "reduce_scatter_tensor_out": ("reduce-scatter", 0),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 0),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 0),
    "shard_dim_alltoall": ("all-to-all", 0),
    "broadcast_": ("broadcast", 0),
    "broadcast": ("broadcast", 0),
    "send": ("point-to-point", 0),
    "isend": ("point-to-point", 0),
}
_BY_INPUT = ("all_gather_into_tensor", "all_gather_into_tensor_out", "all_gather_into_tensor_coalesced")
"""Their payload is this process's part, and not yet the whole."""
_SILENT = (
    "recv_",
    "recv_any_source_",
    "irecv",
    "wait_tensor",
    "_wrap_tensor_autograd",
    "check_for_nan",
    "barrier",
)
"""The other end of what is counted, or nothing."""


def _bytes(value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value))


def _group_of(args: list) -> dist.ProcessGroup:
    for value in args:
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return dist.ProcessGroup.unbox(value)
        if isinstance(value, str):
            with contextlib.suppress(Exception):
                return dist.distributed_c10d._resolve_process_group(cast("dist.GroupName", value))
    raise RuntimeError("a collective without a process group")


def _axes(world) -> dict[str, str]:
    """Name of a process group -> the axis it is of; where an axis is all processes, theirs goes by its name."""
    everybody = dist.group.WORLD
    assert everybody is not None, "there are groups"
    found: dict[str, str] = {everybody.group_name: "world"}
    for axis in AXES:
        if getattr(world.plan, axis) > 1:
            found[world.group(axis).group_name] = axis
    if world.tied_group is not None:
        found[world.tied_group.group_name] = "tied"
    return found


# --- bytes of sockets -----------------------------------------------------------------------------

_BYTES_SENT = 200
"""Where ``struct tcp_info`` has ``tcpi_bytes_sent`` (Linux 4.19): payload handed to the network, repeats included."""


def socket_bytes() -> dict[str, int]:
    """Bytes that each TCP socket of this process has sent since it was made, by the system's name of the socket.

    Raises ``OSError`` where the system does not count them.
    """
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(entry)
        except FileNotFoundError:  # of the listing itself
            continue
        if not name.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(entry.name))) as opened:
            if opened.type == socket.SOCK_STREAM and opened.family in (socket.AF_INET, socket.AF_INET6):
                info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                found[name] = struct.unpack_from("=Q", info, _BYTES_SENT)[0]
    return found


def _sent_since(before: dict[str, int]) -> int:
    """Of the sockets there are now: those of groups that are gone may have closed in between."""
    return sum(count - before.get(name, 0) for name, count in socket_bytes().items())


# --- a run ----------------------------------------------------------------------------------------


def count_step(config: TrainConfig, world, *, cache: bool = True, warm_up: int = WARM_UP) -> dict:
    """What this process sends in one optimiser step on random tokens, after ``warm_up`` others.

    Returns ``{"sent": {key: [bytes, calls]}, "socket_bytes": of the step}``. All processes call it at once.
    """
    from ..model import GPT
    from .engine import build_engine

    device = torch.device("cpu")

    def model_of(cuts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GPT(config.model, seed=config.seed, cuts=cuts)
        if config.precision == "bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        return model

    engine = build_engine(model_of, config, world, device)
    stages = _pipeline_stages(engine)
    draw = torch.Generator().manual_seed(1)
    rows = engine.rows
    for step in range(warm_up + 1):
        shape = (config.batch_size, config.model.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=draw)
        own = tokens[world.data_rank * rows : (world.data_rank + 1) * rows]
        counting = step == warm_up
        counter = Counter(world, stages)
        if counting:
            dist.barrier()
            before = socket_bytes()
        with counter if counting else contextlib.nullcontext():
            engine.optimizer.zero_grad()
            engine.backward(own[:, :-1], own[:, 1:])
            counter.phase = "norm"
            engine.optimizer.clip_grad_norm(config.optim.grad_clip)
            counter.phase = "update"
            engine.optimizer.step()
    dist.barrier()
    return {"sent": dict(counter.sent), "socket_bytes": _sent_since(before)}


def _pipeline_stages(engine) -> list:
    schedule = getattr(engine, "schedule", None)
    if schedule is None:
        return []
    return getattr(schedule, "_stages", None) or [schedule._stage]


def by_key(volumes: list[Volume], plan: ParallelPlan) -> dict[Key, list[int]]:
    """Bytes and calls of formulas, by what can be told of traffic."""
    several = [axis for axis in AXES if getattr(plan, axis) > 1]
    world = several[0] if len(several) == 1 else "world"
    found: dict[Key, list[int]] = defaultdict(lambda: [0, 0])
    for volume in volumes:
        phase = PHASES.get(volume.what, "backward")
        axis = world if volume.axis == "world" else volume.axis
        total = found[volume.kind, axis, phase, volume.boundary, volume.direction]
        total[0] += volume.bytes
        total[1] += volume.calls
    return dict(found)


def main(argv: list[str]) -> None:
    """Run the cases of the file ``argv[0]`` one after the other; rank 0 writes ``argv[1]``.

    A case: ``{"config": TrainConfig.to_dict(), "cache": bool}``. The answer has a list by rank for each.
    """
    from ..config import from_dict
    from .world import ManyProcesses

    torch.set_num_threads(1)
    cases, found = json.loads(Path(argv[0]).read_text()), []
    for case in cases:
        config = from_dict(case["config"])
        world = ManyProcesses(ParallelPlan.parse(config.parallel), "cpu", timeout_s=60)
        mine = count_step(config, world, cache=case.get("cache", True))
        everyone = [None] * world.size
        dist.all_gather_object(
            everyone, {"sent": [[*key, *value] for key, value in mine.pop("sent").items()], **mine}
        )
        found.append(everyone)
        world.close()
    if int(os.environ["RANK"]) == 0:
        Path(argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
