"""A stream of documents, of the Hugging Face hub or of parquet files, into a prepared folder that can be stopped.

The stream is what ``datasets`` reads with ``streaming=True``: file after file, one column, nothing kept on the disk.
A place in it is two numbers, file and row, so it can be taken up anywhere. Blocks of documents are tokenized by the
same threads and written by the same writers as :mod:`.build` has, in the order in which they were read.

Until it is complete the folder lies beside its place under a hidden name::

    .NAME.partial/state.json       place in the stream, and how much of every shard was written before it
    .NAME.partial/train-00000.bin

``state.json`` is replaced, after the shards were synced, whenever a shard is full, every ``COMMIT_SECONDS``, and when
a signal arrives. What a shard holds beyond it is cut off when the work goes on; as the shards depend on the order of
documents alone, they are then, to the byte, those of a run that never stopped.

The last document is the first at which ``tokens`` are reached, both splits and their end tokens counted.
"""

import bisect
import contextlib
import glob
import hashlib
import inspect
import itertools
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..config import check_held_out
from ..durable import fsync
from ..errors import Interrupted, RunError, UserError
from .shards import (
    FORMAT_VERSION,
    SHARD_TOKENS,
    TEST,
    SplitWriter,
    _checksum,
    is_dataset,
    mark_verified,
    read_manifest,
    split_names,
    verify_shards,
    write_manifest,
)
from .sources import BLOCK_BYTES, RowBlock, _no_field
from .tokenizers import Tokenizer, bpe_size, load_tokenizer
from .writing import (
    NO_ROOM,
    Bounds,
    Tokenized,
    cores,
    is_there,
    lock_path,
    locked,
    manifest_of,
    refusals,
    tokenize,
    user_path,
)

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset
    from rich.progress import Progress

FINEWEB = "HuggingFaceFW/fineweb"
SUBSET = "sample-10BT"
COMMIT_SECONDS = 30.0
"""Seconds after which the state is saved where no shard became full."""
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)
"""Waits before a stream that broke off is opened again; a row that arrives starts them anew."""
ROWS_AT_ONCE = 256
SPARE_BYTES = 64 << 20
"""Room on the disk beyond the tokens themselves."""


@dataclass(frozen=True)
class StreamConfig:
    """What decides the content of a streamed dataset."""

    source: tuple[str, ...] = (FINEWEB,)
    """A dataset of the hub; or parquet files, folders and globs of them, addresses (http, https) of them; or a folder
    that is a copy of a dataset's repository, README.md with its ``configs`` included."""
    subset: str = SUBSET
    """Configuration of the dataset; of no meaning where ``source`` names files."""
    revision: str | None = None
    """Commit, tag or branch of the dataset; None: the newest. A commit is kept until the work is finished."""
    tokens: int = 10_000_000_000
    """Tokens to write, all splits together."""
    tokenizer: str = "gpt2"
    text_field: str = "text"
    val_fraction: float = 0.005
    """Share of the documents held out for validation, by a hash of their text."""
    test_fraction: float = 0.0
    """Share of the documents held out for a last test; 0: none."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"tokens must be at least 1, got {self.tokens}")
        check_held_out(self.val_fraction, self.test_fraction)
        if bpe_size(self.tokenizer) is not None:
            raise UserError(
                f"tokenizer {self.tokenizer!r} learns from the text first, and a stream is read once; use gpt2 or byte"
            )


def prepare_stream(
    config: StreamConfig,
    out: Path | str,
    *,
    workers: int | None = None,
    progress: bool = False,
    restart: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Make, or finish, or find the prepared folder ``out``; return its path.

    ``workers``: threads that tokenize, default one a core. ``restart``: forget what an unfinished call has left.

    Raises ``UserError`` for a request that cannot be met, ``RunError`` for a network that is not there, a damaged
    file or a full disk, ``Interrupted`` after a signal. What was written until then is kept, but for a
    ``UserError``, and the same call goes on from there.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    folder = user_path(out).resolve()
    if os.path.ismount(folder):
        raise UserError(f"{folder} is a mount point, which no folder can replace; name one inside it")
    tokenizer = load_tokenizer(config.tokenizer)
    sources = _named(config.source)
    settings = _key(config, sources, shard_tokens)
    if is_there(folder, _final_key(settings, sources)):
        return folder
    with contextlib.ExitStack() as stack:
        with refusals(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(lock_path(folder), wait=False)):
                raise UserError(f"another process is making {folder}; wait for it or choose another --out")
        partial = folder.parent / f".{folder.name}.partial"
        if restart:
            shutil.rmtree(partial, ignore_errors=True)
        work = _Work(config, partial, folder, settings, sources, tokenizer, shard_tokens)
        try:
            work.run(workers or cores(), progress)
        except UserError:
            if not work.state["places"]:  # nothing was read yet
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise work.no_room(error) from error
    return folder


# ---- the stream ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """What ``source`` names: parquet files or, where ``files`` is empty, a dataset."""

    dataset: str
    files: tuple[str, ...]


def _stamps(files: tuple[str, ...]) -> list[list[int]]:
    """Size and time of every file that lies here; nothing for an address."""
    found = (None if _is_address(name) else os.stat(name) for name in files)
    return [[] if status is None else [status.st_size, status.st_mtime_ns] for status in found]


def _is_address(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+]*://", name) is not None


def _named(source: tuple[str, ...]) -> _Named:
    if not source:
        raise UserError(f"no source named; the default is {FINEWEB}")
    files: list[str] = []
    for given in source:
        path = user_path(given)
        if _is_address(given):
            found = [given]
        elif path.is_file():
            found = [str(path.resolve())]
        elif path.is_dir() and not (path / "README.md").exists():
            found = sorted(str(file.resolve()) for file in path.rglob("*.parquet"))
            if not found:
                raise UserError(f"folder {path} holds no .parquet file")
        elif path.is_dir() or (re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not glob.has_magic(given)):
            if len(source) > 1:
                raise UserError(f"--source {given} is a dataset; name it alone, or name parquet files")
            return _Named(str(path.resolve()) if path.is_dir() else given, ())
        else:
            found = sorted(str(Path(name).resolve()) for name in glob.glob(str(path), recursive=True))
            if not found:
                raise UserError(
                    f"--source {given!r} is no file, no folder, and no file matches it; a dataset of the hub is "
                    f"written OWNER/NAME, for example {FINEWEB}"
                )
        files += found
    return _Named("", tuple(dict.fromkeys(files)))


@dataclass(frozen=True)
class _Stream:
    """An opened stream of texts."""

    data: "IterableDataset"
    """A shard of it is a file."""
    files: tuple[str, ...]
    revision: str | None
    """Commit of the hub."""
    builder: "DatasetBuilder"
    """What made ``data``."""

    def texts(self, file: int, row: int) -> Iterator[list[str | None]]:
        """Texts of one file from ``row`` on, some at a time. Row groups that end before it are not read."""
        seen, tables = self._tables(file, row)
        for table in tables:
            skip = max(0, row - seen)
            seen += table.num_rows
            for first in range(skip, table.num_rows, ROWS_AT_ONCE):
                yield table.column(0).slice(first, ROWS_AT_ONCE).to_pylist()

    def _tables(self, file: int, row: int) -> tuple[int, Iterator]:
        """Tables of one file, and the row with which they begin: the first, or that of a row group."""
        make = getattr(self.builder, "_generate_tables", None)
        if row and make is not None and "row_groups_list" in inspect.signature(make).parameters:
            starts = self._row_groups(self.files[file])
            group = bisect.bisect_right(starts, row) - 1
            wanted = tuple(range(group, len(starts) - 1))
            # What the stream itself calls with every row group: datasets has no public way to begin at one.
            tables = make(files=[self.files[file]], row_groups_list=[wanted]) if wanted else ()
            return starts[group], (table for _, table in tables)
        one = self.data.shard(num_shards=len(self.files), index=file).with_format("arrow")
        return 0, one.iter(batch_size=ROWS_AT_ONCE)

    def _row_groups(self, name: str) -> list[int]:
        """Rows before each row group, and all rows, by the file's footer."""
        import fsspec
        from pyarrow import parquet

        # As datasets has it: proxies of the environment.
        options = {"client_kwargs": {"trust_env": True}} if name.startswith("http") else {}
        with fsspec.open(name, "rb", **options) as file:
            footer = parquet.read_metadata(file)
        sizes = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        return [*itertools.accumulate(sizes, initial=0)]


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            'streaming needs a package that is not installed: pip install "depthmix[fineweb]"'
        ) from error
    return datasets


def _open(config: StreamConfig, named: _Named, revision: str | None) -> _Stream:
    """Raises ``UserError`` for what is not there, ``RunError`` for what cannot be reached or read."""
    datasets = _import_datasets()
    import pyarrow

    field = config.text_field

    def load(**options: Any) -> "tuple[DatasetBuilder, IterableDataset]":
        if named.files:
            builder = datasets.load_dataset_builder("parquet", data_files=list(named.files), **options)
        else:
            builder = datasets.load_dataset_builder(
                named.dataset, config.subset, revision=revision or config.revision, **options
            )
        return builder, builder.as_streaming_dataset(split="train")

    name = named.dataset or named.files[0]
    try:
        builder, data = load(columns=[field])
        files = tuple(map(str, builder.config.data_files["train"]))
        if data.features is not None and field not in data.features:
            _, whole = load()
            raise UserError(f"{name}: {_no_field(field, whole.features)}")
        kind = data.features and getattr(data.features[field], "dtype", "a structure")
        if kind not in (None, "string", "large_string"):
            raise UserError(
                f"{name}: column {field!r} holds {kind}, not text; name another with --text-field"
            )
    except UserError:
        raise
    except pyarrow.ArrowException as error:
        raise _damaged(name, error) from error
    except FileNotFoundError as error:
        if _is_address(name):  # also what is said where no server answers
            raise _unreachable(name, error) from error
        raise UserError(
            f"{name} is not there ({error}); check the name, and HF_TOKEN if it is not public"
        ) from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise _unreachable(name, error) from error
    commit = re.search(r"@([0-9a-f]{40})/", files[0])
    return _Stream(data, files, commit[1] if commit else None, builder)


def _unreachable(name: str, error: Exception) -> RunError:
    return RunError(
        f"{name} cannot be reached ({_first_line(error)}). Check the name and the network (HTTPS_PROXY names a proxy, "
        f"HF_ENDPOINT a mirror, HF_TOKEN lifts limits), or name parquet files fetched elsewhere with --source"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _DamagedFile(RunError):
    pass


def _damaged(name: str, error: Exception) -> RunError:
    return _DamagedFile(
        f"{name} is damaged or not a parquet file ({_first_line(error)}); get the file again, then give the same "
        f"command: it goes on from there"
    )


def _is_damage(name: str, error: Exception) -> bool:
    import pyarrow

    if _is_address(name):  # may be what arrived of it: worth another try
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return False
    return isinstance(error, pyarrow.ArrowException) or (isinstance(error, OSError) and error.errno is None)


@dataclass(frozen=True)
class _Place:
    """The next row to read."""

    file: int
    row: int


_Read = tuple[RowBlock, int, _Place]
"""A block, the number of its file, and the place behind it."""


def _blocks(
    stream: _Stream, start: _Place, wait: Callable[[float], bool], tell: Callable[[str], None]
) -> Iterator[_Read]:
    """Blocks of about 1 MiB.

    ``wait(seconds)`` is true when nobody wants more; ``tell`` is given notes for the user.
    """
    for file in range(start.file, len(stream.files)):
        row = start.row if file == start.file else 0
        held, size, tries = [], 0, 0
        while True:
            try:
                for texts in stream.texts(file, row):
                    tries = 0
                    row += len(texts)
                    kept = [text for text in texts if text]
                    held += kept
                    size += sum(map(len, kept))
                    if size >= BLOCK_BYTES:
                        yield RowBlock(held), file, _Place(file, row)
                        held, size = [], 0
                break
            except Exception as error:
                name = stream.files[file]
                if _is_damage(name, error):
                    raise _damaged(name, error) from error
                if tries == len(RETRY_SECONDS):
                    raise RunError(
                        f"the stream broke off in {name} at row {row:,} ({_first_line(error)}) and did not come back "
                        f"in {tries} tries; everything before is kept, the same command goes on from there"
                    ) from error
                seconds = RETRY_SECONDS[tries]
                tries += 1
                tell(f"{name} broke off at row {row:,} ({_first_line(error)}); again in {seconds} s")
                if wait(seconds):
                    return
        yield RowBlock(held), file, _Place(file + 1, 0)


class _Ahead:
    """Reads blocks in a thread of its own, a few ahead of their use."""

    def __init__(self, blocks: Iterator[_Read], stopped: threading.Event):
        self._queue: queue.Queue[_Read | BaseException | None] = queue.Queue(maxsize=4)
        self._stopped = stopped
        self._thread = threading.Thread(
            target=self._read, args=(blocks,), name="depthmix-stream", daemon=True
        )
        self._thread.start()

    def _read(self, blocks: Iterator[_Read]) -> None:
        try:
            for block in blocks:
                if not self._put(block):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Read | BaseException | None) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def take(self, timeout: float) -> _Read | None:
        """The next block, None at the end; raises what reading raised, ``queue.Empty`` after ``timeout`` seconds."""
        item = self._queue.get(timeout=timeout)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)


# ---- the work -----------------------------------------------------------------------------------


def _key(config: StreamConfig, named: _Named, shard_tokens: int) -> str:
    decides = {
        "version": FORMAT_VERSION,
        "dataset": named.dataset,
        "files": named.files,
        "subset": config.subset,
        "revision": config.revision,
        "tokens": config.tokens,
        "tokenizer": config.tokenizer,
        "text_field": config.text_field,
        "val_fraction": config.val_fraction,
        "shard_tokens": shard_tokens,
    }
    if config.test_fraction:
        decides["test_fraction"] = config.test_fraction
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _final_key(settings: str, named: _Named) -> str:
    """Of the finished folder: the files as they are now too. One that was damaged may have been replaced meanwhile."""
    return hashlib.sha256(json.dumps([settings, _stamps(named.files)]).encode()).hexdigest()


class _Work:
    """The unfinished folder, from its state to the finished one."""

    def __init__(
        self,
        config: StreamConfig,
        partial: Path,
        folder: Path,
        key: str,
        named: _Named,
        tokenizer: Tokenizer,
        shard_tokens: int,
    ):
        self.config, self.partial, self.folder, self.key = config, partial, folder, key
        self.named, self.tokenizer, self.shard_tokens = named, tokenizer, shard_tokens
        self.state = self._load() or {
            "key": key,
            "revision": None,
            "files": [],
            "stamps": [],
            "damaged": False,
            "place": [0, 0],
            "finished": False,
            "places": [],
            "splits": {
                split: {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": [], "part": None}
                for split in split_names(config.test_fraction)
            },
        }

    def run(self, workers: int, progress: bool) -> None:
        if not (is_dataset(self.partial) and not (self.partial / "state.json").exists()):
            self._check_room()
            self._write(workers, progress)
            self._finish()
        os.rename(self.partial, self.folder)
        fsync(self.folder.parent)

    def no_room(self, error: OSError) -> RunError:
        written = sum(split["tokens"] for split in self.state["splits"].values())
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.partial).free
            return RunError(
                f"no room to write {self.folder} ({error.strerror}): {self._bytes_left() / 1e6:,.0f} MB are still "
                f"needed, {free / 1e6:,.0f} MB are free in {self.partial.parent}. {written:,} tokens are kept in "
                f"{self.partial}: free some room, and the same command goes on from there"
            )
        return RunError(f"no room to write {self.folder} ({error.strerror})")

    def _bytes_left(self) -> int:
        written = sum(split["tokens"] for split in self.state["splits"].values())
        return (self.config.tokens - written) * self.tokenizer.dtype.itemsize

    def _check_room(self) -> None:
        needed, free = self._bytes_left() + SPARE_BYTES, shutil.disk_usage(self.folder.parent).free
        if free < needed and not self.state["finished"]:
            raise UserError(
                f"{self.config.tokens:,} tokens take {needed / 1e9:,.2f} GB more, and {free / 1e9:,.2f} GB are free "
                f"in {self.folder.parent}; choose another place with --out, or fewer --tokens"
            )

    # ---- state.json

    def _load(self) -> dict | None:
        path = self.partial / "state.json"
        if not path.exists():
            if is_dataset(self.partial) and read_manifest(self.partial)["key"] == _final_key(
                self.key, self.named
            ):
                verify_shards(self.partial, read_manifest(self.partial), "hash")
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
            return None
        remedy = "start again with --restart"
        try:
            state = json.loads(path.read_bytes())
            if state.pop("sha256") != _checksum(state):
                raise ValueError("its checksum does not fit")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is damaged ({error}); {remedy}") from error
        if state["key"] != self.key:
            raise UserError(
                f"{self.partial} was begun with other settings, or from files that changed since; give the same "
                f"ones, choose another --out, or {remedy}"
            )
        return state

    def _commit(self, writers: dict[str, SplitWriter], place: _Place, finished: bool = False) -> None:
        self.state |= {
            "place": [place.file, place.row],
            "finished": finished,
            "splits": {split: writer.state() for split, writer in writers.items()},
        }
        beside = self.partial / "state.json.new"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump({**self.state, "sha256": _checksum(self.state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.partial / "state.json")
        fsync(self.partial)

    # ---- reading and writing

    def _write(self, workers: int, progress: bool) -> None:
        state = self.state
        if state["finished"]:
            return
        stream = _open(self.config, self.named, state["revision"])
        stamps = _stamps(stream.files)
        if state["files"]:
            # The file in progress may be another copy, if it was damaged; later ones were not read yet.
            read = state["place"][0] + (0 if state["damaged"] else 1)
            if state["files"] != list(stream.files) or state["stamps"][:read] != stamps[:read]:
                raise UserError(
                    f"the files are not those that {self.partial} was begun with; start again with --restart"
                )
        state |= {
            "revision": stream.revision,
            "files": list(stream.files),
            "stamps": stamps,
            "damaged": False,
        }
        state["places"] = state["places"] or [[0, 0] for _ in stream.files]
        self.partial.mkdir(exist_ok=True)
        try:
            writers = {
                split: SplitWriter.resume(
                    self.partial, split, self.tokenizer.dtype, self.shard_tokens, written
                )
                for split, written in state["splits"].items()
            }
        except RunError as error:
            raise RunError(f"{error}; start again with --restart") from error
        try:
            with _Progress(self.config.tokens, progress) as report, _signals() as received:
                self._copy(stream, writers, workers, report, received)
        finally:
            for writer in writers.values():
                with contextlib.suppress(OSError):
                    writer.close(sync=False)

    def _copy(
        self,
        stream: _Stream,
        writers: dict[str, SplitWriter],
        workers: int,
        report: "_Progress",
        received: list[str],
    ) -> None:
        """From the stream into the writers, until there is no more or enough."""
        place = _Place(*self.state["place"])
        limit = self.config.tokens
        bounds = Bounds(self.config.val_fraction, 1 - self.config.test_fraction)
        stopped = threading.Event()
        ahead = _Ahead(_blocks(stream, place, stopped.wait, report.tell), stopped)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="depthmix-tokenize")
        waiting: deque[tuple[RowBlock, int, _Place, Future[Tokenized]]] = deque()
        item: _Read | tuple[()] | None
        committed, shards = time.monotonic(), len(writers["train"].shards)
        failed: BaseException | None = None

        def written() -> int:
            return sum(writer.tokens for writer in writers.values())

        def put(done: Tokenized, file: int) -> None:
            for split, writer in writers.items():
                part = getattr(done, split)
                writer.write(part.tokens, part.documents, part.text_bytes)
                self.state["places"][file][0] += part.documents
                self.state["places"][file][1] += part.text_bytes

        def write_oldest() -> _Place:
            block, file, behind, future = waiting.popleft()
            done = future.result()
            if written() + sum(len(getattr(done, split).tokens) for split in writers) < limit:
                put(done, file)
            else:
                for _, text in block.documents():
                    put(tokenize(RowBlock([text]), self.tokenizer, bounds), file)
                    if written() >= limit:
                        break
            return behind

        report.begin(written())
        try:
            more = True
            while (more or waiting) and written() < limit and not received:
                if more and len(waiting) <= workers + 2:
                    try:
                        item = ahead.take(0.2)
                    except queue.Empty:
                        item = ()
                    except Exception as error:
                        # What was read before is good, and is kept.
                        failed, item = error, None
                    if item is None:
                        more = False
                    elif item:
                        block, file, behind = item
                        future = pool.submit(tokenize, block, self.tokenizer, bounds)
                        waiting.append((block, file, behind, future))
                        continue
                if not waiting:
                    continue
                place = write_oldest()
                report.show(written())
                now = time.monotonic()
                if len(writers["train"].shards) > shards or now - committed > COMMIT_SECONDS:
                    self._commit(writers, place)
                    committed, shards = now, len(writers["train"].shards)
        finally:
            ahead.close()
            pool.shutdown(wait=True, cancel_futures=True)
        full = written() >= limit
        if failed is not None and not full:
            self.state["damaged"] = isinstance(failed, _DamagedFile)
            self._commit(writers, place)
            raise failed
        if received and (more or waiting) and not full:
            self._commit(writers, place)
            raise Interrupted(
                f"stopped by {received[0]} at {written():,} tokens, all of them kept; the same command goes on"
            )
        for writer in writers.values():
            writer.close()
        self._commit(writers, place, finished=True)

    # ---- the end

    def _finish(self) -> None:
        """Verify, say what is here, and leave nothing but the dataset in the folder."""
        state = self.state
        dtype, splits = self.tokenizer.dtype, state["splits"]
        empty = [split for split, written in splits.items() if not written["documents"]]
        if empty:
            shutil.rmtree(self.partial, ignore_errors=True)
            total = sum(written["documents"] for written in splits.values())
            share = "test_fraction" if empty[0] == TEST else "val_fraction"
            flag = "--" + share.replace("_", "-")
            raise UserError(
                f"none of {total} documents fell to the {empty[0]} split with {flag} "
                f"{getattr(self.config, share):g}; raise {flag} or --tokens"
                if total
                else f"no text in {self.named.dataset or self.named.files[0]}: every document is empty"
            )
        writers = {
            split: SplitWriter.resume(self.partial, split, dtype, self.shard_tokens, written)
            for split, written in splits.items()
        }
        sources = [
            {"path": name, "documents": documents, "bytes": size}
            for name, (documents, size) in zip(state["files"], state["places"], strict=True)
        ]
        manifest = manifest_of(
            self.tokenizer,
            writers,
            sources,
            val_fraction=self.config.val_fraction,
            test_fraction=self.config.test_fraction,
        )
        manifest["stream"] = {
            "source": self.named.dataset or None,
            "subset": None if self.named.files else self.config.subset,
            "revision": state["revision"],
            "tokens_asked": self.config.tokens,
        }
        manifest["key"] = _final_key(self.key, self.named)
        (self.partial / "manifest.json").unlink(missing_ok=True)
        verify_shards(self.partial, manifest, "hash")
        for split in writers:
            self._count(split, manifest["splits"][split])
        write_manifest(self.partial, manifest)
        mark_verified(self.partial, manifest)
        (self.partial / "state.json").unlink()
        fsync(self.partial)

    def _count(self, split: str, entry: dict) -> None:
        """Tokens and end tokens on the disk are as many as were counted while writing."""
        tokens = documents = 0
        for shard in entry["shards"]:
            ids = np.memmap(self.partial / shard["file"], self.tokenizer.dtype, mode="r")
            tokens += len(ids)
            for start in range(0, len(ids), 1 << 24):
                documents += int((ids[start : start + (1 << 24)] == self.tokenizer.end_token).sum())
        if (tokens, documents) != (entry["tokens"], entry["documents"]):
            raise RunError(
                f"{self.partial}: the {split} split holds {tokens:,} tokens and {documents:,} ends of documents, "
                f"where {entry['tokens']:,} and {entry['documents']:,} were written; start again with --restart"
            )


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Names of the signals (SIGINT, SIGTERM, SIGHUP) that arrived; they interrupt nothing meanwhile."""
    import signal

    received: list[str] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, lambda n, _: received.append(signal.Signals(n).name))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """Tokens, tokens a second and time left, on standard error: a bar in a terminal, else a line a minute."""

    LINE_SECONDS = 60.0

    def __init__(self, total: int, wanted: bool):
        self.total, self.wanted = total, wanted
        self._display: Progress | None = None

    def __enter__(self) -> Self:
        if self.wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._display = Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._display.start()
            self._task = self._display.add_task("", total=self.total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()

    def begin(self, tokens: int) -> None:
        """``tokens`` are there from an earlier call."""
        self._first, self._began = tokens, time.monotonic()
        self._told = self._began
        if tokens:
            self.tell(f"going on behind {tokens:,} tokens")

    def show(self, tokens: int) -> None:
        now = time.monotonic()
        rate = (tokens - self._first) / max(1e-9, now - self._began)
        text = f"{tokens / 1e6:,.1f} of {self.total / 1e6:,.0f} M tokens, {rate / 1e6:.2f} M/s"
        if self._display is not None:
            self._display.update(self._task, completed=min(tokens, self.total), text=text)
        elif self.wanted and now - self._told > self.LINE_SECONDS:
            self._told = now
            left = (self.total - tokens) / max(1e-9, rate)
            self.tell(f"{text}, {left / 60:,.0f} min left")

    def tell(self, note: str) -> None:
        if self._display is not None:
            self._display.console.print(note, markup=False)
        elif self.wanted:
            print(note, file=sys.stderr, flush=True)
