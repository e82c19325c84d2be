"""What vLLM's documentation asks of a model is met by every connection but the one whose attention reads depth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.hf

SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_requirements.py"
ASKED = {"auto_map", "backend", "attention", "flat batch", "no cache", "tensor plan", "meta"}


def check(folder, modules):
    return subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=os.environ | {"HF_MODULES_CACHE": str(modules)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("residual", ["mgr-competitive", "attnres", "moda"])
def test_requirements(exported, residual, tmp_path):
    _, folder = exported(residual)
    ran = check(folder, tmp_path)
    met = {line[:12].strip(): "NOT MET" not in line for line in ran.stdout.splitlines()}
    if residual == "moda":
        assert ran.returncode == 1 and not met["attention"], ran.stdout + ran.stderr
        assert "moda reads depth beside its sequence" in ran.stdout
    else:
        assert ran.returncode == 0 and met == dict.fromkeys(ASKED, True), ran.stdout + ran.stderr


def test_a_folder_without_code_does_not_meet_them(exported, tmp_path):
    from depthmix.exchange.folder import export

    run, _ = exported("mgr-competitive")
    export(run, tmp_path / "plain")
    ran = check(tmp_path / "plain", tmp_path)
    assert ran.returncode == 1 and "auto_map     NOT MET" in ran.stdout
