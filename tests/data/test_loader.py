import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.data import Loader, eval_batches
from depthmix.data.loader import Shuffle
from depthmix.errors import UserError


@settings(max_examples=150)
@given(size=st.integers(1, 4000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_shuffle_is_a_bijection(size, seed, epoch):
    assert sorted(Shuffle(size, seed, epoch)(np.arange(size)).tolist()) == list(range(size))


@settings(max_examples=60)
@given(size=st.integers(10**6, 2**48), seed=st.integers(0, 2**32), start=st.integers(0, 2**48))
def test_shuffle_of_huge_ranges_never_repeats(size, seed, start):
    positions = (np.arange(5000, dtype=np.uint64) + np.uint64(start)) % np.uint64(size)
    windows = Shuffle(size, seed, 0)(positions)
    assert len(np.unique(windows)) == len(np.unique(positions))
    assert int(windows.max()) < size


@pytest.mark.parametrize("size", [2, 7, 12, 40])
def test_shuffle_puts_every_window_everywhere(size):
    """Over many epochs each window comes first, and last, about equally often (6 standard deviations)."""
    epochs = 200 * size
    orders = np.stack([Shuffle(size, 3, epoch)(np.arange(size)) for epoch in range(epochs)]).astype(int)
    deviation = math.sqrt(epochs / size * (1 - 1 / size))
    for position in (0, size // 2, size - 1):
        counts = np.bincount(orders[:, position], minlength=size)
        assert np.abs(counts - epochs / size).max() < 6 * deviation


def test_neighbours_do_not_stay_neighbours():
    order = Shuffle(10_000, 0, 0)(np.arange(10_000)).astype(int)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def windows_of(batches, seq_len):
    """Numbers of the windows in order, after checking that each is whole: token i is the number i."""
    found = []
    for inputs, targets in batches:
        for row, ahead in zip(inputs, targets, strict=True):
            window = int(row[0]) // seq_len
            expected = torch.arange(window * seq_len, window * seq_len + seq_len + 1)
            assert torch.equal(row, expected[:-1]) and torch.equal(ahead, expected[1:])
            found.append(window)
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_every_window_once_an_epoch(counting_split, batch_size):
    # 20 windows of 5 from 103 tokens, over shards that cut through windows, one of a single token.
    loader = Loader(counting_split(13, 1, 40, 49), seq_len=5, batch_size=batch_size, seed=1)
    rows = windows_of([loader.next_batch() for _ in range(4 * 20 // batch_size + 1)], 5)
    epochs = [rows[start : start + 20] for start in range(0, len(rows) - 19, 20)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1]


def test_batch_types_and_epoch_numbers(counting_split):
    loader = Loader(counting_split(101), seq_len=5, batch_size=8, seed=1)
    inputs, targets = loader.next_batch()
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (8, 5)
    assert inputs.is_contiguous() and targets.is_contiguous()
    loader.next_batch()
    loader.next_batch()
    assert (loader.epoch, loader.index) == (1, 4)


def test_seed_decides_the_order(counting_split):
    def rows(seed):
        return windows_of([Loader(counting_split(1001), 5, 50, seed).next_batch()], 5)

    assert rows(1) == rows(1) != rows(2)


@pytest.mark.parametrize("steps", [0, 1, 3, 6, 17])
def test_state_is_exact(counting_split, steps):
    split = counting_split(60, 41)
    whole = Loader(split, 5, 3, seed=9)
    for _ in range(steps):
        whole.next_batch()
    saved = json.dumps(whole.state_dict())
    assert len(saved) < 300
    again = Loader(split, 5, 3, seed=9)
    again.load_state_dict(json.loads(saved))
    for _ in range(20):
        for a, b in zip(whole.next_batch(), again.next_batch(), strict=True):
            assert torch.equal(a, b)
    assert whole.state_dict() == again.state_dict()


def test_state_across_blocks_of_the_order(counting_split):
    """An epoch longer than the part of the order that is computed at a time."""
    split = counting_split(20_001)
    loader = Loader(split, 1, 3000, seed=0)
    rows = windows_of([loader.next_batch() for _ in range(7)], 1)
    assert sorted(rows[:20_000]) == list(range(20_000))
    again = Loader(split, 1, 500, seed=0)
    again.load_state_dict({**loader.state_dict(), "epoch": 0, "index": 8000})
    assert windows_of([again.next_batch()], 1) == rows[8000:8500]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_are_one(counting_split, world_size):
    split, share = counting_split(101), 12 // world_size
    one = Loader(split, 5, 12, seed=4)
    ranks = [Loader(split, 5, share, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(9):
        expected = one.next_batch()
        parts = [loader.next_batch() for loader in ranks]
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in parts]), expected[side])
        assert all(loader.state_dict() == one.state_dict() for loader in ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 6}, "seq_len 6, this run 5"),
        ({"seed": 3}, "seed 3, this run 1"),
        ({"data": "f" * 16}, "data 'ffff"),
        ({"tokens": 77}, "tokens 77, this run 101"),
        ({"index": 20}, "window 20 of 20"),
        ({"epoch": None}, "epoch None"),
    ],
)
def test_state_that_does_not_fit(counting_split, change, message):
    loader = Loader(counting_split(101), 5, 3, seed=1)
    loader.next_batch()
    before = loader.state_dict()
    with pytest.raises(UserError, match=message):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before


def test_too_little_data(counting_split):
    Loader(counting_split(6), 5, 1, 0)
    with pytest.raises(UserError, match=r"train split has 5 tokens, one window of seq_len 5 takes 6"):
        Loader(counting_split(5), 5, 1, 0)
    with pytest.raises(UserError, match="train split has 5 tokens"):
        eval_batches(counting_split(5), 5, 1, 10)


def test_wrong_arguments(counting_split):
    for arguments in ({"seq_len": 0}, {"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(UserError):
            Loader(counting_split(100), **{"seq_len": 5, "batch_size": 1, "seed": 0, **arguments})


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (5, 1), (6, 2), (50, 10), (1000, 20)])
def test_eval_batches_are_the_first_tokens(counting_split, tokens, windows):
    split = counting_split(30, 73)
    batches = list(eval_batches(split, 5, 4, tokens))
    assert windows_of(batches, 5) == list(range(windows))
    assert [len(inputs) for inputs, _ in batches] == [4] * (windows // 4) + [windows % 4] * (windows % 4 > 0)


@settings(max_examples=100)
@given(data=st.data(), shards=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_read_across_shards(counting_split, data, shards):
    split = counting_split(*shards)
    start = data.draw(st.integers(0, len(split)))
    count = data.draw(st.integers(0, len(split) - start))
    assert split.read(start, count).tolist() == list(range(start, start + count))


def test_read_outside(counting_split):
    for start, count in ((-1, 2), (9, 2), (11, 0)):
        with pytest.raises(IndexError):
            counting_split(10).read(start, count)


@pytest.mark.parametrize("tokens", [1, 20, 60, 1000])
def test_eval_batches_spread_over_the_split(counting_split, tokens):
    """Whole windows, none twice, in order, from the first on and as far apart as they can be."""
    split = counting_split(101)
    batches = list(eval_batches(split, 5, 4, tokens, spread=True))
    starts = [row[0].item() for inputs, _ in batches for row in inputs]
    assert len(starts) == min(20, -(-tokens // 5))
    assert starts[0] == 0 and all(start % 5 == 0 for start in starts) and starts == sorted(set(starts))
    gaps = np.diff([*starts, 100])
    assert gaps.max() - gaps.min() <= 5
