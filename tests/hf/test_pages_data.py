"""The command lines of docs/data.md and docs/evaluation.md, in order and in one folder, as a reader would type them."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from depthmix import cli

pytestmark = pytest.mark.hf
DOCS = Path(__file__).parents[2] / "docs"


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def run(words):
    assert words[0] == "depthmix"
    return cli.main([*words[1:], *(["--device", "cpu"] if words[1] in ("train", "eval") else [])])


def test_data(tmp_path, monkeypatch, capsys):
    from depthmix.data import stream

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPTHMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "parquet").mkdir()
    texts = [f"document {i} " * (20 + i % 50) for i in range(400)]
    for place in range(6):
        (tmp_path / f"texts/{place}.txt").write_text("".join(texts[place * 50 :]))
    pq.write_table(
        pa.table({"text": texts, "id": [str(i) for i in range(400)]}), tmp_path / "parquet/0.parquet"
    )
    asked = []
    real = stream.prepare_stream

    def here(config, *arguments, **options):
        if config.source == ("HuggingFaceFW/fineweb",):  # needs a network
            asked.append(config)
            config = stream.StreamConfig(("parquet",), tokens=20_000)
        return real(config, *arguments, **options)

    monkeypatch.setattr(stream, "prepare_stream", here)
    for words in commands("data.md"):
        assert run(words) == 0, (words, capsys.readouterr().err)
    assert [config.tokens for config in asked] == [10_000_000_000]


def test_evaluation(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = (
        "train --preset quick --n-layer 2 --d-model 16 --n-head 1 --steps 2 --batch-size 2 --eval-tokens 128 --quiet "
        f"--no-report --device cpu --data {trained / 'text.txt'} --cache-dir cache --out runs/small"
    )
    assert cli.main(command.split()) == 0
    (tmp_path / "notes.txt").write_text("Something to read, and more of it. " * 10)
    (tmp_path / "more.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rows.jsonl").write_text(json.dumps({"q": "a " * 100, "a": "b"}) + "\n")
    (tmp_path / "tasks/mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: tasks/rows.jsonl\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - metric: acc\n"
    )
    for words in commands("evaluation.md"):
        assert run(words) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "results/notes.json").exists()
    found = json.loads((tmp_path / "runs/small/evaluation/step-00000002-mine.json").read_text())
    assert found["tasks"]["truncated"] == 1
