"""Folders that bring their own code load where there is no depthmix, and give the run's logits."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from depthmix import available_residuals
from depthmix.checkpoint import load_model

pytestmark = pytest.mark.hf

ALONE = """
import sys

class Nowhere:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "depthmix":
            raise ModuleNotFoundError("there is no depthmix here")

sys.meta_path.insert(0, Nowhere())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

out = {}
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    gradient = model.model.embed.weight.grad.clone()
    text = model.eval().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    again = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-saved")
    saved = AutoModelForCausalLM.from_pretrained(folder + "-saved", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, logits)
    out[folder] = logits, gradient, text, again, tokenizer("def f")["input_ids"], type(base).__name__
assert not any(name.partition(".")[0] == "depthmix" for name in sys.modules)
torch.save(out, sys.argv[1] + ".out")
"""


def test_every_connection(exported, tmp_path):
    """In one process for all: what takes time is the import of transformers."""
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    runs = {str(folder): run for run, folder in map(exported, available_residuals())}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "ids.pt"), *runs],
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = torch.load(tmp_path / "ids.pt.out")
    assert found.keys() == runs.keys()
    for folder, (logits, gradient, text, again, tokens, base) in found.items():
        ours, config = load_model(runs[folder])
        ours.requires_grad_(True)
        expected = ours(ids)
        loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (by_hand,) = torch.autograd.grad(loss, ours.embed.weight)
        name, size = config.model.residual, expected.abs().max().item()
        torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=1e-5 * max(1, size), msg=name)
        torch.testing.assert_close(
            gradient, by_hand, rtol=0, atol=1e-4 * by_hand.abs().max().item(), msg=name
        )
        assert torch.equal(text, again), name
        assert tokens == list(b"def f") and base == "DepthmixModel"


def test_code_is_of_one_connection_and_readable(exported):
    _, folder = exported("mgr-competitive")
    code = (folder / "modeling_depthmix.py").read_text()
    assert "class LerpSite" in code and "Sinkhorn" not in code
    assert "exec(" not in code and "depthmix." not in "".join(
        line for line in code.splitlines() if "import" in line
    )
