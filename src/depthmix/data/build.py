"""Tokenize text into a prepared folder, in parallel, all or nothing.

The calling thread reads, decompresses and writes; threads tokenize blocks of
documents (tiktoken works outside of Python's lock, so threads use all cores
without copying text between processes). Results are written in the order they
were read, so the folder is the same, byte for byte, whatever the number of
workers, and only a few blocks are in memory at a time.

A document is held out for validation when a hash of its text, taken as a
number in [0, 1), is below ``val_fraction``, and for the test when it is
``1 - test_fraction`` or above: the choice depends on nothing but the document,
so more files do not reshuffle it, copies of one text never stand on two sides,
and a test part changes nothing about the validation part.

The folder is built under a hidden name beside its place and renamed when it is
complete; a lock beside it makes a second builder wait and then use what the
first one made.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DataConfig
from ..durable import fsync
from ..errors import UserError
from .shards import (
    FORMAT_VERSION,
    SHARD_TOKENS,
    TEST,
    SplitWriter,
    is_dataset,
    mark_verified,
    read_manifest,
    split_names,
    verify_once,
    write_manifest,
)
from .sources import Reading, Source, find_sources
from .tokenizers import bpe_size, load_tokenizer, train_bpe
from .writing import (
    NO_ROOM,
    Bounds,
    Part,
    Tokenized,
    cores,
    is_there,
    lock_path,
    locked,
    manifest_of,
    no_room,
    refusals,
    share_of,
    tokenize,
    user_path,
)

if TYPE_CHECKING:
    from rich.progress import Progress

BPE_SAMPLE_BYTES = 32 << 20
"""Text from which the merges of bpe:N are learnt, in bytes: the sources give equal shares, from
their beginnings, validation documents left out."""


def prepare(
    config: DataConfig,
    out: Path | str | None = None,
    *,
    workers: int | None = None,
    progress: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Make, or find, the prepared folder for ``config`` and return its path.

    ``out`` None is a folder in the cache, named by everything that decides its
    content: paths, sizes and times of the files (the content itself for the
    standard library), tokenizer, ``val_fraction``. What is there already is
    verified and used. If ``config.data`` is a prepared folder, that is it.

    ``workers``: threads that tokenize, default one a core. ``progress``: show a
    bar. ``shard_tokens``: tokens a shard.

    Raises ``UserError`` for a request that cannot be met (paths, fields, text
    that is not UTF-8, a folder that cannot be written to or holds something
    else), ``RunError`` for damaged files and full disks. In either case, and
    on Ctrl-C, nothing that looks finished is left, and what was there before
    stays as it was.
    """
    prepared = [path for path in map(user_path, config.data) if is_dataset(path)]
    if prepared:
        if len(config.data) > 1:
            raise UserError(
                f"{prepared[0]} is a prepared dataset; it cannot be mixed with other data, name it alone"
            )
        if out is not None:
            raise UserError(f"{prepared[0]} is prepared already; use it as it is, without --out")
        verify_once(prepared[0], read_manifest(prepared[0]))
        return prepared[0]

    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if bpe_size(config.tokenizer) is None:
        load_tokenizer(config.tokenizer)  # refuse it before anything is read
    sources = find_sources(config.data, config.text_field)
    key = _key(config, sources, shard_tokens)
    if out is None:
        folder = cache_folder(config) / f"{config.tokenizer.replace(':', '')}-{key[:16]}"
    else:
        folder = user_path(out).resolve()
    if os.path.ismount(folder):
        raise UserError(f"{folder} is a mount point, which no folder can replace; name one inside it")

    if is_there(folder, key):
        return folder
    with contextlib.ExitStack() as stack:
        with refusals(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(lock_path(folder), wait=False)):
                if progress:
                    print(f"another process is preparing {folder}, waiting for it", file=sys.stderr)
                stack.enter_context(locked(lock_path(folder)))
        if not is_there(folder, key):  # nobody made it while we waited
            _sweep(folder, everything=out is None)
            _build(config, sources, key, folder, workers or cores(), progress, shard_tokens)
    return folder


def cache_folder(config: DataConfig) -> Path:
    """Where prepared folders are kept: ``cache_dir``, else $DEPTHMIX_CACHE, else ~/.cache/depthmix."""
    return user_path(config.cache_dir or os.environ.get("DEPTHMIX_CACHE") or "~/.cache/depthmix").absolute()


def _key(config: DataConfig, sources: list[Source], shard_tokens: int) -> str:
    """Everything that decides the content."""
    decides = {
        "version": FORMAT_VERSION,
        "sources": [source.identity() for source in sources],
        "tokenizer": config.tokenizer,
        "val_fraction": config.val_fraction,
        "shard_tokens": shard_tokens,
    }
    if config.test_fraction:
        decides["test_fraction"] = config.test_fraction
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


# ---- building -----------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What a pass over the text found."""

    lowest: float = math.inf
    highest: float = -math.inf


def _build(
    config: DataConfig,
    sources: list[Source],
    key: str,
    folder: Path,
    workers: int,
    progress: bool,
    shard_tokens: int,
) -> None:
    """Make ``folder`` under a hidden name, then give it its own; on any error remove it all."""
    building = _building_path(folder)
    bounds = Bounds(config.val_fraction, 1 - config.test_fraction)
    splits = split_names(config.test_fraction)
    with _reporting(sources, progress) as report:
        try:
            while True:
                building.mkdir()
                manifest, seen = _write(config, sources, building, workers, bounds, shard_tokens, report)
                counts = {split: manifest["splits"][split]["documents"] for split in splits}
                if all(counts.values()):
                    break
                if counts.get(TEST) == 0:
                    raise UserError(
                        f"none of {sum(counts.values())} documents fell to the test split with test_fraction "
                        f"{config.test_fraction:g}; raise it, or add text"
                    )
                # Rare, with few documents only: all fell on one side. The one nearest to the other
                # side goes over, and the text is read once more.
                bounds = Bounds(_moved_threshold(seen, counts), bounds.test)
                shutil.rmtree(building)
            write_manifest(building, {**manifest, "key": key})
            mark_verified(building, manifest)
            fsync(building)
            os.rename(building, folder)
            fsync(folder.parent)
        except BaseException as error:
            written = sum(file.stat().st_size for file in building.glob("*.bin"))
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise no_room(error, folder, written, report.share()) from error
            raise


def _write(
    config: DataConfig,
    sources: list[Source],
    building: Path,
    workers: int,
    bounds: Bounds,
    shard_tokens: int,
    report: "_Report",
) -> tuple[dict, _Seen]:
    """One pass over the text: write the shards and say what they are."""
    size = bpe_size(config.tokenizer)
    if size is None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        report.describe(f"learning {size} tokens")
        tokenizer = train_bpe(size, _sample(sources, bounds))
    report.describe("tokenizing")
    writers = {
        split: SplitWriter(building, split, tokenizer.dtype, shard_tokens)
        for split in split_names(config.test_fraction)
    }
    documents = [0] * len(sources)
    readings = [Reading() for _ in sources]
    seen = _Seen()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="depthmix-tokenize")
    waiting: deque[tuple[int, Future[Tokenized]]] = deque()

    def write_oldest() -> None:
        place, future = waiting.popleft()
        done = future.result()
        for split, writer in writers.items():
            part: Part = getattr(done, split)
            writer.write(part.tokens, part.documents, part.text_bytes)
            documents[place] += part.documents
        seen.lowest, seen.highest = min(seen.lowest, done.lowest), max(seen.highest, done.highest)
        report.tokens(sum(writer.tokens for writer in writers.values()))

    try:
        before = 0
        for place, source in enumerate(sources):
            for block in source.blocks(readings[place]):
                waiting.append((place, pool.submit(tokenize, block, tokenizer, bounds)))
                report.read(before + readings[place].bytes)
                if len(waiting) > workers + 2:
                    write_oldest()
            before += source.size
        while waiting:
            write_oldest()
        for writer in writers.values():
            writer.close()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for writer in writers.values():
            writer.close(sync=False)

    if not sum(documents):
        raise UserError(
            f"no text in {', '.join(source.name for source in sources[:3])}: every document is empty"
        )
    records = [source.record(reading) for source, reading in zip(sources, readings, strict=True)]
    sources_read = [{**r, "documents": n} for r, n in zip(records, documents, strict=True)]
    manifest = manifest_of(
        tokenizer,
        writers,
        sources_read,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
    )
    return manifest, seen


def _moved_threshold(seen: _Seen, counts: dict[str, int]) -> float:
    if seen.lowest == seen.highest:
        total = sum(counts.values())
        what = "a single document" if total == 1 else f"{total} copies of one document"
        raise UserError(
            f"the text is {what}, so none can be held out for validation; add text "
            f"(a .jsonl line or .parquet row is one document, .txt is cut into documents of 16 to 32 KiB)"
        )
    return math.nextafter(seen.lowest, math.inf) if counts["train"] else seen.highest


def _sample(sources: list[Source], bounds: Bounds) -> Iterator[str]:
    """Text to learn merges from: see ``BPE_SAMPLE_BYTES``."""
    left = BPE_SAMPLE_BYTES
    for place, source in enumerate(sources):
        share = left // (len(sources) - place)
        documents = itertools.chain.from_iterable(block.documents() for block in source.blocks(Reading()))
        for raw, text in documents:
            if share <= 0:
                break
            if bounds.split(share_of(raw)) != "train":
                continue
            share -= len(raw)
            left -= len(raw)
            yield text


# ---- the folder's place -------------------------------------------------------------------------


def _building_path(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.building"


def _sweep(folder: Path, everything: bool) -> None:
    """Remove what builders that were killed left behind: of ``folder``, or of all beside it too."""
    shutil.rmtree(_building_path(folder), ignore_errors=True)
    for stale in folder.parent.glob(".*.building") if everything else ():
        with locked(stale.with_suffix(".lock"), wait=False) as alone:
            if alone:
                shutil.rmtree(stale, ignore_errors=True)


# ---- progress -----------------------------------------------------------------------------------


class _Report:
    """Where the work stands; draws nothing."""

    def __init__(self, total_bytes: int):
        self.total_bytes, self.read_bytes = total_bytes, 0

    def describe(self, what: str) -> None:
        """What is being done now; counting starts again."""
        self.read_bytes = 0

    def read(self, count: int) -> None:
        """``count`` bytes of the sources, as stored, have been read."""
        self.read_bytes = count

    def tokens(self, count: int) -> None:
        """``count`` tokens have been written."""

    def share(self) -> float:
        """Share of the sources that has been read."""
        return min(1.0, self.read_bytes / self.total_bytes)


class _Bar(_Report):
    """Draws a bar by bytes of the sources, with tokens and tokens a second."""

    def __init__(self, total_bytes: int, display: "Progress"):
        super().__init__(total_bytes)
        self._display = display
        self._task = display.add_task("reading", total=total_bytes, speed="")

    def describe(self, what: str) -> None:
        super().describe(what)
        self._display.reset(self._task, description=what, speed="")
        self._began = time.monotonic()

    def read(self, count: int) -> None:
        super().read(count)
        self._display.update(self._task, completed=min(count, self.total_bytes))

    def tokens(self, count: int) -> None:
        rate = count / max(1e-9, time.monotonic() - self._began)
        self._display.update(self._task, speed=f"{count / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s")


@contextlib.contextmanager
def _reporting(sources: list[Source], progress: bool) -> Iterator[_Report]:
    total = sum(source.size for source in sources)
    if not progress:
        yield _Report(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        yield _Bar(total, display)
