"""Checkpoints that all processes of a run write together, in the background, and that any number reads.

Every process writes pieces (:mod:`.pieces`): boxes of whole tensors, as ``torch.distributed.checkpoint`` plans
them, in safetensors files that say where each box begins. A box that several processes hold (a replicated tensor,
a weight on two pipeline stages) is written by one of them, and the work is balanced by bytes. Loading
asks for other boxes of the same tensors, so a checkpoint fits any number of processes and any placement.

The promises are those of :mod:`depthmix.checkpoint`, for all processes together. All write into one hidden
folder beside; each file is synced and hashed by its writer; when the last one has answered, process 0 writes
the state and the manifest and renames the folder. A process that fails says so instead of answering, and all
raise the same error. Folders are on a file system that all processes see.

    save    copy the tensors to CPU memory, then return    (the only time that training waits)
    thread  write, sync, hash; gather the outcomes; commit; drop old checkpoints
    wait    until the thread is done; its error, if any

The thread talks to the other processes in a group of its own (gloo): messages of one group are matched by
their order, and training's are in another.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .. import checkpoint as files
from ..checkpoint import FORMAT, SHARDED, Kinds, kinds_of
from ..errors import RunError, UserError
from .pieces import Piece, Reader, fill_pieces, pieces_of, stored

PARTS = ("model", "optimizer")

T = TypeVar("T")


# --- processes that agree -------------------------------------------------------------------------


class _Failed(Exception):
    """What failed, and in which processes: the same text in all that are alive."""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError | safetensors.SafetensorError | ValueError):
        return files.reason(error)
    return f"{type(error).__name__}: {error}"


def _together(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """What ``function`` returns in each process, in all of them.

    When it raises in any, all raise: a ``UserError`` or ``RunError`` as it is, the first one; for other
    exceptions a ``_Failed`` that names the ranks.
    """
    values: list[T] = []
    error: UserError | RunError | str | None = None
    try:
        values = [function()]
    except (UserError, RunError) as stated:
        error = stated
    except Exception as unforeseen:
        error = _reason(unforeseen)
    outcomes = [(values, error)]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        try:
            dist.all_gather_object(outcomes, (values, error), group=group)
        except RuntimeError as lost:
            raise _Lost(group, lost) from lost
    failures: dict[int, str] = {}
    for rank, (_, found) in enumerate(outcomes):
        if isinstance(found, Exception):
            raise found
        if found is not None:
            failures[rank] = found
    _raise_failures(failures, len(outcomes))
    return [value for values, _ in outcomes for value in values]


class _Lost(_Failed):
    """Another process does not answer: what this one saw of it."""

    def __init__(self, group: dist.ProcessGroup | None, error: RuntimeError):
        # Gloo wraps its sentence in a source line and in advice on reporting it.
        said = re.sub(r"^(\[[^\]]*\]\s*)+|\. This is typically.*", "", str(error).splitlines()[0])
        super().__init__(f"rank {dist.get_rank(group)} lost another, which died or took too long ({said})")


def _stated(message: str, failed: _Failed) -> RunError:
    """``failed`` for the user; ``lost`` says whether another process is."""
    error = RunError(message)
    error.lost = isinstance(failed, _Lost)
    return error


def _raise_failures(failures: dict[int, str], ranks: int) -> None:
    """Raise ``_Failed`` when there are any: reasons by rank, ranks of one reason together."""
    if not failures:
        return
    if ranks == 1:
        raise _Failed(*failures.values())
    alike: dict[str, list[int]] = {}
    for rank, text in sorted(failures.items()):
        alike.setdefault(text, []).append(rank)
    raise _Failed("; ".join(f"rank {', '.join(map(str, who))}: {text}" for text, who in alike.items()))


def _gloo(timeout_s: float | None) -> dist.ProcessGroup | None:
    """A group of all processes for messages of the CPU; None where there is one process."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s) if timeout_s else None)


@contextlib.contextmanager
def _group_for_now() -> Iterator[dist.ProcessGroup | None]:
    """With the default timeout of new groups, which :mod:`.world` sets."""
    group = _gloo(None)
    try:
        yield group
    finally:
        if group is not None:
            dist.destroy_process_group(group)


# --- writing --------------------------------------------------------------------------------------


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans the writing of a dictionary of :class:`Piece`; torch then checks that they cover every tensor."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                MetadataIndex(name, piece.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    piece.chunk, TensorProperties(dtype=piece.tensor.dtype), torch.Size(piece.shape)
                ),
            )
            for name, piece in self.state_dict.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _Writer(HuggingFaceStorageWriter):
    """Writes a process's pieces to one file, synced, and remembers its hash.

    Not torch's own writing, which makes a second copy of everything in memory first.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.written: dict[str, dict] = {}
        """In process 0, at the end: every process's files, with size and SHA-256."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            path = Path(self.path, f"shard-{plan.storage_data['shard_index']:05d}.safetensors")
            offsets = {
                item.index.fqn: {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
                for item in plan.items
                if item.tensor_data is not None
            }
            files.write_tensors(
                path,
                {item.index.fqn: _tensor_of(item, planner) for item in plan.items},
                {CUSTOM_METADATA_KEY: json.dumps(offsets), "format": "pt"},
            )
            entry = files.entry(path)
            results = [WriteResult(item.index, entry["bytes"], (path.name, entry)) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.written = dict(result.storage_data for written in results for result in written)


def _tensor_of(item: WriteItem, planner: SavePlanner) -> Tensor:
    found = planner.resolve_data(item)
    assert isinstance(found, Tensor)  # all that _SavePlanner plans
    return found


def _owned(pieces: list[dict], rank: int) -> set[tuple[str, str]]:
    """Which of its pieces, by part and name, process ``rank`` writes.

    ``pieces[r]`` describes what process r holds: ``(part, name) -> (box, shape, dtype, bytes)``. Each box goes
    to the process that has least to write so far, large ones first. Raises ``ValueError`` when processes
    hold different tensors under one name.
    """
    holders: dict[tuple, list[int]] = {}
    kinds: dict[tuple[str, str], tuple] = {}
    for holder, described in enumerate(pieces):
        for key, (box, shape, dtype, size) in described.items():
            if kinds.setdefault(key, (shape, dtype)) != (shape, dtype):
                raise ValueError(
                    f"{key[1]} is {dtype} {list(shape)} in rank {holder} and "
                    f"{kinds[key][1]} {list(kinds[key][0])} in a rank before it"
                )
            holders.setdefault((size, key, box), []).append(holder)
    load, mine = [0] * len(pieces), set()
    for (size, key, _), who in sorted(holders.items(), reverse=True):
        writer = min(who, key=lambda r: (load[r], r))
        load[writer] += size
        if writer == rank:
            mine.add(key)
    return mine


class ShardedCheckpoints:
    """The checkpoints of one run, written by all its processes. Every method is called by all of them.

    Names, shapes and placements of the tensors stay as they were at the first :meth:`save`. Without a process
    group, the one process writes alone. Ends with :meth:`close`, or as a context manager, before the process
    group does.
    """

    def __init__(self, folder: Path, *, keep_last: int, asynchronous: bool = True, timeout_s: float = 1800.0):
        """``folder`` is RUN/checkpoints. ``timeout_s``: how long processes wait for the slowest to write."""
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._group = _gloo(timeout_s)
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
        self._described: dict | None = None
        """What this process holds, as at the first save."""
        self._mine: set[tuple[str, str]] = set()
        """What of it this process writes, by part and name."""
        self._staged: dict[str, dict[str, Piece]] = {}
        """Copies in CPU memory by part and name, used again at every save."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._newest = _newest(self._group, self.folder)

    def __enter__(self) -> "ShardedCheckpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Let the save in flight end, whatever comes of it, and leave the group."""
        if self._thread is not None:
            self._thread.join()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict,
        best: dict | None,
    ) -> None:
        """Write checkpoint ``step``, name the best one in ``best.json`` and drop old ones.

        ``weights`` and ``optimizer`` hold live tensors by name: DTensors, or plain ones that are the same in
        every process that has the name. ``state`` is process 0's part of ``state.json`` and ``best`` its
        ``{"step": k, "val_loss": x}``; other processes' are not looked at. A whole checkpoint of the same step
        is left as it is. Waits for the save before; raises its ``RunError``, or of this one when not
        asynchronous. When asynchronous, returns as soon as the tensors are copied: they may change then.
        """
        self.wait()
        live = {"model": weights, "optimizer": optimizer}
        if self._described is None:
            try:
                self._plan(live)
            except (_Failed, ValueError) as failed:
                raise self._not_written(step, failed) from failed
        trouble = text = None
        try:
            self._stage(live)
            text = json.dumps(state, allow_nan=False) if self._rank == 0 else None
        except Exception as error:  # told to the others by the thread, which they wait for
            trouble = error
        arguments = step, text, best, trouble
        if self.asynchronous:
            # Not a daemon: a process that ends for another reason lets the others' checkpoint get whole.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(*arguments)
            self.wait()

    def wait(self) -> Path | None:
        """Wait until the save in flight, if any, is whole on the disk; the newest whole checkpoint.

        Raises ``RunError``, the same in all processes, when one of them could not write: which, and why. What
        was saved before stays.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._newest

    def _target(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # --- what training waits for

    def _plan(self, live: dict[str, dict[str, Tensor]]) -> None:
        described = _together(self._group, lambda: self._describe(self._held(live)))
        self._mine = _owned(described, self._rank)
        self._described = described[self._rank]

    @staticmethod
    def _held(live: dict[str, dict[str, Tensor]]) -> dict[tuple[str, str], Piece]:
        return {(part, name): piece for part, held in live.items() for name, piece in pieces_of(held).items()}

    @staticmethod
    def _describe(held: dict[tuple[str, str], Piece]) -> dict[tuple[str, str], tuple]:
        return {
            key: (piece.box, piece.shape, piece.tensor.dtype, piece.tensor.nbytes)
            for key, piece in held.items()
        }

    def _stage(self, live: dict[str, dict[str, Tensor]]) -> None:
        """Copy this process's share into CPU memory; pinned, all copies at once, where it is on a GPU."""
        held = self._held(live)
        if self._describe(held) != self._described:
            raise ValueError("names, shapes or placements of the tensors are not those of the first save")
        if not self._staged:
            self._staged = {part: {} for part in PARTS}
            for part, name in self._mine:
                piece = held[part, name]
                copy = torch.empty(
                    piece.tensor.shape,
                    dtype=piece.tensor.dtype,
                    pin_memory=piece.tensor.is_cuda and piece.tensor.numel() > 0,
                )
                self._staged[part][name] = Piece(copy, piece.offsets, piece.shape)
        devices = set()
        for part, copies in self._staged.items():
            for name, piece in copies.items():
                tensor = held[part, name].tensor
                piece.tensor.copy_(tensor, non_blocking=True)
                devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    # --- what the thread does

    def _write(self, step: int, state: str | None, best: dict | None, trouble: Exception | None) -> None:
        """Write what is staged; leave the outcome in ``_newest`` and ``_error``."""
        try:
            self._newest = self._write_all(step, state, trouble)
            _together(self._group, lambda: self._prune(best))
        except _Failed as failed:
            self._error = self._not_written(step, failed)
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether this process knows already that :meth:`wait` will raise."""
        return self._error is not None

    def _not_written(self, step: int, error: Exception) -> RunError:
        lost = isinstance(error, _Lost)
        found = files.not_written(
            self._target(step), str(error), "Go on with --resume." if lost else files.ROOM
        )
        found.lost = lost
        return found

    def _write_all(self, step: int, state: str | None, trouble: Exception | None) -> Path:
        """Write and commit; the checkpoint. ``state`` is process 0's, as JSON."""
        beside = None

        def begin() -> str | None:
            nonlocal beside
            if trouble is not None:
                raise trouble
            if self._rank == 0:
                beside = files.prepare(self.folder, step)
            return None if beside is None else beside.name

        try:
            hidden = _together(self._group, begin)[0]
            if hidden is not None:
                written: dict[str, dict] = {}
                for part in PARTS:
                    written |= self._write_part(part, self.folder / hidden)
                _together(self._group, lambda: self._commit(beside, step, state, written))
        except Exception:
            # On a full disk the half-written files are the first thing to give back.
            if beside is not None:
                files.discard(beside)
            raise
        return self._target(step)

    def _write_part(self, part: str, beside: Path) -> dict[str, dict]:
        """Write this process's share of a part; in process 0, size and hash of every process's files."""
        writer = _Writer(beside / part)
        try:
            with _quiet(self._group):
                dcp.save(
                    self._staged[part],
                    storage_writer=writer,
                    planner=_SavePlanner(),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            ranks = 1 if self._group is None else dist.get_world_size(self._group)
            _raise_failures({rank: _reason(found) for rank, (found, _) in error.failures.items()}, ranks)
        except RuntimeError as error:
            raise _Lost(self._group, error) from error
        return {f"{part}/{name}": entry for name, entry in writer.written.items()}

    def _commit(self, beside: Path | None, step: int, state: str | None, written: dict[str, dict]) -> None:
        if self._rank != 0:
            return
        assert beside is not None and state is not None  # process 0 has both
        for name, entry in written.items():
            if not (beside / name).exists() or (beside / name).stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{beside / name} is not there as its writer left it: "
                    f"the run folder must be on a file system that all processes share"
                )
        header = {"format": FORMAT, "layout": SHARDED, "step": step}
        files.commit(beside, {**header, **json.loads(state), "versions": files.versions()}, written)

    def _prune(self, best: dict | None) -> None:
        if self._rank == 0:
            files.record_best(self.folder, best)
            files.prune_checkpoints(self.folder, self.keep_last)


@contextlib.contextmanager
def _quiet(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    import warnings

    if group is not None:  # the filter is of the whole interpreter, so it is touched only where it must be
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# --- finding and loading --------------------------------------------------------------------------


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` (RUN/checkpoints), chosen by process 0 for all."""
    with _group_for_now() as group:
        return _newest(group, Path(folder))


def _newest(group: dist.ProcessGroup | None, folder: Path) -> Path | None:
    def choose() -> str | None:
        found = files.latest_checkpoint(folder) if group is None or dist.get_rank(group) == 0 else None
        return None if found is None else found.name

    try:
        name = _together(group, choose)[0]
    except _Failed as failed:
        raise _stated(f"cannot look for checkpoints in {folder}: {failed}", failed) from failed
    return None if name is None else folder / name


def _saved_kinds(metadata: Metadata) -> Kinds:
    return {name: (found.properties.dtype, tuple(found.size)) for name, found in stored(metadata).items()}


def load_into(checkpoint: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict:
    """Fill live tensors with what a checkpoint holds, in place; its ``state.json``.

    Called by all processes, or by one without a process group. ``weights`` and ``optimizer`` are as for
    :meth:`ShardedCheckpoints.save`, with any placement and any number of processes; together the processes
    name all tensors of the checkpoint. With ``optimizer`` empty in all, weights only are read. Each process
    verifies the hashes of a share of the files.

    Raises, in all processes, ``UserError`` when ``checkpoint`` is no checkpoint, and ``RunError`` when it is
    damaged, naming the file, or does not fit the tensors.
    """
    checkpoint = Path(checkpoint)
    live = {"model": weights, "optimizer": optimizer}
    with _group_for_now() as group:
        try:
            return _load_together(group, checkpoint, live)
        except _Failed as failed:
            raise _stated(f"cannot load checkpoint {checkpoint}: {failed}", failed) from failed


def _load_together(
    group: dist.ProcessGroup | None, checkpoint: Path, live: dict[str, dict[str, Tensor]]
) -> dict:
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    _together(group, lambda: files.check_is_folder(checkpoint))
    needed: dict[str, Kinds] = {part: {} for part in PARTS}
    for kinds in _together(group, lambda: {part: kinds_of(tensors) for part, tensors in live.items()}):
        for part in PARTS:
            needed[part] |= kinds[part]
    parts = PARTS if needed["optimizer"] else PARTS[:1]

    def verify() -> None:
        share = _shares(files.sizes(checkpoint, training=len(parts) > 1), ranks)[rank]
        if (wrong := files.problem(checkpoint, share)) is not None:
            raise files.damaged(checkpoint, wrong)

    readers: dict[str, Reader] = {}
    metadata: dict[str, Metadata] = {}

    def fit() -> dict:
        for part in parts:
            readers[part] = Reader(checkpoint, files.files_of(checkpoint, part))
            metadata[part] = readers[part].read_metadata()
            files.check_fit(needed[part], _saved_kinds(metadata[part]), files.place(checkpoint, part))
        return files.read_state(checkpoint)

    def fill() -> None:
        for part in parts:
            fill_pieces(readers[part], metadata[part], pieces_of(live[part]))

    _together(group, verify)
    state = _together(group, fit)[0]
    _together(group, fill)
    return state


def _shares(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Names for each of ``ranks`` processes, about as many bytes for each."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name, size in sorted(sizes.items(), key=lambda found: (-found[1], found[0])):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += size
    return shares
