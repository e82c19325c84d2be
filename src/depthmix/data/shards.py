"""A prepared dataset on disk: token files, a manifest, and how both are checked.

::

    FOLDER/manifest.json      what is here: counts, tokenizer, sources, SHA-256 of every shard
    FOLDER/train-00000.bin    token ids, little-endian uint16 (uint32 above 65,536 ids), nothing else
    FOLDER/val-00000.bin
    FOLDER/verified.json      sizes and times of the shards when their SHA-256 was last found right

Every document is followed by one end token, also the last. A shard is a cut
through the stream of tokens at a fixed number, not at a document.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ..errors import RunError, UserError
from .tokenizers import Tokenizer, load_tokenizer

FORMAT = "depthmix tokens"
FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 26
"""Tokens a shard: 128 MiB of 16-bit ids."""
SPLITS = ("train", "val")
TEST = "test"
"""A third split, of a dataset that was prepared with one."""


# ---- writing ------------------------------------------------------------------------------------


class SplitWriter:
    """Appends tokens to the numbered shards of one split, hashing them on the way."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict] = []
        self.tokens = self.documents = self.text_bytes = 0
        self._file: BinaryIO | None = None
        self._room = 0

    def write(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        """Append ``tokens`` (of ``dtype``), which hold so many documents and bytes of UTF-8."""
        self.tokens += len(tokens)
        self.documents += documents
        self.text_bytes += text_bytes
        while len(tokens):
            if self._room == 0:
                self._open()
            part, tokens = tokens[: self._room], tokens[self._room :]
            raw = np.ascontiguousarray(part).data.cast("B")
            assert self._file is not None, "there is room in the open shard alone"
            self._file.write(raw)
            self._sha256.update(raw)
            self._room -= len(part)

    def close(self, sync: bool = True) -> None:
        """End the open shard; ``sync`` waits until it is on the disk and lists it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            if not sync:
                return
            file.flush()
            os.fsync(file.fileno())
        tokens = self.shard_tokens - self._room
        size = tokens * self.dtype.itemsize
        entry = {"file": self._name, "tokens": tokens, "bytes": size, "sha256": self._sha256.hexdigest()}
        self.shards.append(entry)

    def state(self) -> dict:
        """What :meth:`resume` needs, once all that was written is on the disk: plain JSON types."""
        part = None
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            part = {"tokens": self.shard_tokens - self._room, "sha256": self._sha256.hexdigest()}
        return {**self.entry(), "shards": list(self.shards), "part": part}

    @classmethod
    def resume(
        cls, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict
    ) -> "SplitWriter":
        """A writer that goes on behind ``state``; what was written later is cut off.

        Raises ``RunError`` where the files hold less than ``state`` says, or something else.
        """
        writer = cls(folder, split, dtype, shard_tokens)
        writer.shards = list(state["shards"])
        writer.tokens, writer.documents = state["tokens"], state["documents"]
        writer.text_bytes = state["text_bytes"]
        names = {shard["file"]: shard["bytes"] for shard in writer.shards}
        part = state["part"]
        if part is not None:
            writer._name = f"{split}-{len(writer.shards):05d}.bin"
            names[writer._name] = part["tokens"] * dtype.itemsize
        for name, size in names.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found < size:
                raise RunError(f"{folder / name} has {found} bytes where {size} were written")
        for path in folder.glob(f"{split}-*.bin"):
            if path.name not in names:
                path.unlink()
        if part is not None:
            file = open(folder / writer._name, "r+b")
            file.truncate(names[writer._name])
            writer._sha256 = hashlib.sha256()
            while piece := file.read(1 << 20):
                writer._sha256.update(piece)
            if writer._sha256.hexdigest() != part["sha256"]:
                file.close()
                raise RunError(
                    f"{folder / writer._name} is damaged: its SHA-256 is not that of what was written"
                )
            writer._file, writer._room = file, shard_tokens - part["tokens"]
        return writer

    def entry(self) -> dict:
        """What the manifest says of this split."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }

    def _open(self) -> None:
        self.close()
        self._name = f"{self.split}-{len(self.shards):05d}.bin"
        self._file = open(self.folder / self._name, "xb")
        self._sha256 = hashlib.sha256()
        self._room = self.shard_tokens


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write ``manifest.json`` with its own checksum, and wait until it is on the disk."""
    manifest = {**manifest, "manifest_sha256": _checksum(manifest)}
    with open(folder / "manifest.json", "x", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


# ---- checking -----------------------------------------------------------------------------------


def is_dataset(folder: Path) -> bool:
    """Whether ``folder`` looks like a prepared dataset, perhaps a damaged one; nothing is verified."""
    try:
        with open(folder / "manifest.json", "rb") as file:
            return FORMAT.encode() in file.read(200) or (folder / "train-00000.bin").exists()
    except OSError:
        return False


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder.

    Raises ``UserError`` where there is none or a newer version made it,
    ``RunError`` where it is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        what = (
            "does not exist" if not folder.exists() else "is not a prepared dataset: it has no manifest.json"
        )
        raise UserError(f"{folder} {what}. Make one: depthmix data prepare TEXT... --out {folder}")
    remedy = f"restore {path} from a copy, or remove the folder and prepare the data again"
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        version, checksum = manifest.get("version"), manifest.pop("manifest_sha256", None)
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); {remedy}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} was not written by depthmix; name a folder made by `depthmix data prepare`")
    if checksum != _checksum(manifest):
        raise RunError(f"{path} is damaged (its checksum does not fit); {remedy}")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has dataset format {version}, this depthmix reads {FORMAT_VERSION}; "
            f"prepare the data again or install the depthmix that made it"
        )
    return manifest


def verify_shards(folder: Path, manifest: dict, verify: Literal["size", "hash"]) -> None:
    """Check that every shard is there with its size and, for ``hash``, its SHA-256.

    Raises ``RunError`` naming the first file that is wrong.
    """
    for shard in _shards(manifest):
        path = folder / shard["file"]
        remedy = f"copy it again, or remove {folder} and prepare the data again"
        try:
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise RunError(f"{path} has {size} bytes where the manifest says {shard['bytes']}; {remedy}")
            if verify == "hash":
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard["sha256"]:
                    raise RunError(
                        f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says "
                        f"{shard['sha256'][:16]}...; {remedy}"
                    )
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def verify_once(folder: Path, manifest: dict) -> None:
    """Verify hashes unless that was done since the shards last changed (by size and time)."""
    verify_shards(folder, manifest, "size")
    try:
        if json.loads((folder / "verified.json").read_bytes()) == _stamps(folder, manifest):
            return
    except (OSError, ValueError):
        pass
    verify_shards(folder, manifest, "hash")
    try:
        mark_verified(folder, manifest)
    except OSError:
        pass  # a folder that cannot be written to is verified each time


def mark_verified(folder: Path, manifest: dict) -> None:
    """Note that the shards as they are now have the right hashes."""
    beside = folder / f".verified.{os.getpid()}"
    beside.write_text(json.dumps(_stamps(folder, manifest)))
    os.replace(beside, folder / "verified.json")


def _stamps(folder: Path, manifest: dict) -> dict:
    status = {shard["file"]: os.stat(folder / shard["file"]) for shard in _shards(manifest)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}


def _shards(manifest: dict) -> Iterable[dict]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def split_names(test_fraction: float) -> tuple[str, ...]:
    """Splits of a dataset with so large a share held out for a test."""
    return (*SPLITS, TEST) if test_fraction else SPLITS


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ---- reading ------------------------------------------------------------------------------------


class TokenSplit:
    """The tokens of one split as one long sequence, mapped into memory shard by shard."""

    def __init__(
        self, name: str, arrays: list[np.ndarray], *, text_bytes: int, documents: int, fingerprint: str
    ):
        self.name = name
        self.text_bytes = text_bytes
        """Bytes of UTF-8 text behind the tokens; end tokens have none."""
        self.documents = documents
        self.fingerprint = fingerprint
        """Sixteen hexadecimal digits that stand for the content."""
        self._arrays = arrays
        self._starts = [0]
        for array in arrays:
            self._starts.append(self._starts[-1] + len(array))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens ``start .. start + count - 1`` as a 1-D array of the shards' type.

        May be a read-only view of the file. Raises ``IndexError`` outside of the split.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)} in the {self.name} split")
        place = bisect.bisect_right(self._starts, start, hi=len(self._arrays)) - 1
        at = start - self._starts[place]
        part = self._arrays[place][at : at + count]
        if len(part) == count:
            return part
        parts = [part]
        while (missing := count - sum(map(len, parts))) > 0:
            place += 1
            parts.append(self._arrays[place][:missing])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened."""

    folder: Path
    manifest: dict
    train: TokenSplit
    val: TokenSplit
    test: TokenSplit | None = None
    """None where no documents were held out for a test."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.manifest["tokenizer"])


def open_dataset(folder: str | Path, *, verify: Literal["size", "hash"] = "size") -> Dataset:
    """Open a folder made by :func:`~depthmix.data.prepare`.

    ``verify``: ``size`` compares the files' sizes with the manifest, ``hash``
    reads them all and compares SHA-256 too. Raises ``UserError`` for a folder
    that is no dataset, ``RunError`` for a damaged one, naming the file.
    """
    if verify not in ("size", "hash"):
        raise UserError(f"verify must be size or hash, got {verify!r}")
    folder = Path(folder)
    manifest = read_manifest(folder)
    verify_shards(folder, manifest, verify)
    splits = {split: _open_split(folder, manifest, split) for split in manifest["splits"]}
    return Dataset(folder, manifest, **splits)


def _open_split(folder: Path, manifest: dict, split: str) -> TokenSplit:
    entry = manifest["splits"][split]
    shards = entry["shards"]
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    return TokenSplit(
        split,
        # A plain view: slicing numpy's memmap subclass costs several times as much.
        [np.asarray(np.memmap(folder / s["file"], dtype=manifest["dtype"], mode="r")) for s in shards],
        text_bytes=entry["text_bytes"],
        documents=entry["documents"],
        fingerprint=digest[:16],
    )
