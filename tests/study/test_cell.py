"""One run for real: training, then the test split, read once."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from depthmix.checkpoint import load_model
from depthmix.config import DataConfig, from_dict
from depthmix.data import open_dataset, prepare
from depthmix.info import forward_flops
from depthmix.presets import preset
from depthmix.study import cell


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = [f"{number} is the number of the line, and {number**2} is its square\n" for number in range(9000)]
    (folder / "numbers.txt").write_text("".join(words))
    base = preset("quick")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, n_layer=2, d_model=16, n_head=2, seq_len=32, residual="mgr-competitive"
        ),
        data=DataConfig(
            (str(folder / "numbers.txt"),), test_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache"))
        ),
        steps=3,
        batch_size=4,
        eval_tokens=256,
        device="cpu",
    )


def run(config, folder, processes=1):
    file = folder / "cell.json"
    file.write_text(json.dumps({"config": config.to_dict(), "test_tokens": 1000, "processes": processes}))
    status = cell.main([str(file), str(folder / "run")])
    assert status == 0
    return json.loads((folder / "run/test.json").read_text())


def test_the_test_loss_is_the_models(config, tmp_path):
    found = run(config, tmp_path)
    model, _ = load_model(next((tmp_path / "run/checkpoints").glob("step-*3")))
    dataset = open_dataset(prepare(config.data))
    there = (len(dataset.test) - 1) // 32
    assert there > 64
    windows = [place * there // 32 for place in range(32)]
    rows = torch.tensor([dataset.test.read(32 * window, 33).tolist() for window in windows])
    logits = model.double()(rows[:, :-1])
    wanted = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert found["test_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert found["test_tokens"] == 32 * 32
    assert found["flops_per_token"] == 3 * forward_flops(model)
    assert found["data"]["test"] == dataset.test.fingerprint
    # A run that is whole is not touched, and says the same again.
    before = (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns
    assert run(config, tmp_path) | {"seconds": 0} == found | {"seconds": 0}
    assert (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_processes_under_torchrun(config, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = run(config, tmp_path / "one"), run(config, tmp_path / "two", processes=2)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    assert json.loads((tmp_path / "two/run/environment.json").read_text())["parallel"] == "dp=2"


def test_a_request_that_training_refuses(config, tmp_path, capsys):
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, data=("no such folder",)))
    file = tmp_path / "cell.json"
    file.write_text(json.dumps({"config": wrong.to_dict(), "test_tokens": 10, "processes": 1}))
    assert cell.main([str(file), str(tmp_path / "run")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert from_dict(json.loads((tmp_path / "cell.train.json").read_text())) == wrong
