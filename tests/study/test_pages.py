"""The pages of docs/results are those that their files make."""

from pathlib import Path

import pytest

from depthmix.study import load, read_records
from depthmix.study.declare import Point
from depthmix.study.page import page
from depthmix.study.records import Record
from depthmix.study.statistics import paired, pooled
from depthmix.study.tables import tables_of

from .conftest import STUDY

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_page(path, monkeypatch):
    """Text and tables to the letter; of the figures, that they are there (their bytes are matplotlib's)."""
    monkeypatch.chdir(ROOT)
    study = load(path)
    assert study.page.relative_to(ROOT) == Path("docs/results") / f"{path.stem}.md"
    records = read_records(study.results)
    if not records:
        assert not study.page.exists()
        return
    written = study.page.read_text(encoding="utf-8")
    results = tables_of(study, records)
    images = {result.table.name: f"img/{study.name}-{result.table.name}.png" for result in results}
    figures = {name: image for name, image in images.items() if (study.page.parent / image).exists()}
    assert figures and written == page(study, records, results, figures)
    # Every line is a run of the study as its file is now.
    best = {(result.table.name, row): point for result in results for row, point in result.best.items()}
    keys = {cell.key for table in study.tables for _, cell in study.uses(table, best) if cell is not None}
    assert set(records) <= keys


@pytest.mark.parametrize("error", ["paired", "pooled"])
def test_a_table_takes_the_error_that_it_names(study_file, error):
    losses = {"prenorm": (2.0, 2.1, 2.3), "mgr-competitive": (1.9, 2.05, 2.2), "eight": (2.1, 2.05, 2.4)}
    study = load(study_file(STUDY.replace("seeds = 3", f'seeds = 3\nerror = "{error}"')))
    records = {}
    for table, point in (("rates", ""), ("main", "low")):
        best = {("rates", "prenorm"): Point("low", {"lr": 1e-3})} if point else {}
        for use, cell in study.uses(study.table(table), best):
            values = {"config": cell.config.to_dict(), "status": "finished", "commit": "c", "environment": {}}
            loss = losses[use.row][use.seed] if point else {"low": 1.0, "middle": 4.0, "high": 5.0}[use.point]
            records[cell.key] = Record(
                cell.key,
                {**values, "test_loss": loss, "val_loss": loss, "flops_per_token": 1, "tokens": 9},
                "here.jsonl",
            )
    # Runs that both tables have are of the second's losses now; the first still has its lowest where it was.
    main = tables_of(study, records)[1]
    wanted = pooled({row: dict(enumerate(mine)) for row, mine in losses.items()}, "prenorm")
    if error == "paired":
        wanted = {
            row: paired([a - b for a, b in zip(losses[row], losses["prenorm"], strict=True)])
            for row in wanted
        }
    assert {row.name: row.difference for row in main.rows if row.difference} == wanted
    text = page(study, records, [main], {})
    assert ("Errors are pooled" in text) == (error == "pooled")


def test_findings_are_those_of_the_records():
    """Of docs/results.md: the nearest row, its p, how far the means lie apart, and what rates gain."""
    text = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    study = load(ROOT / "studies/tiny.toml")
    rates, main, *_ = tables_of(study, read_records(study.results))
    rows = [row for row in main.rows if row.difference is not None]
    lowest = min(rows, key=lambda row: row.difference.mean)
    assert lowest.name == "attnres-block:blocks=4" and f"come nearest (p = {lowest.p:.3f})" in text
    assert all(row.verdict == "none" for row in rows)
    assert -0.015 < lowest.difference.mean and max(row.difference.mean for row in rows) < 0.015
    assert sum(row.difference.mean < -0.001 for row in rows) == 7 == len(rows) - 1
    gain = rates.row("prenorm", "x 1").mean("val_loss")[0] - rates.row("prenorm", "x 2").mean("val_loss")[0]
    assert gain > -lowest.difference.mean
