import re

import pytest
import tyro

from depthmix.data.commands import FineWeb, Inspect, Prepare
from depthmix.errors import RunError, UserError


def run(command, *arguments):
    return tyro.cli(command, prog="depthmix data", args=[str(a) for a in arguments]).run()


def plain(text):
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_prepare_then_inspect(text_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(Prepare, text_folder / "*.txt", "--out", out, "--tokenizer", "bpe:300", "--workers", 2) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str(out)) and "tokenizer bpe:300" in printed and "M tokens/s" in printed
    assert run(Inspect, out) == 0
    printed = plain(capsys.readouterr().out)
    assert "300 ids, uint16; SHA-256 of every shard is right" in printed
    train, val = map(int, re.search(r"documents (\d+) (\d+)", printed).groups())
    assert train + val == 60
    assert run(Inspect, out, "--verify", "size") == 0
    assert "sizes are right" in capsys.readouterr().out


def test_options_reach_the_work(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "one two"}\n{"body": "three [bold]four[/bold]"}\n')
    out = tmp_path / "out"
    arguments = (tmp_path / "a.jsonl", "--out", out, "--text-field", "body", "--val-fraction", "0.5")
    assert run(Prepare, *arguments) == 0
    assert run(Inspect, out) == 0
    assert "three [bold]four[/bold]<|endoftext|>" in capsys.readouterr().out


def test_no_paths_is_the_standard_library(cache, capsys):
    assert run(Prepare) == 0
    (folder,) = cache.iterdir()
    assert str(folder) in capsys.readouterr().out


def test_errors_pass_through(tmp_path, text_folder):
    with pytest.raises(UserError, match="does not exist"):
        run(Prepare, tmp_path / "missing.txt")
    with pytest.raises(UserError, match="val_fraction"):
        run(Prepare, text_folder, "--val-fraction", "0.9")
    with pytest.raises(UserError, match="does not exist"):
        run(Inspect, tmp_path / "missing")
    out = tmp_path / "out"
    run(Prepare, text_folder, "--out", out)
    (out / "val-00000.bin").unlink()
    with pytest.raises(RunError, match=r"val-00000.bin"):
        run(Inspect, out)


@pytest.mark.parametrize("command", [Prepare, FineWeb, Inspect])
def test_help_has_an_example_and_defaults(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    text = plain(capsys.readouterr().out)
    assert f"Example: depthmix data {command.__name__.lower()}" in text
    if command is Prepare:
        assert "(default: byte)" in text and "(default: 0.05)" in text and "16 to 32 KiB" in text


def test_fineweb_refuses(tmp_path, monkeypatch):
    import sys

    for arguments, message in (
        (("--tokens", "ten"), r"--tokens takes a positive number, with K, M, B or T behind it; got 'ten'"),
        (("--val-fraction", "0"), r"val_fraction must be above 0"),
        (("--tokenizer", "bpe:400"), r"a stream is read once; use gpt2 or byte"),
        (
            ("--source", "nowhere/*.parquet"),
            r"no file matches it; a dataset of the hub is written OWNER/NAME",
        ),
        (("--workers", "0"), r"workers must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(FineWeb, *arguments, "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "depthmix\[fineweb\]"'):
        run(FineWeb, "--tokens", "1K", "--out", tmp_path / "out")
    assert not any(tmp_path.iterdir())
