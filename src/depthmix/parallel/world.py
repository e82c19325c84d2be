"""The processes of one training: their groups, one answer for all of them, and whose fault it is when one is missing.

A training is one process (:class:`World`) or many (:class:`ManyProcesses`, started by ``torchrun``, which says who is
who in the environment). Both answer the same questions, so that the loop need not ask which it is.

**One answer.** Whatever decides how the loop goes on (a signal, a loss that is not finite, which checkpoint is the
newest) is decided for all ranks at once: otherwise one of them would leave while the others wait.

**Whose fault.** When a process dies or stalls, the collectives of all others fail, sooner or later, within the timeout:
at once where a connection breaks, and the others when those leave. The first to notice calls the roll in the store that
all share (:class:`_Roll`). A thread of every process answers, also while its training waits for another. Who does not
answer is at fault, or else who is busy with something that is no communication, and the finding is there for all. A
process that fails by itself leaves its reason in the store before it goes.
"""

import atexit
import contextlib
import datetime
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Interrupted, RunError, UserError
from .plan import AXES, ParallelPlan

TIMEOUT_S = 600.0
"""Seconds that a process waits for another in a collective, unless told otherwise."""
GRACE_S = 5.0
"""Seconds within which every living process answers when the roll is called."""


class World:
    """One process, alone."""

    plan = ParallelPlan()
    rank, size = 0, 1
    timeout_s = TIMEOUT_S
    """Seconds that a process waits for another in a collective."""

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

    def gather(self, value: Any) -> list:
        """``value`` of every process, by rank, on all."""
        return [value]

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

        # Its functions have the default group for a default argument. Imported while there is one, by DDP or DTensor,
        # they would hold it to the end of the process.
        import torch.distributed.nn.functional  # noqa: F401
        from torch.distributed.device_mesh import init_device_mesh

        size = int(os.environ.get("WORLD_SIZE", "1"))
        plan.check_processes(size)
        self.plan, self.timeout_s = plan, timeout_s
        self._dist = dist
        self._holders: list[weakref.WeakMethod] = []
        limit = datetime.timedelta(seconds=timeout_s)
        roll = None
        self._timeouts = _limit_new_groups(limit)
        try:
            self._store, self.rank, self.size = next(dist.rendezvous("env://", timeout=limit))
            life = _meet(self._store, self.rank, self.size, limit)
            roll = self._roll = _Roll(self._store, f"roll/{life}", self.rank, self.size)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                store=dist.PrefixStore(f"groups/{life}", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=limit,
            )
            sizes = tuple(getattr(plan, axis) for axis in AXES)
            self.mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        except (RuntimeError, ValueError) as error:
            found = "" if roll is None else roll.call(None)
            raise _lost(
                f"the {size} processes did not find each other within {timeout_s:g} s "
                f"({found or _first_line(error)}); check that all were started with the same rendezvous endpoint"
            ) from error
        self.place = plan.coordinates(self.rank)
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

    def gather(self, value):
        found = [None] * self.size
        self._dist.all_gather_object(found, value)
        return found

    def decide(self, answer):
        found: list[Any] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                found[0] = answer()
            except Exception as error:
                failed = error
                known = isinstance(error, (UserError, RunError, Interrupted))
                found[1] = (type(error) if known else RunError, str(error))
        self._dist.broadcast_object_list(found, 0)
        if failed is not None:
            raise failed
        if found[1] is not None:
            kind, message = found[1]
            repeated = kind(message)
            repeated.told = True  # by the first process
            raise repeated
        return found[0]

    def before_close(self, drop: Callable[[], None]) -> None:
        """Have ``drop``, a method of something that holds groups, called before they end, if its object is there then.

        DDP's reducer holds its group. Were it the last to, the group would end in the reducer's destructor, which
        waits, with Python's lock taken, for a thread of gloo's, and that thread may be waiting for the lock.
        """
        self._holders.append(weakref.WeakMethod(drop))

    def close(self):
        # A failed training leaves its groups as they are: to take them down needs the others.
        #
        # A group ends, and joins gloo's threads, when nothing holds it any longer. In a group that is held to the end
        # of the process they outlive Python. What such a thread still has of the last message it cannot release then,
        # and a process whose training ended well is aborted.
        for holder in self._holders:
            if (drop := holder()) is not None:
                drop()
        if self.mesh is not None:
            _take_groups_from(self.mesh)
        self.mesh = self.tied_group = None
        gc.collect()
        atexit.unregister(_collect)  # once, however many trainings this process has
        atexit.register(_collect)
        self._dist.destroy_process_group()
        self._roll.leave()
        _limit_new_groups(*self._timeouts)

    @contextlib.contextmanager
    def blame(self, where):
        try:
            yield
        except (UserError, RunError, Interrupted) as error:
            with _deaf():
                if getattr(error, "lost", False):
                    raise self._blamed(error, where) from error
                # Usually all ranks have the same. Where one alone fails, the others find its reason.
                self._roll.failed(str(error))
            raise
        except Exception as error:
            with _deaf():
                if _of_a_collective(error):
                    raise self._blamed(error, where) from error
                self._roll.failed(f"{type(error).__name__}: {error}")
            raise

    def _blamed(self, error: Exception, where: Callable[[], str]) -> RunError:
        """``error``, of a collective, as what the ranks that are silent, or that left a reason, did."""
        text = str(error).lower()
        late = "timed out" in text or "timeout" in text
        how = f"did not answer within {self.timeout_s:g} s" if late else None
        found = self._roll.call(how) or f"the processes lost each other ({_first_line(error)})"
        blamed = _lost(f"{found}. {where()}")
        # Who failed by itself may still be writing a checkpoint, which needs the others.
        blamed.lost = not self._roll.explained
        return blamed


def _meet(store, rank: int, size: int, limit: datetime.timedelta) -> str:
    """A word for this life of these processes, the same on all, and no other's; ``RuntimeError`` names who is missing.

    torchrun keeps one store for all lives of a job, with what the processes of former ones left there. So nothing
    counts but an answer to a word that is new: each says hello with one of its own, and rank 0, which alone knows the
    word of this life, tells it to every new hello until all have said that they have it.
    """
    seconds = limit.total_seconds()
    if rank:
        hello = uuid.uuid4().hex
        store.set(f"hello/{rank}", hello)
        try:
            store.wait([f"welcome/{hello}"], limit)
        except RuntimeError as error:
            raise RuntimeError("rank 0 never came") from error
        life = store.get(f"welcome/{hello}").decode()
        store.set(f"met/{life}/{rank}", "")
        return life
    life, until = uuid.uuid4().hex, time.monotonic() + seconds
    awaited, welcomed = set(range(1, size)), set()
    while True:
        awaited = {other for other in awaited if not store.check([f"met/{life}/{other}"])}
        if not awaited:
            return life
        if time.monotonic() > until:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(awaited)))} never came")
        for other in awaited:
            if (
                store.check([f"hello/{other}"])
                and (hello := store.get(f"hello/{other}").decode()) not in welcomed
            ):
                store.set(f"welcome/{hello}", life)
                welcomed.add(hello)
        time.sleep(0.02)


class _Roll:
    """Who is there: answers for this process, from a thread of its own, and finds out who else does.

    Keys of the store: ``who/RANK`` the process; ``called/RANK`` set to have it answer; ``here/RANK`` its answer, which
    says what its training is busy with, and nothing when that waits for others;
    ``failed/RANK`` why it failed by itself; ``finding`` what the first to call the roll found out.
    """

    def __init__(self, store, prefix: str, rank: int, size: int):
        import torch.distributed as dist

        self.rank, self.others = rank, [other for other in range(size) if other != rank]
        self._store = dist.PrefixStore(prefix, store)
        who = f"process {os.getpid()} on {socket.gethostname()}"
        self._own = f"rank {rank} ({who})"
        self._store.set(f"who/{rank}", who)
        # A connection of its own: a wait occupies one.
        self._answering = dist.PrefixStore(prefix, store.clone())
        self._thread = threading.Thread(target=self._answer, name="roll", daemon=True)
        self._thread.start()
        self.explained = False
        """Whether the roll was called, and some rank had left word of why it ended."""

    def _answer(self) -> None:
        while True:
            try:
                self._answering.wait([f"called/{self.rank}"], datetime.timedelta(days=20))  # of at most 24
                return self._answering.set(f"here/{self.rank}", _busy_with())
            except Exception as error:
                if "timeout" not in str(error).lower():
                    return  # the store is gone, and with it whoever could ask

    def leave(self) -> None:
        """Answer no more."""
        self._bounded(lambda: self._store.set(f"called/{self.rank}", ""), GRACE_S)
        self._thread.join(GRACE_S)

    def failed(self, reason: str) -> None:
        """Leave word of why this process ends, and answer no more."""
        self._bounded(lambda: self._store.set(f"failed/{self.rank}", reason), GRACE_S)
        self.leave()

    def call(self, how: str | None) -> str:
        """Who is at fault, and ``how`` if it is known: of those that do not answer. Empty if all do."""
        found = self._bounded(lambda: self._call(how), 3 * GRACE_S)
        if found is None:
            at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            keeper = "" if _launcher_keeps_store() or self.rank == 0 else ", and so is rank 0, which kept it"
            return f"the processes lost each other, and their store at {at} is out of reach{keeper}"
        # Over a broken link each side is silent to the other; the one with the store is first to say so.
        return f"to the others, {found}" if self._own in found else found

    def _call(self, how: str | None) -> str:
        called = [f"called/{rank}" for rank in self.others]
        self._store.multi_set(called, [""] * len(called))  # type: ignore[attr-defined]  # torch's stubs lack it
        until, silent, busy = time.monotonic() + GRACE_S, list(self.others), {}
        while silent and time.monotonic() < until:
            if finding := self._reasons() or self._has("finding"):
                return finding
            for rank in [rank for rank in silent if self._store.check([f"here/{rank}"])]:
                silent.remove(rank)
                busy[rank] = self._has(f"here/{rank}")
            time.sleep(0.05)
        found = self._reasons() or self._has("finding")
        if not found and silent:
            names = " and ".join(self._name(rank) for rank in silent)
            found = f"{names} {how or ('is gone' if len(silent) == 1 else 'are gone')}"
        elif not found and how:
            found = "; ".join(
                f"{self._name(rank)} {how}: it is {what}" for rank, what in busy.items() if what
            )
        return self._store.compare_set("finding", "", found).decode() if found else ""

    def _reasons(self) -> str:
        failed = {rank: self._has(f"failed/{rank}") for rank in self.others}
        self.explained = any(failed.values())
        return "; ".join(f"{self._name(rank)} failed: {text}" for rank, text in failed.items() if text)

    def _has(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._has(f'who/{rank}') or 'never seen'})"

    @staticmethod
    def _bounded(function: Callable[[], Any], seconds: float) -> Any:
        """What ``function`` returns; ``None`` if it fails, or takes longer, as over a broken link it may for ever."""
        found = []

        def run() -> None:
            with contextlib.suppress(Exception):
                found.append(function())

        thread = threading.Thread(target=run, name="roll call", daemon=True)
        thread.start()
        thread.join(seconds)
        return found[0] if found else None


def _busy_with() -> str:
    """Where the main thread is, if that is not in communication with others, as far as its Python frames tell."""
    main = threading.main_thread().ident
    stack = traceback.extract_stack(None if main is None else sys._current_frames().get(main))
    waits = (
        "torch/distributed/",
        "torch/autograd/",
        "torch/_ops.py",
    )  # gradients are exchanged during backward
    if not stack or any(where in frame.filename.replace(os.sep, "/") for frame in stack for where in waits):
        return ""
    return f"in {stack[-1].name} ({os.path.basename(stack[-1].filename)}, line {stack[-1].lineno})"


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Inside, a signal to end changes nothing: this process is ending, and has yet to say why."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher_keeps_store() -> bool:
    """Whether it is torchrun's, and so outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _take_groups_from(mesh) -> None:
    """Leave a mesh, and what was cut out of it, without its groups, whoever still holds it.

    DTensor's caches hold the meshes of the operations that they have seen, and torch 2.11 loses count of some.
    """
    # Private: a torch that does without one of them must not fail a training at its end.
    root = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    getattr(root, "_pg_registry", {}).clear()


def _collect() -> None:
    """At the end of the process, before Python's own: a model in a cycle of references may hold a mesh."""
    gc.collect()


def _limit_new_groups(
    gloo: datetime.timedelta, nccl: datetime.timedelta | None = None
) -> tuple[datetime.timedelta, datetime.timedelta | None]:
    """Have every process group that is made from now on, by whatever part of torch, wait that long; the limits before.

    A mesh, FSDP and a pipeline make groups with torch's default, half an hour, whatever that of the first group is.
    """
    from torch.distributed import distributed_c10d as c10d

    before = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout
    c10d.default_pg_timeout = gloo
    if before[1] is not None:  # None: torch has no NCCL
        c10d.default_pg_nccl_timeout = nccl or gloo
    return before


def _lost(message: str) -> RunError:
    """The error of a process whose others are lost: nothing in it that waits for them ends well."""
    error = RunError(message)
    error.lost = True
    return error


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
