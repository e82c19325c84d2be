"""Windows of tokens in a seeded order, each exactly once an epoch, with an exact state.

A split of T tokens has ``(T - 1) // seq_len`` windows. Window i holds tokens
``i * seq_len`` to ``i * seq_len + seq_len``: its inputs are all but the last
token, its targets all but the first, so every token (but those of an
incomplete window at the end) is a target once an epoch.

The order of an epoch is computed, not stored: position p shows window
``order(p)``, a bijection made from seed and epoch. The state is therefore two
numbers, epoch and position, whatever the size of the data.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .shards import TokenSplit

ROUNDS = 8
ORDER_BLOCK = 8192
"""Positions whose windows are computed at a time."""
Words = npt.NDArray[np.uint64]
"""Whole numbers of 64 bits."""


class Shuffle:
    """A bijection of ``0 .. size - 1`` chosen by ``seed`` and ``epoch``, in constant memory.

    A Feistel network over pairs (left, right) with left < a and right < b,
    where a = ceil(sqrt(size)) and b = ceil(size / a): each round adds a keyed
    hash of one half to the other, modulo a or b, which can be undone, so the
    whole is a bijection of ``0 .. a b - 1``. A result of ``size`` or more is
    put in again until it falls below (cycle walking), which keeps it one on
    ``0 .. size - 1``; as a b < size + a, that is rarely needed.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Windows at ``positions``: uint64 in, uint64 out, same shape [N]."""
        out = self._network(positions.astype(np.uint64))
        while (outside := out >= self.size).any():
            out[outside] = self._network(out[outside])
        return out

    def _network(self, x: Words) -> Words:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(left ^ key) % b) % b
            else:
                left = (left + _mix(right ^ key) % a) % a
        return left * b + right


def _mix(x: Words) -> Words:
    """splitmix64's finaliser: a 64-bit hash in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Loader:
    """Endless batches of ``split``; epoch follows epoch without dropping a window.

    ``batch_size``: rows a batch on this rank. ``seed``: chooses the order of
    every epoch. ``rank``, ``world_size``: this process takes rows
    ``rank * batch_size`` on of a global batch of ``batch_size * world_size``
    rows, which is the same however many processes share it.

    Raises ``UserError`` if the split holds less than one window.
    """

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ):
        if seq_len < 1 or batch_size < 1:
            raise UserError(f"seq_len and batch_size must be at least 1, got {seq_len} and {batch_size}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}")
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.windows = _windows(split, seq_len)
        """Windows an epoch."""
        self.epoch = 0
        self.index = 0
        """Windows of this epoch that all ranks together have taken."""
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def next_batch(self):
        """``(inputs, targets)``, int64 CPU tensors [batch_size, seq_len]; targets are one token ahead."""
        first = self.index + self.rank * self.batch_size
        rows = range(first, first + self.batch_size)
        batch = _batch(self.split, self.seq_len, [self._window(row) for row in rows])
        taken = self.index + self.batch_size * self.world_size
        self.epoch, self.index = self.epoch + taken // self.windows, taken % self.windows
        return batch

    def state_dict(self) -> dict:
        """Where the loader stands and what it serves: plain JSON types, the same on every rank."""
        return {"epoch": self.epoch, "index": self.index, **self._serves()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``; batch size and number of ranks may have changed.

        Raises ``UserError``, and changes nothing, if it is of other data, another ``seq_len`` or ``seed``.
        """
        for name, mine in self._serves().items():
            if state.get(name) != mine:
                raise UserError(
                    f"the saved place in the data does not fit: it has {name} {state.get(name)!r}, this "
                    f"run {mine!r}. Resume with the data and settings of the saved run, or start a new one"
                )
        epoch, index = state.get("epoch"), state.get("index")
        if not (
            isinstance(epoch, int) and isinstance(index, int) and epoch >= 0 and 0 <= index < self.windows
        ):
            raise UserError(
                f"the saved place in the data makes no sense: epoch {epoch!r}, "
                f"window {index!r} of {self.windows}"
            )
        self.epoch, self.index = epoch, index

    def _serves(self) -> dict:
        return {
            "data": self.split.fingerprint,
            "tokens": len(self.split),
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    def _window(self, row: int) -> int:
        """The window at ``row`` counted from the start of this epoch; rows run on into the next ones."""
        epoch, position = self.epoch + row // self.windows, row % self.windows
        block = position // ORDER_BLOCK
        order = self._orders.get((epoch, block))
        if order is None:
            first = block * ORDER_BLOCK
            positions = np.arange(first, min(first + ORDER_BLOCK, self.windows))
            order = Shuffle(self.windows, self.seed, epoch)(positions)
            if len(self._orders) >= 4:
                self._orders.pop(next(iter(self._orders)))  # the oldest
            self._orders[epoch, block] = order
        return int(order[position - block * ORDER_BLOCK])


def eval_batches(
    split: TokenSplit, seq_len: int, batch_size: int, tokens: int, *, spread: bool = False
) -> Iterator[tuple]:
    """``tokens`` of ``split`` in order, the same every time: its first, or with ``spread`` windows evenly over it.

    ``tokens`` is rounded up to whole windows and capped at the split. Yields
    ``(inputs, targets)``, int64 CPU tensors [batch_size, seq_len]; the last
    batch may have fewer rows. Raises ``UserError`` if the split holds less
    than one window.
    """
    there = _windows(split, seq_len)
    wanted = min(-(-tokens // seq_len), there)
    chosen = [place * there // wanted for place in range(wanted)] if spread else range(wanted)
    return (
        _batch(split, seq_len, chosen[first : first + batch_size]) for first in range(0, wanted, batch_size)
    )


def _windows(split: TokenSplit, seq_len: int) -> int:
    windows = (len(split) - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"the {split.name} split has {len(split)} tokens, one window of seq_len {seq_len} takes "
            f"{seq_len + 1}: give more text, a smaller seq_len, or another val_fraction"
        )
    return windows


def _batch(split: TokenSplit, seq_len: int, windows):
    import torch

    inputs = np.empty((len(windows), seq_len), dtype=np.int64)
    targets = np.empty((len(windows), seq_len), dtype=np.int64)
    for row, window in enumerate(windows):
        tokens = split.read(window * seq_len, seq_len + 1)
        inputs[row] = tokens[:-1]
        targets[row] = tokens[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)
