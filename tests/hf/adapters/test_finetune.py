"""benchmarks/pretrained_finetune.py on a model of a moment: it starts where it says and goes on where it stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from families import TEXT, build, build_tokenizer

pytestmark = pytest.mark.hf
SCRIPT = Path(__file__).parents[3] / "benchmarks/pretrained_finetune.py"


def test_turns_can_be_cut(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrained_finetune", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    build(size=2.0).save_pretrained(tmp_path / "model")
    build_tokenizer(eos_token="<end>").save_pretrained(tmp_path / "model")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT * 40)

    def run(name, steps):
        words = [tmp_path / "model", tmp_path / "a.txt", tmp_path / "b.txt", "--state", tmp_path / name]
        words += ["--out", tmp_path / f"{name}.json", "--steps", steps, "--every", 2, "--length", 16]
        words += ["--windows", 5, "--held-out", 0.2, "--warmup", 2, "--rate", 1e-3, "--n-streams", 2]
        monkeypatch.setattr(sys, "argv", ["pretrained_finetune", *map(str, words)])
        script.main()
        return json.loads((tmp_path / f"{name}.json").read_text())["rows"]

    run("cut", 2)
    whole = run("whole", 4)
    assert run("cut", 4) == whole
    assert [row["residual"] for row in whole] == ["prenorm", "hc:merge=mean", "mgr-competitive"]
    for row in whole:
        assert len(row["training"]) == 4 and row["loss"].keys() == {"0", "2", "4"}
        assert row["loss"]["0"] == pytest.approx(whole[0]["loss"]["0"], rel=1e-5)  # the trained function
        assert row["loss"]["4"] < row["loss"]["0"]
    assert whole[0]["parameters_of_connection"] == 0 < whole[2]["parameters_of_connection"]
    assert whole[2]["to_first"]["4"]["mean"] == pytest.approx(whole[2]["loss"]["4"] - whole[0]["loss"]["4"])
