"""Small texts, and a way to run a piece of Python on its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from depthmix.data import TokenSplit

# A shell that starts the tests in the background has them ignore SIGINT, and processes inherit that.
INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def documents() -> list[str]:
    """Sixty different texts, some with characters of several bytes, line ends and quotes."""
    chance = random.Random(5)
    words = (
        "naïve 東京 the gate pool 'quoted' \"said\" tab\there end\r\nline depth 3.14 🙂 <|endoftext|>".split(
            " "
        )
    )
    return [f"{i}: " + " ".join(chance.choices(words, k=chance.randint(1, 400))) for i in range(60)]


@pytest.fixture
def text_folder(tmp_path, documents) -> Path:
    """The documents, one a .txt file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for place, document in enumerate(documents):
        (folder / f"{place:03d}.txt").write_bytes(document.encode())
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DEPTHMIX_CACHE", str(folder))
    return folder


@pytest.fixture
def python():
    """Start Python code in a process of its own; what it prints is piped."""
    started = []

    def start(code: str, *args: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE + code, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def counting_split():
    """A split in which token i is the number i, in shards of the given sizes."""

    def make(*shards: int) -> TokenSplit:
        ends = np.cumsum(shards)
        arrays = [np.arange(end - size, end, dtype="<u4") for end, size in zip(ends, shards, strict=True)]
        return TokenSplit("train", arrays, text_bytes=1, documents=1, fingerprint="0" * 16)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """What decides a dataset: the shards and the manifest, byte for byte."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "verified.json"}


@pytest.fixture(name="contents")
def contents_fixture():
    return contents
