"""The connection of docs/new-connection.md works everywhere; notebooks run. (Commands: tests/test_readme.py.)"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import warm

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "DEPTHMIX_CACHE": warm.cache(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def plugin(tmp_path, environment):
    (code,) = blocks("new-connection.md", "python")
    (tmp_path / "averages.py").write_text(code)
    path = f"{environment['PYTHONPATH']}{os.pathsep}{tmp_path}"
    return environment | {"PYTHONPATH": path, "DEPTHMIX_PLUGINS": "averages"}


def depthmix(*words, env):
    return warm.run(["-m", "depthmix", *words], env=env)


def test_a_connection_in_one_file(tmp_path, plugin):
    check = """
import torch
from depthmix import GPT, GPTConfig, mixing_error
config = GPTConfig(vocab_size=16, n_layer=3, d_model=16, n_head=2, seq_len=8, residual="averages:n_streams=3")
model = GPT(config, seed=0).double()
ids = torch.arange(16).reshape(2, 8)
print(mixing_error(model, ids))
"""
    ran = warm.run(["-c", check], env=plugin)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1e-12
    out = tmp_path / "run"
    words = "--preset", "quick", "--residual", "averages:n_streams=2", "--steps", "2", "--out", str(out)
    ran = depthmix("train", *words, env=plugin)
    assert ran.returncode == 0, ran.stderr
    assert "averages" in depthmix("info", "--list", env=plugin).stdout
    assert depthmix("map", str(out), "--out", str(tmp_path / "map.png"), env=plugin).returncode == 0


def test_a_plugin_that_cannot_be_imported(tmp_path, plugin):
    (tmp_path / "averages.py").write_text("import nothing_of_this_name\n")
    ran = depthmix("info", "--list", env=plugin)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert (
        "$DEPTHMIX_PLUGINS names the module 'averages'" in ran.stderr and "nothing_of_this_name" in ran.stderr
    )


def test_a_plugin_of_an_installed_package(tmp_path, plugin):
    """By its entry point, without the variable."""
    metadata = tmp_path / "averages-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: averages\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[depthmix.residuals]\naverages = averages\n")
    del plugin["DEPTHMIX_PLUGINS"]
    assert "averages" in depthmix("info", "--list", env=plugin).stdout


def test_the_average_is_what_its_page_says(tmp_path, plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    import averages

    from depthmix.residuals import registry

    try:
        site = averages.AverageSite([0.5, 0.25])
        a, b, y = torch.randn(3, 2, 4, 8).double()
        h, state = site(y, (a, b))
        torch.testing.assert_close(state[0], 0.5 * a + 0.5 * y)
        torch.testing.assert_close(state[1], 0.75 * b + 0.25 * y)
        torch.testing.assert_close(h, (state[0] + state[1]) / 2)
    finally:
        del registry._REGISTRY["averages"], sys.modules["averages"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/notebooks").glob("*.ipynb")), ids=lambda path: path.name
)
def test_notebooks(path, environment, tmp_path):
    """Every cell runs, in order; what a notebook shows on the web is what it printed when it was written."""
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    assert any(cell["outputs"] for cell in cells)  # it was run before it was stored
    code = "\n".join("".join(cell["source"]) for cell in cells)
    ran = warm.run(["-c", code], cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
