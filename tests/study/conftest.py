import pytest

STUDY = """
title = "A study"
[train]
preset = "quick"
steps = 30
eval_interval = 10
data = ["$THE_TEXT/*.txt"]
[test]
tokens = 1000
[[table]]
name = "rates"
kind = "tune"
rows = ["prenorm", "mgr-competitive"]
seeds = 2
points = [{name = "low", lr = 1e-3}, {name = "middle", lr = 3e-3}, {name = "high", lr = 9e-3}]
[[table]]
name = "main"
rows = ["prenorm", "mgr-competitive", {name = "eight", residual = "mgr-independent", n_streams = 8}]
seeds = 3
tuned = "rates"
tuned_row = "prenorm"
[[table]]
name = "sizes"
kind = "scaling"
rows = ["prenorm", "mgr-competitive"]
sizes = [{name = "small", n_layer = 8, steps = 10}, {name = "large", steps = 30}]
seeds = 2
tuned = "rates"
tuned_row = "prenorm"
"""


@pytest.fixture
def study_file(tmp_path):
    """A study's file, results and page beside it; ``write(text)`` replaces its text."""

    def write(text=STUDY):
        (tmp_path / "studies").mkdir(exist_ok=True)
        path = tmp_path / "studies" / "try.toml"
        path.write_text(text)
        return path

    return write
