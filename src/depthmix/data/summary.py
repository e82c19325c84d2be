"""What is in a prepared folder: counts, lengths of documents, a look at the text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from .shards import TokenSplit, open_dataset

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SCAN_TOKENS = 1 << 22


def inspect(
    folder: str | Path, *, verify: Literal["size", "hash"] = "hash", sample_tokens: int = 128
) -> dict:
    """Verify a prepared folder and describe it.

    Returns plain JSON types: ``folder``, ``tokenizer``, ``vocab_size``,
    ``dtype``, ``verified`` ("hash" or "size"), ``val_fraction``, ``sources``
    and ``splits``, which for ``train``, ``val`` and, where there is one, ``test`` has ``tokens``,
    ``documents``, ``text_bytes``, ``bytes_per_token``, ``shards`` (a count),
    ``document_tokens`` (quantile -> length in tokens, end token not counted)
    and ``sample`` (text of the first ``sample_tokens`` tokens).

    Raises ``UserError`` for a folder that is no dataset, ``RunError`` for a
    damaged one.
    """
    dataset = open_dataset(folder, verify=verify)
    manifest, tokenizer = dataset.manifest, dataset.tokenizer
    splits = {}
    for name in manifest["splits"]:
        split: TokenSplit = getattr(dataset, name)
        lengths = np.concatenate(list(_document_lengths(split, tokenizer.end_token)))
        splits[name] = {
            "tokens": len(split),
            "documents": split.documents,
            "text_bytes": split.text_bytes,
            "bytes_per_token": split.text_bytes / len(split),
            "shards": len(manifest["splits"][name]["shards"]),
            "document_tokens": {
                f"{quantile:g}": int(length)
                for quantile, length in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
            },
            "sample": tokenizer.decode(split.read(0, min(sample_tokens, len(split))).tolist()),
        }
    return {
        "folder": str(folder),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(manifest["dtype"]).name,
        "verified": verify,
        "val_fraction": manifest["val_fraction"],
        "sources": manifest["sources"],
        "splits": splits,
    }


def _document_lengths(split: TokenSplit, end_token: int) -> Iterator[np.ndarray]:
    """Tokens of each document, a part of the split at a time."""
    before = -1  # place of the end token before
    for start in range(0, len(split), SCAN_TOKENS):
        part = split.read(start, min(SCAN_TOKENS, len(split) - start))
        ends = start + np.flatnonzero(part == end_token)
        if len(ends):
            yield np.diff(ends, prepend=before) - 1
            before = ends[-1]
