"""A study's file: what it means, and what of it is refused."""

import dataclasses

import pytest

from depthmix.errors import UserError
from depthmix.study import load
from depthmix.study.declare import Point, changed, expanded, key_of

from .conftest import STUDY


def cells(study, name, best=None):
    return {(use.row, use.point, use.seed): cell for use, cell in study.uses(study.table(name), best or {})}


def test_tables_become_runs(study_file):
    study = load(study_file())
    assert [(t.name, t.kind, t.seeds) for t in study.tables] == [
        ("rates", "tune", (0, 1)),
        ("main", "compare", (0, 1, 2)),
        ("sizes", "scaling", (0, 1)),
    ]
    rates = cells(study, "rates")
    assert len(rates) == 2 * 3 * 2
    config = rates["mgr-competitive", "high", 1].config
    assert (config.model.residual, config.optim.lr, config.seed, config.steps) == (
        "mgr-competitive",
        9e-3,
        1,
        30,
    )
    assert config.data.data == ("$THE_TEXT/*.txt",) and config.data.test_fraction == 0.05
    assert set(cells(study, "main").values()) == {None}
    best = {("rates", "prenorm"): Point("low", {"lr": 1e-3})}
    main = cells(study, "main", best)
    assert main["eight", "", 2].config.model.n_streams == 8
    assert {cell.config.optim.lr for cell in main.values()} == {1e-3}
    # The run is the one that the first table has at this point.
    assert main["mgr-competitive", "", 1].key == rates["mgr-competitive", "low", 1].key
    sizes = cells(study, "sizes", best)
    assert sizes["prenorm", "large", 0].key == main["prenorm", "", 0].key
    small = sizes["prenorm", "small", 0].config
    assert (small.model.n_layer, small.steps) == (8, 10)


def test_each_row_takes_its_own_best(study_file):
    text = STUDY.replace('tuned = "rates"\ntuned_row = "prenorm"', 'tuned = "rates"', 1)
    study = load(
        study_file(text.replace(', {name = "eight", residual = "mgr-independent", n_streams = 8}', ""))
    )
    best = {("rates", "mgr-competitive"): Point("high", {"lr": 9e-3})}
    main = cells(study, "main", best)
    assert main["prenorm", "", 0] is None
    assert main["mgr-competitive", "", 0].config.optim.lr == 9e-3


def test_keys_are_of_what_decides_the_result(study_file):
    base = load(study_file()).base

    def key(**changes):
        return key_of(changed(base, {"residual": "mgr-competitive", **changes}, "here"), 1000)

    same = key()
    # Defaults spelled out, fields of other connections, and what alters no result.
    assert key(residual="mgr-competitive:bias=none:n_streams=4") == same
    assert key(independent_init="sigmoid") == same
    for name, value in (
        ("device", "cpu"), ("cache_dir", "elsewhere"), ("checkpoint_interval", 7), ("eval_interval", 3),
        ("micro_batch", 4), ("record_depth", False),
    ):  # fmt: skip
        assert key(**{name: value}) == same, name
    prenorm = {"residual": "prenorm"}
    assert key(**prenorm, n_streams=8) == key(**prenorm)
    others = [
        key(n_streams=8), key(lr=1e-3), key(steps=31), key(residual="prenorm"), key(data=("a",)), key(eval_tokens=5),
        key(residual="mgr-competitive:bias=-2"), key(precision="bf16"), key(test_fraction=0.1), key(d_model=32),
    ]  # fmt: skip
    assert len({same, *others}) == len(others) + 1
    config = changed(base, {"residual": "mgr-competitive"}, "here")
    assert key_of(dataclasses.replace(config, seed=1), 1000) != same
    assert key_of(config, 1001) != same


def test_variables_in_paths(study_file, monkeypatch):
    base = load(study_file()).base
    monkeypatch.delenv("THE_TEXT", raising=False)
    with pytest.raises(UserError, match="THE_TEXT is not set"):
        expanded(base)
    monkeypatch.setenv("THE_TEXT", "texts")
    assert expanded(base).data.data == ("texts/*.txt",)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "A study"', "title = 3", "title must be text"),
        ('title = "A study"', 'titel = "A"', "unknown field 'titel'. Did you mean 'title'"),
        ('title = "A study"', 'title = "A', "not valid TOML"),
        ("steps = 30", "stepz = 30", "unknown field of the training configuration 'stepz'. Did you mean 'steps'"),
        ("steps = 30", "steps = 0", "steps must be at least 1"),
        ("steps = 30", "test_fraction = 0.0", "test_fraction must be above 0"),
        ("tokens = 1000", "tokens = 0", "tokens must be at least 1"),
        ('preset = "quick"', 'preset = "quik"', "Did you mean 'quick'"),
        ('name = "main"', 'name = "rates"', "there is a table of this name already"),
        ('name = "main"', 'name = "Main table"', "lower-case letters"),
        ('kind = "scaling"', 'kind = "scalling"', "Did you mean 'scaling'"),
        ('rows = ["prenorm", "mgr-competitive"]\nseeds = 2', "rows = []\nseeds = 2", "rows is empty"),
        ('"mgr-competitive"]\nseeds = 2', '"prenorm"]\nseeds = 2', "two rows are called 'prenorm'"),
        ('"mgr-competitive"]\nseeds = 2', '"mgr-competitve"]\nseeds = 2', "Did you mean 'mgr-competitive'"),
        ('"mgr-competitive"]\nseeds = 2', "4]\nseeds = 2", "a row is a residual connection"),
        ("seeds = 3", "seeds = 0", "seeds must be at least 1"),
        ("seeds = 3", 'seeds = "3"', "seeds must be a whole number"),
        ("seeds = 3", 'seeds = 3\nbaseline = "eigth"', "Did you mean 'eight'"),
        ("seeds = 3", 'seeds = 3\nerror = "poled"', "Did you mean 'pooled'"),
        ("{name = \"low\", lr = 1e-3}, {name = \"middle\", lr = 3e-3}, ", "", "points must be two or more"),
        ('{name = "low"', '{name = "high"', "two of points have the same name"),
        ('tuned_row = "prenorm"', 'tuned_row = "attnres"', "tunes no row 'attnres'"),
        ('tuned = "rates"', 'tuned = "rate"', "Did you mean 'rates'"),
        ('tuned = "rates"\n', "", "tuned_row 'prenorm' needs tuned"),
        ("n_streams = 8}", "n_streams = 65}", "n_streams must be between 1 and 64"),
        ('{name = "eight", residual = "mgr-independent", n_streams = 8}', '{name = "same", residual = "prenorm"}',
         "row same is the same run as row prenorm"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(study_file, before, after, message):
    assert before in STUDY
    path = study_file(STUDY.replace(before, after, 1))
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        load(path)
    assert "try.toml" in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read study"):
        load(tmp_path / "no.toml")
