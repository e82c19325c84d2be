"""The commands ``depthmix data prepare``, ``depthmix data fineweb`` and ``depthmix data inspect``.

Each is a dataclass that tyro turns into options; ``run`` does the work, prints
and returns the exit status. Errors pass through as exceptions.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from ..config import DataConfig
from ..plan_command import _count


@dataclass
class Prepare:
    """Tokenize text into a folder of shards that training maps into memory.

    Reads .txt, .jsonl and .parquet, plain or compressed (.gz .xz .zst). One document is one line of
    a .jsonl, one row of a .parquet, or a section of 16 to 32 KiB of a .txt. Works in constant memory,
    and all or nothing. Asked the same again, it finds what is there.

    Example: depthmix data prepare texts/ more/*.jsonl.zst --tokenizer gpt2 --out shards
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PATH ...]")] = ()
    """Files, folders (searched to any depth) and globs. None: the source text of Python's own
    standard library."""
    out: Path | None = None
    """Folder to make; must be new, empty, or hold this very dataset. Default: a folder in
    $DEPTHMIX_CACHE or ~/.cache/depthmix."""
    tokenizer: str = "byte"
    """byte, gpt2, or bpe:N, for example bpe:4096: N ids, merges learnt from 32 MiB of the text."""
    text_field: str = "text"
    """Field (.jsonl) or column (.parquet) that holds the text."""
    val_fraction: float = 0.05
    """Share of documents held out for validation, above 0 and at most 0.5."""
    test_fraction: float = 0.0
    """Share of documents held out for a last test, which training never reads. 0: none."""
    workers: int | None = None
    """Threads that tokenize. Default: one a core. The result does not depend on it."""

    def run(self) -> int:
        """Prepare, print where and how much; returns 0."""
        from .build import prepare
        from .shards import read_manifest

        config = DataConfig(
            self.paths, self.tokenizer, self.text_field, self.val_fraction, self.test_fraction
        )
        began = time.monotonic()
        folder = prepare(config, self.out, workers=self.workers, progress=True)
        seconds = time.monotonic() - began

        _say(folder, read_manifest(folder), seconds)
        return 0


def _say(folder: Path, manifest: dict, seconds: float) -> None:
    """What is in ``folder``, made in so many seconds."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    splits = manifest["splits"]
    tokens = sum(split["tokens"] for split in splits.values())
    table = Table("", "tokens", "documents", "bytes of text", box=None)
    for name, split in splits.items():
        table.add_row(name, *(f"{split[count]:,}" for count in ("tokens", "documents", "text_bytes")))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    empty = sum(source["documents"] == 0 for source in manifest["sources"] if "sha256" in source)
    if empty:
        console.print(f"{empty} of {len(manifest['sources'])} files held no text")
    console.print(
        f"tokenizer {manifest['tokenizer']['name']}, {tokens / 1e6:.2f} M tokens, "
        f"{seconds:.1f} s, {tokens / max(seconds, 1e-9) / 1e6:.2f} M tokens/s"
    )
    console.print(str(folder), soft_wrap=True, markup=False)


@dataclass
class FineWeb:
    """Stream FineWeb from the Hugging Face hub into a folder that training maps into memory.

    Nothing is kept of the download but the tokens. Ctrl-C or a kill at any moment: the same command goes on where the
    last shard ended, or 30 s ago, and the result is that of a run that never stopped, to the byte.

    Example: depthmix data fineweb --tokens 10B --out shards/fineweb
    """

    tokens: str = "10B"
    """Tokens to write, all splits together: a number, or one with K, M or B (thousands) behind it. The
    first document that reaches it is the last."""
    out: Path | None = None
    """Folder to make; must be new, empty, or hold this very dataset. Until it is complete the work lies beside it, as
    .NAME.partial. Default: a folder in $DEPTHMIX_CACHE or ~/.cache/depthmix."""
    source: tuple[str, ...] = ("HuggingFaceFW/fineweb",)
    """Another dataset of the hub (OWNER/NAME), a copy of its repository, or parquet files, folders, globs and
    addresses of them."""
    subset: str = "sample-10BT"
    """Configuration of the dataset; of no meaning for files."""
    revision: str | None = None
    """Commit, tag or branch of the dataset. Default: the newest commit, which a resumed run keeps."""
    tokenizer: str = "gpt2"
    """gpt2 or byte."""
    text_field: str = "text"
    """Column that holds the text."""
    val_fraction: float = 0.005
    """Share of documents held out for validation, above 0 and at most 0.5; chosen by a hash of the text."""
    test_fraction: float = 0.0
    """Share of documents held out for a last test, which training never reads. 0: none."""
    workers: int | None = None
    """Threads that tokenize. Default: one a core. The result does not depend on it."""
    restart: FlagCreatePairsOff[bool] = False
    """Forget what an unfinished call left beside the folder."""

    def run(self) -> int:
        """Stream, print where and how much; returns 0."""
        from .build import cache_folder
        from .shards import read_manifest
        from .stream import StreamConfig, prepare_stream

        config = StreamConfig(
            source=self.source,
            subset=self.subset,
            revision=self.revision,
            tokens=_count(self.tokens, "--tokens"),
            tokenizer=self.tokenizer,
            text_field=self.text_field,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
        )
        out = self.out or cache_folder(DataConfig()) / f"fineweb-{self.tokens}-{self.tokenizer}"
        began = time.monotonic()
        folder = prepare_stream(config, out, workers=self.workers, progress=True, restart=self.restart)
        manifest = read_manifest(folder)
        _say(folder, manifest, time.monotonic() - began)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        if tokens < config.tokens:
            print(f"the source holds no more than these {tokens:,} tokens; {config.tokens:,} were asked for")
        return 0


@dataclass
class Inspect:
    """Verify a prepared folder and show what is in it.

    Example: depthmix data inspect shards
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder made by `depthmix data prepare`."""
    verify: Literal["hash", "size"] = "hash"
    """hash reads every shard and compares SHA-256; size compares file sizes only."""

    def run(self) -> int:
        """Verify, print; returns 0."""
        from rich.console import Console
        from rich.table import Table

        from .summary import inspect

        found = inspect(self.folder, verify=self.verify)
        console = Console(highlight=False)
        console.print(str(self.folder), soft_wrap=True, markup=False, style="bold")
        checked = "SHA-256 of every shard is right" if self.verify == "hash" else "sizes are right"
        console.print(
            f"tokenizer {found['tokenizer']}, {found['vocab_size']:,} ids, {found['dtype']}; {checked}"
        )
        table = Table("", *found["splits"], box=None)
        for label, field, form in (
            ("tokens", "tokens", "{:,}"),
            ("documents", "documents", "{:,}"),
            ("bytes of text", "text_bytes", "{:,}"),
            ("bytes a token", "bytes_per_token", "{:.3f}"),
            ("shards", "shards", "{:,}"),
        ):
            table.add_row(label, *(form.format(split[field]) for split in found["splits"].values()))
        for quantile in next(iter(found["splits"].values()))["document_tokens"]:
            label = {"0": "shortest", "0.5": "median", "1": "longest"}.get(
                quantile, f"{float(quantile):.0%} below"
            )
            lengths = (split["document_tokens"][quantile] for split in found["splits"].values())
            table.add_row(f"document, {label}", *(f"{length:,} tokens" for length in lengths))
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
        for source in found["sources"][:10]:
            name = (
                source.get("path")
                or f"standard library of Python {source['python']}, {source['files']} files"
            )
            digest = f", SHA-256 {source['sha256'][:16]}" if "sha256" in source else " of text"
            console.print(
                f"{name}: {source['documents']:,} documents, {source['bytes']:,} bytes{digest}",
                soft_wrap=True,
                markup=False,
            )
        if len(found["sources"]) > 10:
            console.print(f"and {len(found['sources']) - 10:,} more files")
        for name, split in found["splits"].items():
            console.print(f"{name} begins:", style="bold")
            console.print(split["sample"], markup=False)
        return 0
