"""How a prepared folder is written, whatever the text comes from: its place and lock, documents into tokens.

:mod:`.build` writes one from files that can be read again, :mod:`.stream` one from a stream that is read once.
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError, UserError
from .shards import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    TEST,
    SplitWriter,
    is_dataset,
    read_manifest,
    verify_once,
)
from .sources import Block
from .tokenizers import Tokenizer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that say that a disk, or what one may have of it, is full."""


# ---- the folder's place -------------------------------------------------------------------------


def user_path(path: str | Path) -> Path:
    """``path`` with ``~`` as the user's home."""
    return Path(path).expanduser()


def is_there(folder: Path, key: str) -> bool:
    """Whether the wanted dataset is in ``folder``, verified. Refuses a folder with anything else."""
    if is_dataset(folder):
        manifest = read_manifest(folder)
        if manifest["key"] != key:
            raise UserError(
                f"{folder} holds a dataset made from other files or settings (or the files changed since); "
                f"choose another --out, or remove it first"
            )
        verify_once(folder, manifest)
        return True
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not a prepared dataset; nothing in it was touched, choose another --out"
        )
    return False


def lock_path(folder: Path) -> Path:
    """The file that is locked (:func:`locked`) while ``folder`` is made."""
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``; yields False if another process does and ``wait`` is false.

    The kernel lets go of the lock when its holder dies, however it dies. The
    file is removed while it is held, so whoever gets the lock checks that it
    is still the file of that name.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            current = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle))
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        except FileNotFoundError:  # removed between the two looks
            current = False
        except BaseException:
            os.close(handle)
            raise
        if current:
            break
        os.close(handle)
    try:
        yield True
    finally:
        os.unlink(path)
        os.close(handle)


@contextlib.contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Say that ``folder`` cannot be made and what to do, when the system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(error, folder, 0, 0.0) from error
        raise UserError(
            f"cannot write the dataset to {folder} ({error.strerror}: {error.filename}); "
            f"choose a folder you can write to with --out, or set DEPTHMIX_CACHE"
        ) from error


def no_room(error: OSError, folder: Path, written: int, share: float) -> RunError:
    """The error of a disk that was full when ``written`` bytes, of this share of the text, were written."""
    needed = (
        f"about {written / share / 1e6:.0f} MB are needed" if share > 0.01 and written else "more is needed"
    )
    try:
        free = f"{shutil.disk_usage(folder.parent).free / 1e6:.0f} MB are free in {folder.parent} now"
    except OSError:
        free = f"{folder.parent} is full"
    return RunError(
        f"no room to write {folder} ({error.strerror} after {written / 1e6:.1f} MB): {needed}, {free}. "
        f"Free some or choose another place with --out or DEPTHMIX_CACHE. "
        f"The unfinished part was removed, nothing else was touched."
    )


# ---- documents into tokens ----------------------------------------------------------------------


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Bounds:
    """Where the shares of documents (:func:`share_of`) are cut."""

    val: float
    """Documents below it are held out for validation."""
    test: float = 1.0
    """Documents from it on are held out for the test."""

    def split(self, share: float) -> str:
        """Name of the split of a document."""
        return "val" if share < self.val else TEST if share >= self.test else "train"


def share_of(raw: bytes) -> float:
    """A document's place in [0, 1), by its content."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "big") / (1 << 48)


@dataclass
class Part:
    """Of one block, what falls to one split."""

    tokens: np.ndarray
    documents: int
    text_bytes: int


@dataclass
class Tokenized:
    """One block's documents, tokenized."""

    train: Part
    val: Part
    test: Part
    lowest: float
    highest: float
    """Smallest and largest share (see :func:`share_of`) among the documents."""


def tokenize(block: Block, tokenizer: Tokenizer, bounds: Bounds) -> Tokenized:
    """Runs in a thread: decode, choose the split, tokenize, add the end tokens."""
    end = np.array([tokenizer.end_token], tokenizer.dtype)
    splits = (*SPLITS, TEST)
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    counts, sizes = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    lowest, highest = math.inf, -math.inf
    for raw, text in block.documents():
        share = share_of(raw)
        split = bounds.split(share)
        arrays[split] += (tokenizer.encode_array(text), end)
        counts[split] += 1
        sizes[split] += len(raw)
        lowest, highest = min(lowest, share), max(highest, share)
    parts = {
        split: Part(
            np.concatenate(found, dtype=tokenizer.dtype, casting="unsafe")
            if found
            else np.empty(0, tokenizer.dtype),
            counts[split],
            sizes[split],
        )
        for split, found in arrays.items()
    }
    return Tokenized(**parts, lowest=lowest, highest=highest)


# ---- what is said of it -------------------------------------------------------------------------


def manifest_of(
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    sources: list[dict[str, Any]],
    *,
    val_fraction: float,
    test_fraction: float,
) -> dict[str, Any]:
    """What a folder's manifest says but for its key."""
    fractions = {"val_fraction": val_fraction}
    if test_fraction:
        fractions["test_fraction"] = test_fraction
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "depthmix": _version(),
        "dtype": tokenizer.dtype.str,
        **fractions,
        "splits": {split: writer.entry() for split, writer in writers.items()},
        "sources": sources,
        "tokenizer": tokenizer.to_dict(),
    }


def _version() -> str:
    try:
        return metadata.version("depthmix")
    except metadata.PackageNotFoundError:
        return "not installed"
