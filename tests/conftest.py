"""Tests that need other packages run when asked for; examples that hypothesis draws are the same in every run."""

from pathlib import Path

import pytest
from hypothesis import settings
from kept import pytest_addoption, pytest_configure  # noqa: F401, hooks: --kept

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

ON_REQUEST = ("peers", "kernels", "integrations", "hf")
"""Folders whose files need packages that only the extras ``peers``, ``integrations`` and ``test-hf`` install; each
named as its marker."""


LONGEST = (
    "test_readme.py",
    "parallel/test_exactness.py",
    "parallel/test_faults.py",
    "parallel/test_sharded_checkpoint.py",
    "parallel/test_count.py",
    "test_compare.py",
    "test_train.py",
    "parallel/test_resume.py",
    "report/test_diagnosis.py",
    "diagnostics/test_command.py",
    "test_tutorial.py",
    "test_depth_sweep.py",
)
"""Files that begin before all others: of two processes, one would wait long for the other that began them last."""


def pytest_collection_modifyitems(config, items):
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_ignore_collect(collection_path: Path, config):
    """Such a folder is not there unless ``-m`` names it."""
    parts = collection_path.relative_to(config.rootpath).parts
    asked = config.getoption("markexpr")
    return True if any(name in parts and name not in asked for name in ON_REQUEST) else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where two small runs lie, ``prenorm`` and ``mgr-competitive``, of four steps on ``text.txt`` beside them."""
    from depthmix import cli

    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)}\n" for i in range(3000)))
    for residual in ("prenorm", "mgr-competitive"):
        command = (
            f"train --preset quick --residual {residual} --n-layer 3 --d-model 16 --seq-len 32 --steps 4 "
            f"--batch-size 4 --eval-tokens 64 --eval-interval 2 --val-fraction 0.5 --quiet "
            f"--tokenizer bpe:300 --device cpu --data {text} --cache-dir {folder / 'cache'} "
            f"--out {folder / residual}"
        )
        assert cli.main(command.split()) == 0
    return folder
