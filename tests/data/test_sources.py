import gzip
import io
import json
import lzma
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.data.sources import (
    SECTION_BYTES,
    SECTION_LIMIT,
    Reading,
    find_sources,
    sections,
    standard_library,
)
from depthmix.errors import RunError, UserError

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
}


def as_jsonl(texts, field="text"):
    return "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(texts)).encode()


def as_parquet(texts, field="text"):
    buffer = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, buffer, row_group_size=7)
    return buffer.getvalue()


def read(*data, text_field="text"):
    """All documents of ``data``."""
    found = []
    for source in find_sources(map(str, data), text_field):
        for block in source.blocks(Reading()):
            for raw, text in block.documents():
                assert raw.decode() == text
                found.append(text)
    return found


# ---- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
def test_formats_give_the_same_documents(tmp_path, documents, packing):
    for name, raw in (("a.jsonl", as_jsonl(documents)), ("a.parquet", as_parquet(documents))):
        path = tmp_path / (name + packing)
        path.write_bytes(PACK[packing](raw))
        assert read(path) == documents
    (tmp_path / "texts").mkdir()
    for place, document in enumerate(documents):
        (tmp_path / "texts" / f"{place:03d}.TXT{packing}").write_bytes(PACK[packing](document.encode()))
    assert read(tmp_path / "texts") == documents


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACK[packing](b"one ") + PACK[packing](b"") + PACK[packing](b"two"))
    assert read(path) == ["one two"]


def test_lines_and_rows_of_every_size(tmp_path):
    """Documents around and above the size of a block, and fields beside the text."""
    texts = ["x" * size for size in (1, 1 << 20, 3, (5 << 20) + 1, 2)] + ["é" * (1 << 20)] * 2
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(texts, "body") + b"\n\n  \n")
    (tmp_path / "a.parquet").write_bytes(as_parquet(texts, "body"))
    assert read(tmp_path / "a.jsonl", text_field="body") == texts
    assert read(tmp_path / "a.parquet", text_field="body") == texts


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(["", "a", None, "b"]))
    (tmp_path / "b.parquet").write_bytes(as_parquet(["", "c", None, "d"]))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"e")
    assert read(tmp_path) == ["a", "b", "c", "d", "e"]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_jsonl(["one"]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    (tmp_path / "c.txt").write_bytes(b"\xef")  # the beginning of a mark is not one
    assert read(tmp_path / "a.jsonl", tmp_path / "b.txt") == ["one", "two"]
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "c.txt")


def test_half_surrogates_in_json_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "a\ud83db"}')
    assert read(tmp_path / "a.jsonl") == ["a\ufffdb"]


# ---- sections of .txt ---------------------------------------------------------------------------


def pieces_of(raw, sizes):
    start = 0
    for size in sizes:
        yield raw[start : start + size]
        start += size
    yield raw[start:]


@settings(max_examples=60)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["a", "é", "東", "🙂", " ", "\n", "\n\n", "\r\n\r\n", "word "]),
            st.integers(1, 30000),
        ),
        max_size=8,
    ),
    sizes=st.lists(st.integers(1, 60000), max_size=8),
)
def test_sections_are_the_text_however_it_arrives(parts, sizes):
    raw = "".join(text * count for text, count in parts).encode()
    found = list(sections([raw]))
    assert b"".join(found) == raw
    assert list(sections(pieces_of(raw, sizes))) == found
    for section in found:
        section.decode()  # no character is cut
        assert 0 < len(section) <= SECTION_LIMIT
    for section in found[:-1]:
        assert len(section) >= SECTION_BYTES - 3


def test_where_sections_are_cut():
    fill = b"a" * SECTION_BYTES
    for middle, cut in (
        (b"line\nb word\n\n\nnext", b"line\nb word\n\n\n"),
        (b"line\r\nb word\r\n\r\nnext", b"line\r\nb word\r\n\r\n"),
        (b"word\nnext line", b"word\n"),
        (b"word next", b"word"),
    ):
        raw = fill + middle + b"z" * SECTION_LIMIT
        assert next(sections([raw])) == fill + cut
    assert next(sections([b"z" * 100_000])) == b"z" * SECTION_LIMIT
    assert list(sections([b"\n" * SECTION_LIMIT])) == [b"\n" * SECTION_LIMIT]


# ---- which files --------------------------------------------------------------------------------


def test_folders_globs_and_files_each_once(tmp_path, monkeypatch):
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.jsonl", "b/.hidden/x.txt", "b/.y.txt", "b/notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_jsonl([name]) if name.endswith("jsonl") else name.encode())
    monkeypatch.chdir(tmp_path)
    assert read("b") == ["b/1.txt", "b/2.txt"]
    assert read("*.txt", "**/*.txt", "b", "c.jsonl") == ["a.txt", "b/1.txt", "b/2.txt", "c.jsonl"]
    assert read("b/2.txt", tmp_path / "b") == ["b/2.txt", "b/1.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("txets", r"'txets' does not exist. Did you mean texts\?"),
        ("nowhere/at/all.txt", r"there is no folder nowhere/at"),
        ("*.jsonl", r"no file matches '\*.jsonl'"),
        ("empty", r"folder empty holds no text: files must end in .txt .jsonl .parquet"),
        ("notes.md", r"notes.md: unknown ending .md"),
        ("zero.txt", r"zero.txt is empty"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "zero.txt").write_text("")
    with pytest.raises(UserError, match=message):
        find_sources([given], "text")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "a.jsonl",
            as_jsonl(["one"]) + b'\n{"text": "tw',
            r"a.jsonl line 2 is not JSON: Unterminated string",
        ),
        ("a.jsonl", b"[1, 2]", r"a.jsonl line 1 is a JSON list"),
        (
            "a.jsonl",
            as_jsonl(["x"], "txet"),
            r"line 1: unknown field 'text'. Did you mean 'txet'\? Valid: id, txet",
        ),
        ("a.jsonl", b'{"text": 3}', r"line 1: field 'text' holds int, not text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            r"a.jsonl is not UTF-8: line 2, byte 24 of its text is 0xe9",
        ),
        ("a.txt", b"x" * 100_000 + b"\xff", r"a.txt is not UTF-8: byte 100000 of its text is 0xff"),
        ("a.parquet", as_parquet(["x"], "txet"), r"unknown field 'text'. Did you mean 'txet'"),
        ("a.parquet", as_parquet([1, 2]), r"column 'text' holds int64, not text"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, name, raw, message):
    for packing in PACK:
        path = tmp_path / (name + packing)
        path.write_bytes(PACK[packing](raw))
        with pytest.raises(UserError, match=message.replace(name, name + packing)):
            read(path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "not at all packed"])
def test_damaged_compressed_files(tmp_path, documents, packing, harm):
    raw = bytearray(PACK[packing](as_jsonl(documents)))
    if harm == "cut":
        raw = raw[: len(raw) // 2]
    elif harm == "flipped":
        raw[len(raw) // 2 : len(raw) // 2 + 60] = bytes(60)
    else:
        raw = as_jsonl(documents)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(raw)
    with pytest.raises((RunError, UserError), match=f"a.jsonl{packing}"):
        read(path)
    if harm != "flipped":  # a flip may be found by what it does to the text first
        with pytest.raises(RunError, match="damaged or cut short"):
            read(path)


def test_damaged_parquet(tmp_path, documents):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(documents)[:-40])
    with pytest.raises(RunError, match=r"a.parquet is damaged or not a parquet file"):
        read(path)


# ---- the standard library -----------------------------------------------------------------------


def test_standard_library_of_this_python():
    library = standard_library()
    names = [name for name, _ in library.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "collections/__init__.py", "lib2to3/pgen2/parse.py"} - set(
        names
    ) <= {
        "lib2to3/pgen2/parse.py"  # gone from 3.13 on
    }
    for left_out in (
        "pydoc_data/topics.py",
        "encodings/cp037.py",
        "encodings/cp858.py",
        "stringprep.py",
        "token.py",
    ):
        assert (Path(sysconfig.get_path("stdlib")) / left_out).exists() and left_out not in names
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert library.sha256 == standard_library().sha256
    assert sum(path.stat().st_size for _, path in library.files) == library.size > 5_000_000


def test_standard_library_hash_is_of_names_and_contents(tmp_path):
    def library(**files):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, raw in files.items():
            path = root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_bytes(raw)
        return standard_library(root)

    first = library(a=b"1", b__c=b"2", test__x=b"3", d=b"# Auto-generated by x", e=b"\xff", f=b"")
    assert [name for name, _ in first.files] == ["a.py", "b/c.py"]
    assert first.sha256 == library(a=b"1", b__c=b"2").sha256
    assert first.sha256 != library(a=b"1", b__c=b"3").sha256
    assert first.sha256 != library(a=b"1", b__d=b"2").sha256


def test_no_standard_library(tmp_path):
    with pytest.raises(UserError, match=r"no source text of its standard library .* with --data"):
        standard_library(tmp_path)
