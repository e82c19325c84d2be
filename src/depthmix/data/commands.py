"""The commands ``depthmix data prepare`` and ``depthmix data inspect``.

Each is a dataclass that tyro turns into options; ``run`` does the work, prints
and returns the exit status. Errors pass through as exceptions.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import DataConfig


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
    workers: int | None = None
    """Threads that tokenize. Default: one a core. The result does not depend on it."""

    def run(self) -> int:
        """Prepare, print where and how much; returns 0."""
        from rich.console import Console
        from rich.table import Table

        from .build import prepare
        from .shards import read_manifest

        config = DataConfig(self.paths, self.tokenizer, self.text_field, self.val_fraction)
        began = time.monotonic()
        folder = prepare(config, self.out, workers=self.workers, progress=True)
        seconds = time.monotonic() - began

        console = Console(highlight=False)
        manifest = read_manifest(folder)
        splits = manifest["splits"]
        tokens = sum(split["tokens"] for split in splits.values())
        table = Table("", "tokens", "documents", "bytes of text", box=None)
        for name, split in splits.items():
            table.add_row(name, *(f"{split[count]:,}" for count in ("tokens", "documents", "text_bytes")))
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
        empty = sum(source["documents"] == 0 for source in manifest["sources"])
        if empty:
            console.print(f"{empty} of {len(manifest['sources'])} files held no text")
        console.print(
            f"tokenizer {manifest['tokenizer']['name']}, {tokens / 1e6:.2f} M tokens, "
            f"{seconds:.1f} s, {tokens / max(seconds, 1e-9) / 1e6:.2f} M tokens/s"
        )
        console.print(str(folder), soft_wrap=True, markup=False)
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
            console.print(
                f"{name}: {source['documents']:,} documents, {source['bytes']:,} bytes, "
                f"SHA-256 {source['sha256'][:16]}",
                soft_wrap=True,
                markup=False,
            )
        if len(found["sources"]) > 10:
            console.print(f"and {len(found['sources']) - 10:,} more files")
        for name, split in found["splits"].items():
            console.print(f"{name} begins:", style="bold")
            console.print(split["sample"], markup=False)
        return 0
