"""A user's script is checked against the types that the package says (``py.typed``)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REVEALED = {
    "depthmix.GPT(config)": "depthmix.model.GPT",
    "model(ids)": "torch._tensor.Tensor",
    "model(ids, ids)": "tuple[None, torch._tensor.Tensor]",
    "depthmix.wrap([torch.nn.Linear(8, 8)])": "depthmix.wrapping.Wrapped",
    "trunk(x)": "torch._tensor.Tensor",
    "gate(x, streams)": "tuple[torch._tensor.Tensor, torch._tensor.Tensor]",
    "functional.multi_gate_residual(x, streams, w, w, w)": "tuple[torch._tensor.Tensor, torch._tensor.Tensor]",
    "functional.attention_pool(streams, w)": "torch._tensor.Tensor",
    "functional.source_pool_many([x], w)": "tuple[tuple[torch._tensor.Tensor, ...], "
    "tuple[torch._tensor.Tensor, ...]]",
    "functional.rms_norm(x, w)": "torch._tensor.Tensor",
    "functional.relu_squared(x)": "torch._tensor.Tensor",
    "depthmix.match_params(config)": "depthmix.config.GPTConfig",
    "depthmix.match_params([config])": "list[depthmix.config.GPTConfig]",
    "depthmix.mixing_map(model, ids).matrix": "torch._tensor.Tensor",
    "depthmix.mixing_error(model, ids)": "float",
    "depthmix.gate_bias_init(21, 4)": "float",
    "depthmix.available_residuals()": "list[str]",
    "captured['hook_embed']": "torch._tensor.Tensor",
}
SCRIPT = """
import depthmix
import torch
from depthmix import functional

config = depthmix.GPTConfig(vocab_size=16, n_layer=2, d_model=16, n_head=2, seq_len=8)
ids = torch.zeros(1, 8, dtype=torch.long)
x, streams, w = torch.zeros(1, 4, 8), torch.zeros(1, 4, 3, 8), torch.zeros(8)
model, trunk = depthmix.GPT(config, seed=0), depthmix.wrap([torch.nn.Linear(8, 8)], n_streams=3)
gate = depthmix.MultiGateResidual(8, n_streams=3)
with depthmix.capture(model, ["hook_embed"]) as captured:
    model(ids)
"""
WRONG = {
    "depthmix.GPTConfig(vocab_size='16', n_layer=2, d_model=16, n_head=2, seq_len=8)": "arg-type",
    "model(ids, cash=None)": "call-overload",
    "depthmix.wrap([torch.nn.Linear(8, 8)], start='prenrom')": "arg-type",
    "functional.rms_norm(x, 1)": "arg-type",
    "depthmix.gpt": "attr-defined",
}


def test_a_users_script(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        # `make test` installs it; `make gpu-check` runs where nothing can be installed.
        pytest.skip("needs mypy (extra dev)")
    file = tmp_path / "script.py"
    lines = [f"reveal_type({expression})" for expression in REVEALED] + list(WRONG)
    file.write_text(SCRIPT + "\n".join(lines) + "\n")
    ran = subprocess.run(
        # What `make lint` found out about torch and the package is in the same cache.
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--no-error-summary",
            str(file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    first = SCRIPT.count("\n") + 1
    said = re.findall(r"^\S+script\.py:(\d+): (\w+): (.*)$", ran.stdout, re.M)
    revealed = {int(line): text for line, kind, text in said if "Revealed type" in text}
    expected = {first + i: f'Revealed type is "{kind}"' for i, kind in enumerate(REVEALED.values())}
    assert revealed == expected, ran.stdout + ran.stderr
    errors = {(int(line), text.rpartition("  ")[2]) for line, kind, text in said if kind == "error"}
    after = first + len(REVEALED)
    assert errors == {(after + i, f"[{code}]") for i, code in enumerate(WRONG.values())}, ran.stdout
