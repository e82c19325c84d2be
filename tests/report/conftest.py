import importlib.util
import json
from pathlib import Path

import pytest

from depthmix.presets import preset


@pytest.fixture(scope="session")
def fake():
    """The module ``fabricate.py`` beside this file."""
    spec = importlib.util.spec_from_file_location("fabricate", Path(__file__).with_name("fabricate.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_config():
    """A quick run's configuration as plain JSON, with a few values changed."""

    def make(residual="prenorm", seed=0, steps=40, **values):
        config = json.loads(json.dumps(preset("quick").to_dict()))
        config.update(seed=seed, steps=steps, eval_interval=10, **values)
        config["model"]["residual"] = residual
        return config

    return make


@pytest.fixture
def make_comparison(fake, make_config, tmp_path):
    """A comparison's folder with finished runs, but for the names in ``upto`` (steps done; None: not begun)."""

    def make(residuals, seeds, upto=None, failures=None, environment=None):
        upto = upto or {}
        folder = tmp_path / "comparison"
        folder.mkdir()
        cells = []
        for seed in range(seeds):
            for residual in residuals:
                name = f"{residual}-s{seed}"
                cells.append({"name": name, "residual": residual, "seed": seed})
                if name not in upto:
                    fake.fabricate(folder / name, make_config(residual, seed), environment=environment)
                elif upto[name] is not None:
                    fake.fabricate(folder / name, make_config(residual, seed), upto=upto[name])
        plan = {
            "recipe": "quick",
            "residuals": residuals,
            "seeds": seeds,
            "config": make_config(residuals[0]),
            "cells": cells,
            "failures": failures or {},
        }
        (folder / "compare.json").write_text(json.dumps(plan))
        return folder

    return make
