"""Keys of runs: what was on record before a field existed is found by the same key."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from depthmix.config import OptimConfig
from depthmix.presets import preset
from depthmix.residuals import build_residual
from depthmix.residuals.mgr import Options
from depthmix.study.declare import SINCE_THE_FIRST_RECORDS, changed, key_of, load

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


def key(residual, **changes):
    return key_of(changed(preset("quick"), {"residual": residual, **changes}, "here"), 262144)


def test_keys_are_those_of_the_first_records():
    assert key("prenorm") == "3a2ac14cb7af9a59"
    assert key("attnres") == "e122bf2af6502ed9"
    assert key("mgr-competitive") == "379d2251c53e6206"
    assert key("mgr-review:gate=independent") == "a9a8bb2e2ecb341a"
    assert key("mgr-independent:n_streams=8:bias=-2") == "8d31d2f9a2f6db22"


def test_fields_that_came_later_count_where_they_say_something():
    plain = key("mgr-competitive")
    explicit = "mgr-competitive:stream_dtype=model:last_read=pool:separate_streams=false"
    assert key(explicit, connection_lr=1.0) == plain
    others = [
        key("mgr-competitive", connection_lr=4.0),
        key("mgr-competitive:stream_dtype=bf16"),
        key("mgr-competitive:last_read=mean"),
        key("mgr-competitive:separate_streams=true"),
    ]
    assert len({plain, *others}) == 5


def test_their_defaults_are_still_those():
    defaults = {f.name: f.default for cls in (OptimConfig, Options) for f in dataclasses.fields(cls)}
    for fields in SINCE_THE_FIRST_RECORDS.values():
        for name, value in fields.items():
            assert defaults[name] == value and type(defaults[name]) is type(value), name


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_connection_of_a_study_can_be_built(path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_TEXT", os.sep)
    study = load(path)
    settled = {
        (table.name, row.name): table.points[0]
        for table in study.tables
        if table.kind == "tune"
        for row in table.rows
    }
    models = {}
    for table in study.tables:
        for _, cell in study.uses(table, settled):
            models[repr(cell.config.model)] = cell.config.model
    assert models
    with torch.device("meta"):
        for model in models.values():
            residual = build_residual(model)
            assert len([residual.site(i) for i in range(1, model.n_sublayers + 1)]) == model.n_sublayers
