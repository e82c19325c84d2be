"""Stands in for ``python -m depthmix.study.cell``: a run folder without any training, then ``test.json``.

The environment steers it as it does ``fabricate.py``, whose folders it writes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
import fabricate


def test_loss(config):
    """Falls with the factor of the learning rate nearest to 3e-3; a row and a seed add their own."""
    import math

    penalty = 0.1 * math.log(config["optim"]["lr"] / 3e-3) ** 2
    return fabricate.train_loss(config["model"]["residual"], config["seed"], config["steps"]) + penalty


def main():
    file, folder = map(Path, sys.argv[1:])
    asked = json.loads(file.read_text())
    config = asked["config"]
    train = file.with_suffix(".train.json")
    train.write_text(json.dumps(config))
    sys.argv = ["train", "--config", str(train), "--out", str(folder)]
    sys.argv += ["--resume"] if folder.exists() else []
    fabricate.main()
    loss = test_loss(config)
    result = json.loads((folder / "result.json").read_text())
    result["val_loss"] = loss + 0.01
    (folder / "result.json").write_text(json.dumps(result))
    found = {
        "test_loss": loss,
        "test_tokens": asked["test_tokens"],
        "data": {"train": "t", "val": "v", "test": "x"},
        "flops_per_token": 1000,
    }
    (folder / "test.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
