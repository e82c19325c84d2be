"""Text in, batches of token ids out.

``prepare`` turns files into a folder of memory-mapped shards with a manifest,
``open_dataset`` opens such a folder, ``Loader`` serves seeded windows of it
with a state that is exact, ``eval_batches`` serves the same windows every time.
"""

from .build import prepare
from .loader import Loader, eval_batches
from .shards import Dataset, TokenSplit, open_dataset
from .stream import StreamConfig, prepare_stream
from .summary import inspect
from .tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Dataset",
    "Loader",
    "StreamConfig",
    "TokenSplit",
    "Tokenizer",
    "eval_batches",
    "inspect",
    "load_tokenizer",
    "open_dataset",
    "prepare",
    "prepare_stream",
]
