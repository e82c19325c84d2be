"""The bench's adapters and the packages themselves, as far as they run on a CPU."""

import pytest
import torch

from depthmix.bench import cases as _cases  # noqa: F401  registers them
from depthmix.bench import runner
from depthmix.bench.case import CASES, Size

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    "name, variant, peer",
    [
        ("pool", "sources-8", "fla naive_attnres"),
        ("pool", "sources-49", "fla naive_attnres"),
        ("hyper-step", "hc", "hyper-connections"),
    ],
)
def test_peer_is_right_and_timed(name, variant, peer):
    size = Size(torch.device("cpu"), torch.float32, {"n": 4, "width": 24}, 64)
    record = runner.measure(
        CASES[name].build(size, variant), torch.device("cpu"), kernels=("auto",), against=("peers",), rounds=1,
        flush=False, copy_bytes=2**12,
    )  # fmt: skip
    (row,) = [row for row in record["rows"] if row["candidate"] == peer]
    assert row["status"] == "timed" and row["version"], row
