"""The processes of one training: their groups, one answer for all of them, and whose fault it is when one is missing.

A training is one process (:class:`World`) or many (:class:`ManyProcesses`, started by ``torchrun``, which says who is
who in the environment). Both answer the same questions, so that the loop need not ask which it is.

**One answer.** Whatever decides how the loop goes on (a signal, a loss that is not finite, which checkpoint is the
newest) is decided for all ranks at once: otherwise one of them would leave while the others wait.

**Whose fault.** When a process dies or stalls, the collectives of all others fail, sooner or later, within the timeout.
Each then says so in the store that all share, and what remains silent is named. A process that fails by itself leaves
its reason there before it goes.
"""

import contextlib
import datetime
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Interrupted, RunError, UserError
from .plan import AXES, ParallelPlan

TIMEOUT_S = 600.0
"""Seconds that a process waits for another in a collective, unless told otherwise."""
GRACE_S = 5.0
"""Seconds within which every living process has said that its collective failed too, once one has."""


_worlds = itertools.count()
"""Numbers the worlds of this process, one after the other: their keys in the store must differ."""


class World:
    """One process, alone."""

    plan = ParallelPlan()
    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes the logs and speaks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of ``plan.data_ways`` parts of a batch is this process's."""
        return 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process; the same answer on all."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, to the same bits on all."""
        return values

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each over all processes."""
        return list(values)

    def same(self, values: Tensor) -> Tensor:
        """The first process's ``values``, on all."""
        return values

    def decide(self, answer: Callable[[], Any]) -> Any:
        """What ``answer()`` returns on the first process, on all; what it raises is raised on all."""
        return answer()

    def close(self) -> None:
        """Part in peace."""

    @contextlib.contextmanager
    def blame(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the failure of a collective inside into a ``RunError`` that names the process at fault.

        ``where()`` says how far the training is and what is saved.
        """
        yield


def launched() -> bool:
    """Whether ``torchrun``, or something like it, started several processes and this is one of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one to print what all of them have to say."""
    return int(os.environ.get("RANK", "0")) == 0


class ManyProcesses(World):
    """This process among ``plan.processes`` others; made by all of them at once.

    ``mesh`` is a ``DeviceMesh`` with dimensions ``pp, dp, fsdp, tp``. CPU tensors travel by gloo, CUDA tensors by NCCL.

    Args:
        plan: checked against the number of processes.
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout_s: seconds that a collective waits for a process.

    Raises:
        UserError: the plan does not fit the number of processes.
        RunError: not all of them came.
    """

    def __init__(self, plan: ParallelPlan, device_type: str, timeout_s: float = TIMEOUT_S):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        size = int(os.environ.get("WORLD_SIZE", "1"))
        plan.check_processes(size)
        self.plan, self.timeout_s = plan, timeout_s
        self._dist = dist
        limit = datetime.timedelta(seconds=timeout_s)
        try:
            self._store, self.rank, self.size = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                store=dist.PrefixStore(f"groups/{next(_worlds)}", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=limit,
            )
            self._store.set(f"who/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
            sizes = tuple(getattr(plan, axis) for axis in AXES)
            self.mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"rank {os.environ.get('RANK', '?')}: the {size} processes did not find each other within "
                f"{timeout_s:g} s ({error}); check that all were started with the same rendezvous endpoint"
            ) from error
        self.place = plan.coordinates(self.rank)
        self._update_mesh = None
        self.tied_group = self._tied_group()

    def _tied_group(self):
        """The group of this process's two stages that hold the embedding, if there are two and this is one of them."""
        plan, mine = self.plan, None
        last = (plan.stages - 1) % plan.pp
        if plan.pp > 1:
            for ranks in self.mesh.mesh.reshape(plan.pp, -1).T.tolist():
                group = self._dist.new_group([ranks[0], ranks[last]])
                if self.rank in (ranks[0], ranks[last]):
                    mine = group
        return mine

    @property
    def data_rank(self) -> int:
        return self.place["dp"] * self.plan.fsdp + self.place["fsdp"]

    def group(self, axis: str):
        """The process group of those that differ from this one in ``axis`` alone."""
        return self.mesh.get_group(axis)

    @property
    def update_mesh(self):
        """Of the processes with the same stage: ``dp, tp, fsdp``, in the order in which matrices are divided."""
        if self._update_mesh is None:
            if self.plan.tp > 1 and self.plan.fsdp > 1:
                from torch.distributed.device_mesh import DeviceMesh

                ranks = self.mesh.mesh.permute(0, 1, 3, 2)
                whole = DeviceMesh(self.mesh.device_type, ranks, mesh_dim_names=("pp", "dp", "tp", "fsdp"))
                self._update_mesh = whole["dp", "tp", "fsdp"]
            else:
                names = [axis for axis in ("dp", "tp", "fsdp") if getattr(self.plan, axis) > 1]
                self._update_mesh = self.mesh[tuple(names)] if names else None
        return self._update_mesh

    def any(self, flag):
        found = torch.tensor([float(flag)])
        self._dist.all_reduce(found, self._dist.ReduceOp.MAX)
        return bool(found.item())

    def sum(self, values):
        self._dist.all_reduce(values)
        return values

    def max(self, values):
        found = torch.tensor(list(values), dtype=torch.float64)
        self._dist.all_reduce(found, self._dist.ReduceOp.MAX)
        return found.tolist()

    def same(self, values):
        self._dist.broadcast(values, 0)
        return values

    def decide(self, answer):
        found = [None, None]
        if self.first:
            try:
                found[0] = answer()
            except (UserError, RunError, Interrupted) as error:
                found[1] = (type(error), str(error))
        self._dist.broadcast_object_list(found, 0)
        if found[1] is not None:
            kind, message = found[1]
            raise kind(message)
        return found[0]

    def close(self):
        # A failed training leaves its groups as they are: to take them down needs the others.
        self._dist.destroy_process_group()

    @contextlib.contextmanager
    def blame(self, where):
        try:
            yield
        except (UserError, RunError, Interrupted) as error:
            # Usually all ranks have the same. Where one alone fails, the others find its reason.
            self._report(str(error))
            raise
        except Exception as error:
            if not _of_a_collective(error):
                self._report(f"{type(error).__name__}: {error}")
                raise
            raise RunError(f"{self._who_is_at_fault(error)}. {where()}") from error

    def _report(self, reason: str) -> None:
        with contextlib.suppress(Exception):
            self._store.set(f"failed/{self.rank}", reason)

    def _who_is_at_fault(self, error: Exception) -> str:
        """A clause about the ranks that are silent, or that left a reason."""
        self._report("")
        others = [rank for rank in range(self.size) if rank != self.rank]
        reasons: dict[int, str] = {}
        until = time.monotonic() + GRACE_S
        try:
            while len(reasons) < len(others) and time.monotonic() < until:
                for rank in others:
                    if rank not in reasons and self._store.check([f"failed/{rank}"]):
                        reasons[rank] = self._store.get(f"failed/{rank}").decode()
                if any(reasons.values()):
                    break  # somebody says why
                time.sleep(0.1)
            failed = [f"{self._name(rank)} failed: {text}" for rank, text in reasons.items() if text]
            if failed:
                return "; ".join(failed)
            silent = [rank for rank in others if rank not in reasons]
            if silent:
                timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
                how = f"did not answer within {self.timeout_s:g} s" if timed_out else "is gone"
                return f"{' and '.join(self._name(rank) for rank in silent)} {how}"
            return f"the processes lost each other ({_first_line(error)})"
        except Exception as store_error:  # the store is gone too
            return f"the processes lost each other ({_first_line(error)}; {_first_line(store_error)})"

    def _name(self, rank: int) -> str:
        who = self._store.get(f"who/{rank}").decode() if self._store.check([f"who/{rank}"]) else "never seen"
        return f"rank {rank} ({who})"


def _of_a_collective(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is of communication with other processes."""
    import torch.distributed as dist

    signs = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe", "[rank")
    while error is not None:
        if isinstance(error, (dist.DistError, ConnectionError)):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
