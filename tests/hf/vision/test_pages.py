"""The code of docs that needs transformers or timm runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.hf
ROOT = Path(__file__).parents[3]
BEFORE = (Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")
CODE = [
    (page.name, code)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    if re.search(r"^import (transformers|timm)", code, re.M)
]


@pytest.mark.parametrize("page, code", CODE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CODE)])
def test_python(page, code, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", f"{BEFORE}\n{code}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
