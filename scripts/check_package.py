"""Build wheel and sdist as a release would, and look at them from outside.

    python scripts/check_package.py [--dist build/dist]

The wheel must be built from the sdist alone, hold every source and data file, declare what it needs (``pip check``),
and import from another folder without the heavy packages that only some commands use.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LATER = ("triton", "transformers", "matplotlib", "tensorboard", "datasets", "lm_eval", "timm")
"""What importing depthmix and building a model must not load."""
USE = f"""
import sys
before = set(sys.modules)
import torch
with_torch = set(sys.modules)
import depthmix
assert "site-check" in depthmix.__file__, depthmix.__file__
config = depthmix.GPTConfig(vocab_size=16, n_layer=2, d_model=16, n_head=2, seq_len=8, residual="mgr-competitive")
depthmix.GPT(config)(torch.zeros(1, 8, dtype=torch.long))
loaded = {{name.partition(".")[0] for name in set(sys.modules) - with_torch}}
assert not loaded & set({LATER!r}), loaded & set({LATER!r})
"""


def run(*command: str, **options) -> None:
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "build/dist")
    dist = parser.parse_args().dist
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT))  # the wheel from the sdist
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")

    tracked = subprocess.check_output(["git", "ls-files", "src/depthmix"], cwd=ROOT, text=True).split()
    wanted = {name.removeprefix("src/") for name in tracked}
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    missing = wanted - held
    strange = {name for name in held if name.startswith("depthmix/")} - wanted
    if missing or strange:
        sys.exit(f"{wheel.name}: missing {sorted(missing)}, not of the sources {sorted(strange)}")
    if "depthmix/py.typed" not in held:
        sys.exit(f"{wheel.name} has no py.typed")
    with tarfile.open(sdist) as opened:
        top = {name.split("/")[1] for name in opened.getnames() if "/" in name}
    if not {"pyproject.toml", "README.md", "LICENSE", "src", "tests"} <= top:
        sys.exit(f"{sdist.name} holds only {sorted(top)}")

    with tempfile.TemporaryDirectory(prefix="site-check") as folder:
        # Beside the packages of this environment, in front of the sources it was installed from.
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, str(wheel))
        environment = os.environ | {"PYTHONPATH": folder}
        run(sys.executable, "-c", USE, cwd=folder, env=environment)
        run(sys.executable, "-m", "depthmix", "info", "--list", cwd=folder, env=environment)
    run(sys.executable, "-m", "pip", "check")
    print(f"{wheel.name} and {sdist.name}: complete, importable elsewhere, nothing missing or in conflict")


if __name__ == "__main__":
    main()
