"""docs/huggingface.md runs as it stands, in order and in one folder."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1]))

import warm

pytestmark = pytest.mark.hf

ROOT = Path(__file__).parents[2]


def test_commands_and_code(tmp_path):
    page = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | {"DEPTHMIX_CACHE": warm.cache(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    run = []
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", page, flags=re.DOTALL):
        if language == "python":
            run.append(["-c", block])
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            # Serving does not end: test_serve.py runs it.
            if words and "serve" not in words:
                run.append(["-m", *words] if words[0] == "depthmix" else words[1:])
    assert len(run) == 12
    for words in run:
        ran = warm.run(words, cwd=tmp_path, env=environment, timeout=600)
        assert ran.returncode == 0 and ran.stdout.strip(), (words, ran.stderr[-3000:])
