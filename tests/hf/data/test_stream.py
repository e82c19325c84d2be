"""The stream of ``datasets`` into shards: the bytes of one run whatever happens to it on the way."""

import errno
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from depthmix import cli
from depthmix.config import DataConfig
from depthmix.data import StreamConfig, load_tokenizer, open_dataset, prepare, prepare_stream, stream
from depthmix.errors import Interrupted, RunError, UserError

pytestmark = pytest.mark.hf
SOURCE = Path(__file__).parents[3] / "src"
SHARD = 5000


def texts(file):
    chance = random.Random(file)
    words = "naïve 東京 the gate pool <|endoftext|> line\nof depth 3.14 🙂".split(" ")
    made = [f"{file} {i}: " + " ".join(chance.choices(words, k=chance.randint(1, 80))) for i in range(600)]
    made[7] = ""
    return made


def table(rows):
    count = len(rows)
    return pa.table(
        {
            "text": rows,
            "id": [f"<urn:uuid:{i}>" for i in range(count)],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": [f"https://example.org/{i}" for i in range(count)],
            "date": ["2024-03-01T00:00:00Z"] * count,
            "file_path": ["s3://commoncrawl/x.warc.gz"] * count,
            "language": ["en"] * count,
            "language_score": [0.97] * count,
            "token_count": [len(text.split()) for text in rows],
        }
    )


@pytest.fixture
def files(tmp_path):
    """Three files in FineWeb's schema, of several row groups."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for file in range(3):
        pq.write_table(table(texts(file)), folder / f"{file:03d}_00000.parquet", row_group_size=170)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of a few documents, so that a few hundred make many; no waiting."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(stream, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(stream, "RETRY_SECONDS", (0.01, 0.01))


def config(source, **options):
    return StreamConfig((str(source),), **{"tokens": 10**7, "val_fraction": 0.1} | options)


def make(source, out, **options):
    return prepare_stream(config(source, **options), out, workers=2, shard_tokens=SHARD)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.fixture
def whole(files, tmp_path):
    """What a run that nothing disturbs makes."""
    out = make(files, tmp_path / "whole")
    found = shards(out)
    assert len(found) > 10
    return {**found, "manifest.json": (out / "manifest.json").read_bytes()}


def same(out, whole):
    assert {p.name for p in out.iterdir()} == {*whole, "verified.json"}
    assert {**shards(out), "manifest.json": (out / "manifest.json").read_bytes()} == whole
    assert not (out.parent / f".{out.name}.partial").exists()


def breaks(monkeypatch, at, error):
    """The stream raises what ``error()`` gives at each (file, row) of ``at``, once; returns those still to come."""
    left, real = list(at), stream._Stream.texts

    def broken(self, file, row):
        for texts in real(self, file, row):
            yield texts
            row += len(texts)
            if left and (file, row) >= left[0]:
                left.pop(0)
                raise error()

    monkeypatch.setattr(stream._Stream, "texts", broken)
    return left


# ---- content ------------------------------------------------------------------------------------


def test_equal_to_prepare_of_the_same_files(files, tmp_path, whole):
    paths = tuple(map(str, sorted(files.iterdir())))
    out = prepare(DataConfig(paths, "gpt2", val_fraction=0.1), tmp_path / "other", shard_tokens=SHARD)
    assert shards(out) == {name: raw for name, raw in whole.items() if name.endswith(".bin")}
    mine, theirs = json.loads(whole["manifest.json"]), json.loads((out / "manifest.json").read_text())
    assert mine["splits"] == theirs["splits"]
    assert (
        [s["documents"] for s in mine["sources"]] == [s["documents"] for s in theirs["sources"]] == [599] * 3
    )


def test_a_test_part_is_that_of_prepare(files, tmp_path):
    paths = tuple(map(str, sorted(files.iterdir())))
    fractions = {"val_fraction": 0.1, "test_fraction": 0.2}
    out = prepare_stream(config(files, **fractions), tmp_path / "stream", shard_tokens=SHARD)
    other = prepare(DataConfig(paths, "gpt2", **fractions), tmp_path / "other", shard_tokens=SHARD)
    assert shards(out) == shards(other) and any(name.startswith("test-") for name in shards(out))
    assert open_dataset(out).test.documents > 200


def test_ends_with_the_document_that_reaches_the_tokens(files, tmp_path):
    tokenizer = load_tokenizer("gpt2")
    lengths = [len(tokenizer.encode(text)) + 1 for file in range(3) for text in texts(file) if text]
    for place, asked in ((700, sum(lengths[:701])), (701, sum(lengths[:701]) + 1), (0, 1)):
        if place == 0:
            with pytest.raises(UserError, match=r"none of 1 documents fell to the (train|val) split"):
                make(files, tmp_path / "one", tokens=asked)
            assert not (tmp_path / ".one.partial").exists()
            continue
        dataset = open_dataset(make(files, tmp_path / f"{place}", tokens=asked), verify="hash")
        assert dataset.train.documents + dataset.val.documents == place + 1
        assert len(dataset.train) + len(dataset.val) == sum(lengths[: place + 1])


def test_copy_of_a_repository(files, tmp_path, whole):
    """Its README says which files a configuration has, as on the hub."""
    repository = tmp_path / "fineweb"
    (repository / "sample").mkdir(parents=True)
    (repository / "data").mkdir()
    shutil.copytree(files, repository / "sample/10BT")
    pq.write_table(table(["something else"] * 3), repository / "data/000.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n# FineWeb\n"
    )
    out = make(repository, tmp_path / "out")
    assert shards(out) == {name: raw for name, raw in whole.items() if name.endswith(".bin")}
    with pytest.raises(UserError, match=r"sample-11BT.*sample-10BT"):
        make(repository, tmp_path / "out2", subset="sample-11BT")


def test_done_is_done(files, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(stream, "_open", None)
    assert make(files, tmp_path / "whole") == tmp_path / "whole"
    with pytest.raises(UserError, match="made from other files or settings"):
        make(files, tmp_path / "whole", tokens=100)


# ---- stopping and going on ----------------------------------------------------------------------


def test_stream_that_breaks_off_and_comes_back(files, tmp_path, whole, monkeypatch, capsys):
    left = breaks(
        monkeypatch, [(0, 50), (0, 350), (1, 200), (2, 600)], lambda: ConnectionError("reset by peer")
    )
    same(make(files, tmp_path / "out"), whole)
    assert not left


def test_stream_that_does_not_come_back_goes_on_later(files, tmp_path, whole, monkeypatch):
    for at in ((0, 50), (0, 400), (1, 100), (1, 600), (2, 450)):
        with monkeypatch.context() as patch:
            real = stream._Stream.texts

            def dead(self, file, row, real=real, at=at):
                for texts in real(self, file, row):
                    if (file, row) >= at:
                        raise TimeoutError("timed out")
                    row += len(texts)
                    yield texts
                if file >= at[0]:
                    raise TimeoutError("timed out")

            patch.setattr(stream._Stream, "texts", dead)
            with pytest.raises(
                RunError, match=r"broke off in .*parquet at row .*timed out.*in 2 tries.*goes on"
            ):
                make(files, tmp_path / "out")
        state = json.loads((tmp_path / ".out.partial/state.json").read_text())
        # Fifty rows come at once.
        assert [at[0], 0] <= state["place"] <= [at[0], at[1] + 50]
    same(make(files, tmp_path / "out"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal(files, tmp_path, whole, monkeypatch, number):
    monkeypatch.setattr(stream._Ahead, "take", take_slowly(stream._Ahead.take, 20, number))
    with pytest.raises(Interrupted, match=rf"stopped by {number.name} at [\d,]+ tokens, all of them kept"):
        make(files, tmp_path / "out")
    state = json.loads((tmp_path / ".out.partial/state.json").read_text())
    assert state["place"] != [0, 0] and not state["finished"] and state["splits"]["train"]["tokens"]
    monkeypatch.undo()
    same(make(files, tmp_path / "out"), whole)


def take_slowly(real, count, number):
    taken = []

    def take(self, timeout):
        taken.append(0)
        if len(taken) == count:
            signal.raise_signal(number)
        return real(self, timeout)

    return take


KILLED = """
import sys, time
from depthmix.data import StreamConfig, prepare_stream, stream
stream.BLOCK_BYTES, stream.ROWS_AT_ONCE, stream.COMMIT_SECONDS = 3000, 50, float(sys.argv[3])
real = stream._Stream.texts
def slowly(self, file, row):
    for texts in real(self, file, row):
        time.sleep(0.02)
        yield texts
stream._Stream.texts = slowly
config = StreamConfig((sys.argv[1],), tokens=10**7, val_fraction=0.1)
prepare_stream(config, sys.argv[2], workers=2, shard_tokens=5000)
"""


def test_killed_and_taken_up(files, tmp_path, whole):
    """SIGKILL with a state every block, then with one at the end of shards only."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    places = []
    for seconds, wait in (("0", 0.05), ("0", 0.2), ("1000", 0.3)):
        started = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(files), str(out), seconds],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )
        before = (partial / "state.json").read_bytes() if partial.exists() else None
        while started.poll() is None:
            state = (partial / "state.json").read_bytes() if (partial / "state.json").exists() else None
            if state != before:
                break
            time.sleep(0.002)
        time.sleep(wait)
        started.kill()
        started.wait()
        if not partial.exists():
            break
        places.append(json.loads((partial / "state.json").read_text())["place"])
    assert places == sorted(places) and places[0] > [0, 0]
    same(make(files, tmp_path / "out"), whole)


def test_killed_between_the_last_shard_and_the_name(files, tmp_path, whole, monkeypatch):
    """The end: hashes, manifest, renaming. Nothing is read again."""
    for step in ("verify_shards", "write_manifest", "mark_verified", "fsync", "rename"):
        out = tmp_path / step
        with monkeypatch.context() as patch:

            def stop(*arguments):
                raise KeyboardInterrupt

            if step == "rename":
                patch.setattr(stream.os, "rename", stop)
            elif step == "fsync":
                # The one after the folder is complete, not those of the state.
                patch.setattr(
                    stream, "mark_verified", lambda *a, p=patch, s=stop: p.setattr(stream, "fsync", s)
                )
            else:
                patch.setattr(stream, step, stop)
            with pytest.raises(KeyboardInterrupt):
                make(files, out)
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_open", None)
            make(files, out)
        assert shards(out) == {name: raw for name, raw in whole.items() if name.endswith(".bin")}
        assert (out / "manifest.json").read_bytes() == whole["manifest.json"]
        assert not (out / "state.json").exists()


def stopped_half_way(files, tmp_path, monkeypatch, **options):
    with monkeypatch.context() as patch:
        breaks(patch, [(1, 300)] * 3, lambda: ConnectionError("gone"))
        patch.setattr(stream, "RETRY_SECONDS", ())
        with pytest.raises(RunError, match="broke off"):
            make(files, tmp_path / "out", **options)
    return tmp_path / ".out.partial"


def test_other_settings_or_files_are_not_mixed(files, tmp_path, monkeypatch, whole):
    partial = stopped_half_way(files, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"begun with other settings.*--restart"):
        make(files, tmp_path / "out", val_fraction=0.2)
    first = files / "000_00000.parquet"
    times = first.stat()
    os.utime(first, (1, 1))
    with pytest.raises(UserError, match=r"the files are not those .*--restart"):
        make(files, tmp_path / "out")
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert partial.exists()
    prepare_stream(config(files, val_fraction=0.2), tmp_path / "out", restart=True, shard_tokens=SHARD)
    assert open_dataset(tmp_path / "out").manifest["val_fraction"] == 0.2


@pytest.mark.parametrize("harm", ["flip", "shorten", "state"])
def test_damage_to_what_was_written_is_found(files, tmp_path, monkeypatch, whole, harm):
    partial = stopped_half_way(files, tmp_path, monkeypatch)
    last = max(partial.glob("train-*.bin"))
    if harm == "shorten":
        os.truncate(
            last, json.loads((partial / "state.json").read_text())["splits"]["train"]["part"]["tokens"]
        )
    else:
        path = partial / "state.json" if harm == "state" else last
        raw = bytearray(path.read_bytes())
        raw[20] ^= 1
        path.write_bytes(raw)
    with pytest.raises((RunError, UserError), match=r"(is damaged|has \d+ bytes where).*--restart"):
        make(files, tmp_path / "out")
    out = prepare_stream(config(files), tmp_path / "out", restart=True, shard_tokens=SHARD)
    same(out, whole)


def test_a_place_in_a_file(files, monkeypatch):
    """From any row on, and without the row groups that end before it: their pages are overwritten here."""
    source = config(files)
    for row in (0, 1, 169, 170, 171, 340, 509, 510, 599, 600):
        opened = stream._open(source, stream._named(source.source), None)
        assert [text for part in opened.texts(1, row) for text in part] == texts(1)[row:]
    path = files / "001_00000.parquet"
    footer = pq.read_metadata(path)
    begin = footer.row_group(2).column(0).dictionary_page_offset
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + b"\xff" * (begin - 4) + raw[begin:])
    opened = stream._open(source, stream._named(source.source), None)
    assert [text for part in opened.texts(1, 345) for text in part] == texts(1)[345:]
    with pytest.raises((OSError, pa.ArrowException)):
        [*opened.texts(1, 300)]


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut short", "overwritten"])
def test_broken_file(files, tmp_path, whole, harm):
    broken = files / "001_00000.parquet"
    good = broken.read_bytes()
    if harm == "cut short":
        broken.write_bytes(good[: len(good) // 2])
    else:
        broken.write_bytes(good[:8000] + b"\xff" * 12000 + good[20000:])
    with pytest.raises(RunError, match=r"001_00000.parquet is damaged.*get the file again.*goes on"):
        make(files, tmp_path / "out")
    state = json.loads((tmp_path / ".out.partial/state.json").read_text())
    assert state["place"][0] == 1
    broken.write_bytes(good)
    out = make(files, tmp_path / "out")
    assert shards(out) == {name: raw for name, raw in whole.items() if name.endswith(".bin")}
    assert make(files, tmp_path / "out") == out


def test_network_that_is_not_there(files, tmp_path, monkeypatch):
    import datasets

    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"cannot be reached.*HTTPS_PROXY.*--source"):
        prepare_stream(StreamConfig(("http://127.0.0.1:9/a.parquet",), tokens=100), out)

    def away(*names, **options):
        assert names == ("HuggingFaceFW/fineweb", "sample-10BT") and options["columns"] == ["text"]
        raise ConnectionError("Couldn't reach 'HuggingFaceFW/fineweb' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", away)
    with pytest.raises(RunError, match=r"HuggingFaceFW/fineweb cannot be reached.*--source"):
        prepare_stream(StreamConfig(tokens=100), out)
    assert [path.name for path in tmp_path.iterdir()] == ["parquet"]


class Failing(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files; every third answer of more than 2 KB stops in the middle."""

    protocol_version = "HTTP/1.1"
    count = 0

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = Path(self.translate_path(self.path))
        raw = path.read_bytes()
        size, wanted = len(raw), self.headers.get("Range")
        first, last = 0, size - 1
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or size - 1), size - 1)
        raw = raw[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body:
            type(self).count += len(raw) > 2000
            if len(raw) > 2000 and type(self).count % 3 == 2:
                self.wfile.write(raw[:1000])
                self.close_connection = True
                return
            self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


def test_server_that_breaks_off(files, tmp_path, whole, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(stream, "RETRY_SECONDS", (0.01,) * 20)
    Failing.count = 0

    def handler(*arguments):
        return Failing(*arguments, directory=str(files))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        sources = tuple(f"{address}/{path.name}" for path in sorted(files.iterdir()))
        out = prepare_stream(
            StreamConfig(sources, tokens=10**7, val_fraction=0.1), tmp_path / "out", shard_tokens=SHARD
        )
        server.shutdown()
    assert Failing.count >= 3
    assert shards(out) == {name: raw for name, raw in whole.items() if name.endswith(".bin")}


def test_disk_that_becomes_full(files, tmp_path, whole):
    """The kernel's refusal, through a limit on the size of files; the validation shard meets it first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        with pytest.raises(
            RunError, match=r"no room to write .*MB are still needed.*tokens are kept.*goes on"
        ):
            make(files, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(make(files, tmp_path / "out"), whole)


def test_disk_that_fills_at_any_write(files, tmp_path, whole, monkeypatch):
    real, calls = stream.SplitWriter.write, []

    def write(self, *arguments):
        calls.append(self)
        if len(calls) % 17 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, *arguments)

    monkeypatch.setattr(stream, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(stream.SplitWriter, "write", write)
    failed = 0
    while not (tmp_path / "out").exists():
        try:
            make(files, tmp_path / "out")
        except RunError as error:
            assert "No space left on device" in str(error)
            failed += 1
    assert failed > 3
    same(tmp_path / "out", whole)


def test_disk_that_is_too_small(files, tmp_path):
    with pytest.raises(UserError, match=r"take 20,000,\d+\.\d+ GB more, and .* GB are free in .*--out"):
        make(files, tmp_path / "out", tokens=10**16)
    assert [path.name for path in tmp_path.iterdir()] == ["parquet"]


def test_columns(files, tmp_path):
    with pytest.raises(
        UserError, match=r"unknown field 'txt'. Did you mean 'text'\?.*file_path.*--text-field"
    ):
        make(files, tmp_path / "out", text_field="txt")
    with pytest.raises(UserError, match=r"column 'token_count' holds int64, not text"):
        make(files, tmp_path / "out", text_field="token_count")
    make(files, tmp_path / "out", text_field="url")


# ---- command line -------------------------------------------------------------------------------


def test_command_and_training(files, tmp_path, capsys):
    out = tmp_path / "shards"
    command = f"data fineweb --source {files} --tokens 20K --val-fraction 0.1 --out {out}"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "tokenizer gpt2, 0.02 M tokens" in printed and printed.rstrip().endswith("shards")
    assert cli.main(["data", "inspect", str(out)]) == 0
    assert "SHA-256 of every shard is right" in capsys.readouterr().out
    command = (
        f"train --preset S --data {out} --out {tmp_path / 'run'} --n-layer 1 --d-model 32 --n-head 1 --seq-len 64 "
        f"--batch-size 2 --micro-batch 2 --steps 1 --eval-tokens 64 --device cpu --precision fp32 --no-report --quiet"
    )
    assert cli.main(command.split()) == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["model"]["vocab_size"] == 50304


def test_source_smaller_than_asked_says_so(files, tmp_path, capsys):
    command = f"data fineweb --source {files} --tokens 1M --val-fraction 0.1 --out {tmp_path / 'out'}"
    assert cli.main(command.split()) == 0
    assert "the source holds no more than these" in capsys.readouterr().out
