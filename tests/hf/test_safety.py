"""A folder that means harm, loaded through transformers after ``import depthmix.hf``."""

import json
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

import depthmix.hf

pytestmark = pytest.mark.hf


@pytest.fixture
def copy(exported, tmp_path, monkeypatch):
    _, folder = exported("mgr-competitive")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_code_of_the_folder_is_not_run(copy):
    (copy / "evil.py").write_text("open('exploded', 'w')\n")
    change(
        copy,
        auto_map={auto: "evil.A" for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")},
        architectures=["evil.B"],
    )
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert type(model) is depthmix.hf.DepthmixForCausalLM
    assert not (copy / "exploded").exists()


def test_pickles_are_refused(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(copy)
    assert not (copy / "exploded").exists()


@pytest.mark.parametrize(
    "values, match",
    [
        ({"n_layer": 10**9}, "n_layer must be at most"),
        ({"d_model": 1 << 40}, "d_model must be at most"),
        ({"n_head": 0}, "n_head must be a whole number"),
        ({"residual": "os.system"}, "unknown residual"),
        ({"residual_options": {"bias": "x"}}, "bias must be"),
        ({"norm_eps": [1]}, "config.json"),
    ],
)
def test_impossible_configurations(copy, values, match):
    change(copy, **values)
    with pytest.raises(ValueError, match=match):
        AutoConfig.from_pretrained(copy)


def test_names_are_not_paths(copy):
    """What a configuration says is written nowhere but into the folder that is asked for."""
    change(copy, name_or_path="../../elsewhere", _name_or_path="/elsewhere", transformers_version="../x")
    before = {p for p in copy.parent.rglob("*") if copy not in p.parents and p != copy}
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.save_pretrained(copy / "saved")
    assert {p for p in copy.parent.rglob("*") if copy not in p.parents and p != copy} == before
    again = AutoModelForCausalLM.from_pretrained(copy / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
