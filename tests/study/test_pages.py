"""The pages of docs/results are those that their files make."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depthmix import gate_bias_init
from depthmix.study import load, read_records
from depthmix.study.declare import Point
from depthmix.study.figures import draw_depth, isolated
from depthmix.study.page import drawings, page
from depthmix.study.records import Record, depth_of
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
    figures = {name: f"img/{study.name}-{name}.png" for name, drawn in drawings(results) if drawn is not None}
    assert all((study.page.parent / image).exists() for image in figures.values())
    assert figures and written == page(study, records, results, figures)
    # Every line is a run of the study as its file is now.
    best = {(result.table.name, row): point for result in results for row, point in result.best.items()}
    keys = {cell.key for table in study.tables for _, cell in study.uses(table, best) if cell is not None}
    assert set(records) <= keys


LOSSES = {"prenorm": (2.0, 2.1, 2.3), "mgr-competitive": (1.9, 2.05, 2.2), "eight": (2.1, 2.05, 2.4)}


def records_of(study, depth=None):
    """Records of the runs of ``rates`` and ``main``, those with LOSSES and ``depth``: row -> value of each seed."""
    records = {}
    for table, point in (("rates", ""), ("main", "low")):
        best = {("rates", "prenorm"): Point("low", {"lr": 1e-3})} if point else {}
        for use, cell in study.uses(study.table(table), best):
            loss = LOSSES[use.row][use.seed] if point else {"low": 1.0, "middle": 4.0, "high": 5.0}[use.point]
            values = {
                "config": cell.config.to_dict(), "status": "finished", "commit": "c", "environment": {},
                "test_loss": loss, "val_loss": loss, "flops_per_token": 1, "tokens": 9,
            }  # fmt: skip
            if point and depth:
                values["depth"] = depth[use.row][use.seed]
            # Runs that both tables have are of the second's losses; the first still has its lowest where it was.
            records[cell.key] = Record(cell.key, values, "here.jsonl")
    return records


@pytest.mark.parametrize("error", ["paired", "pooled"])
def test_a_table_takes_the_error_that_it_names(study_file, error):
    study = load(study_file(STUDY.replace("seeds = 3", f'seeds = 3\nerror = "{error}"')))
    records = records_of(study)
    main = tables_of(study, records)[1]
    wanted = pooled({row: dict(enumerate(mine)) for row, mine in LOSSES.items()}, "prenorm")
    if error == "paired":
        wanted = {
            row: paired([a - b for a, b in zip(LOSSES[row], LOSSES["prenorm"], strict=True)])
            for row in wanted
        }
    assert {row.name: row.difference for row in main.rows if row.difference} == wanted
    text = page(study, records, [main], {})
    assert ("Errors are pooled" in text) == (error == "pooled")


def test_a_row_that_scatters_more_is_named(study_file, monkeypatch):
    rows = {name: (2.0, 2.1, 2.3) for name in LOSSES} | {"eight": (2.1, 1.0, 4.0)}
    monkeypatch.setattr(sys.modules[__name__], "LOSSES", rows)
    study = load(study_file(STUDY.replace("seeds = 3", 'seeds = 3\nerror = "pooled"')))
    records = records_of(study)
    main = tables_of(study, records)[1]
    assert {row.name: row.difference.uneven for row in main.rows if row.difference} == {
        "mgr-competitive": False, "eight": True,
    }  # fmt: skip
    assert "test, p below 1% after correction): `eight`." in page(study, records, [main], {})


def test_what_rows_do_in_depth(study_file, tmp_path):
    """The last line of a run's record, as means over the seeds that have one."""
    lines = [
        {"step": 10, "hidden_rms": [9.0, 9.0], "gate_mean": [9.0, 9.0]},
        {
            "step": 30, "hidden_rms": [0.5, 2.000049], "gate_mean": [None, 0.25], "gate_max": [None, 0.75],
            "pool_mean": [[0.25] * 4, [0.5, 0.0, -0.5, 0.0]], "stream_rms": [[1.0], [1.0]], "gradient_rms": [3.0],
        },
        {"step": 30, "hidden_rms": [1.5, 4.0], "gate_mean": [None, 0.75], "pool_mean": [None, [0.0, 2.0]]},
    ]  # fmt: skip
    found = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        written = lines[: number + 1]
        (tmp_path / str(number) / "depth.jsonl").write_text("".join(json.dumps(x) + "\n" for x in written))
        found.append(depth_of(tmp_path / str(number)))
    assert found[1] == {
        "hidden_rms": [0.5, 2.0], "gate_mean": [None, 0.25], "gate_max": [None, 0.75], "sources": [4.0, 2.0],
        "gradient_rms": [3.0],
    }  # fmt: skip
    assert found[2]["sources"] == [None, 1.0]
    assert depth_of(tmp_path) is None

    study = load(study_file())
    records = records_of(
        study,
        {
            "prenorm": [{"hidden_rms": [1.0, 8.0]}] * 3,
            "eight": [None] * 3,
            "mgr-competitive": [None, *found[1:]],
        },
    )
    main = tables_of(study, records)[1]
    row = main.row("mgr-competitive")
    assert row.depth("hidden_rms").tolist() == [1.0, 3.0] and main.row("eight").depth("hidden_rms") is None
    assert np.isnan(row.depth("gate_mean")[0]) and row.depth("gate_mean")[1] == 0.5
    assert row.depth("sources").tolist() == [4.0, 1.5]
    assert main.row("prenorm").depth("gate_mean") is None
    text = page(study, records, [main], {})
    assert "| `mgr-competitive` | 1 to 3 | 0.500 | 0.750 | 2.75 | 1.00 |" in text
    assert "| `prenorm` | 1 to 8 | – | – | – | – |" in text and "| `eight` | 1" not in text
    assert draw_depth(main).startswith(b"\x89PNG") and draw_depth(tables_of(study, records)[0]) is None


def test_a_value_with_none_beside_it_is_marked():
    """Two blocks with four streams have a gate at their last sublayer only: a line of one point shows nothing."""
    nan = math.nan
    assert isolated(np.array([nan, nan, nan, 0.2])) == [3]
    assert isolated(np.array([0.1, nan, 0.2, 0.3, nan, 0.4, nan])) == [0, 5]
    assert isolated(np.array([0.1, 0.2])) == isolated(np.array([nan])) == []


def test_a_table_with_runs_of_others_alone_waits(study_file, monkeypatch):
    for name in ("draw", "draw_depth"):
        monkeypatch.setattr(f"depthmix.study.page.{name}", lambda result: b"drawn")
    study = load(study_file())
    records = records_of(study, {name: [{"hidden_rms": [1.0, 8.0]}] * 3 for name in LOSSES})
    main = tables_of(study, dict([*records.items()][:-1]))[1]
    assert 0 < main.done < main.wanted
    again = replace(main, table=replace(main.table, name="again", title="Again"))
    drawn = dict(drawings([main, again]))
    assert drawn["main"] and drawn["main-depth"] and drawn["again"] is drawn["again-depth"] is None
    text = page(study, records, [main, again], {})
    above, section = text.split("## Again")
    assert "| `prenorm` |" in above and "those of other tables" not in above
    assert f"**{main.done} of {main.wanted} runs have ended, all of them those of other tables.**" in section
    assert "|" not in section
    # Of two unfinished tables the first has the runs.
    assert dict(drawings([again, main]))["main"] is None
    # What is finished is shown wherever its runs come from, and they are its own wherever it stands.
    whole = tables_of(study, records)[1]
    assert whole.done == whole.wanted
    finished = replace(whole, table=again.table)
    assert all(drawn for _, drawn in drawings([whole, finished]))
    drawn = dict(drawings([main, finished]))
    assert drawn["main"] is None and drawn["again"]


@pytest.fixture
def text():
    """Of docs/results.md, on one line."""
    return " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())


def loss_and_line(points):
    """Mean loss of the fourth size, and what the power law of the other three has for it."""
    compute, losses, sizes, _ = map(np.array, zip(*points, strict=True))
    fourth = sizes == "1.6 M"
    slope, at_0 = np.polyfit(np.log(compute[~fourth]), np.log(losses[~fourth]), 1)
    return losses[fourth].mean(), np.exp(at_0 + slope * np.log(compute[fourth][0]))


def test_findings_of_the_tiny_study(text):
    """Which rows differ, by how much, what gates and reads are, what rates and compute gain."""
    study = load(ROOT / "studies/tiny.toml")
    rates, main, scores, names, sizes, *_ = tables_of(study, read_records(study.results))
    assert main.done == main.wanted == 45 and scores.done == scores.wanted == 21
    rows = {row.name: row for row in main.rows}
    differences = {name: row.difference.mean for name, row in rows.items() if row.difference is not None}
    assert [name for name, row in rows.items() if row.verdict != "none"] == ["mhc-lite"]
    lite, block = rows["mhc-lite"], rows["attnres-block:blocks=4"]
    assert f"mHC-lite, by {-lite.difference.mean:.3f} nats (p = {lite.p:.3f} after correction)" in text
    assert (
        f"as far ahead ({-block.difference.mean:.3f}), but these seeds do not show it (p = {block.p:.3f})"
        in text
    )
    assert 1.3 < lite.mean("parameters")[0] / rows["prenorm"].mean("parameters")[0] < 1.35
    four = [differences[f"mgr-{gate} n=4"] for gate in ("independent", "competitive")]
    assert [round(-d, 3) for d in four] == [0.006, 0.006]
    eight = [round(differences[f"mgr-{gate} n=8"], 3) for gate in ("competitive", "independent")]
    assert eight == [-0.004, 0.002]
    assert differences["mgr-competitive n=4"] < differences["attnres"]
    for name, row in rows.items():
        read = row.depth("hidden_rms")
        if name.startswith("mgr-"):
            gate, sources = row.depth("gate_mean"), row.depth("sources")
            assert 0.048 < np.nanmean(gate) < 0.074
            assert round(np.nanmean(sources), 1 if "n=4" in name else 0) == (3.8 if "n=4" in name else 7)
            assert 0.5 < read[2:].min() and read[2:].max() < 3
    assert [round(rows[name].depth("hidden_rms")[-1]) for name in ("prenorm", "mhc-lite")] == [14, 23]
    before = {name: rates.row("prenorm", name).mean("val_loss")[0] for name in ("x 1", "x 2")}
    gain = before["x 1"] - before["x 2"]
    assert f"PreNorm alone gains {gain:.3f}: more than any row of Table 1" in text
    others = {row.name: row for row in names.rows if row.difference is not None}
    ahead = {name: -row.difference.mean for name, row in others.items()}
    assert -min(differences.values()) < gain and 0.9 < max(ahead.values()) / gain < 1.1
    small = {
        name
        for name, row in others.items()
        if row.mean("parameters")[0] < 1.03 * rows["prenorm"].mean("parameters")[0]
    }
    assert names.done == names.wanted == 39
    lower = {name for name, row in others.items() if row.verdict == "lower"}
    assert lower & small == {"hc", "hc-static", "siamese", "denseformer"}
    assert lower - small == {"prenorm D=76", "highway-additive", "review", "moda"}
    assert f"PreNorm with about as many (D = 76 instead of 64) gains {ahead['prenorm D=76']:.3f}" in text
    assert ahead["prenorm D=76"] > -lite.difference.mean
    assert f"Hyper-Connections by {ahead['hc']:.3f} (static ones {ahead['hc-static']:.3f})" in text
    assert f"SiameseNorm by {ahead['siamese']:.3f}, DenseFormer by {ahead['denseformer']:.3f}" in text
    assert (
        f"additive gates of Review ({ahead['review']:.3f} ahead, a third more parameters) and Highway "
        f"({ahead['highway-additive']:.3f}, a sixth more), and MoDA ({ahead['moda']:.3f}, a sixth more)"
        in text
    )
    size = {
        name: row.mean("parameters")[0] / rows["prenorm"].mean("parameters")[0]
        for name, row in others.items()
    }
    assert size["review"] == pytest.approx(4 / 3, abs=0.02)
    assert size["highway-additive"] == pytest.approx(7 / 6, abs=0.02) == size["moda"]
    assert all(ahead[name] < ahead["prenorm D=76"] for name in lower - small - {"prenorm D=76"})
    assert f"mHC's {ahead['mhc']:.3f} is not shown (p = {others['mhc'].p:.3f})" in text
    assert others["highway"].verdict == "higher" and f"as MGR's do, by {-ahead['highway']:.3f}" in text
    assert f"stalls and ends at {others['review-convex'].mean('test_loss')[0]:.1f}" in text
    fits = {fit.name: fit for fit in sizes.fits}
    assert {size for fit in fits.values() for *_, size, _ in fit.points} == {
        "0.1 M",
        "0.35 M",
        "0.8 M",
        "1.6 M",
    }
    assert sizes.done == sizes.wanted == 60 and all(len(fit.points) == 4 * 3 for fit in fits.values())
    # A table of sizes, and so of depths, has no figure of what rows do in depth.
    assert draw_depth(sizes) is None and draw_depth(names) is not None
    more = [fits[name].multiplier for name in ("attnres-block:blocks=4", "attnres")]
    gates = [fits[f"mgr-{gate} n=4"] for gate in ("competitive", "independent")]
    assert (
        "{:.2f} times the compute for the loss of block Attention Residuals and {:.2f} times".format(
            *(x.value for x in more)
        )
        in text
    )
    assert all(x.interval[0] > 1 for x in more)
    assert "{:.2f} and {:.2f} times for the competitive".format(*(x.multiplier.value for x in gates)) in text
    assert all(x.multiplier.interval[0] < 1 < x.multiplier.interval[1] for x in gates)
    slopes = [fit.law.k for fit in (*gates, fits["prenorm"])]
    assert "({:.3f} and {:.3f}; PreNorm's is {:.3f})".format(*slopes) in text
    assert all(fit.law.k_low < fits["prenorm"].law.k_high for fit in gates)
    ahead = {
        (name, size): sizes.row("prenorm", size).mean("test_loss")[0]
        - sizes.row(name, size).mean("test_loss")[0]
        for name in fits
        for *_, size, _ in fits[name].points
    }
    for gate in gates:
        assert all(ahead[gate.name, size] < 0 for size in ("0.1 M", "0.35 M"))
        assert all(ahead[gate.name, size] > 0 for size in ("0.8 M", "1.6 M"))
    at_last = [
        ahead[name, "1.6 M"] for name in (*(g.name for g in gates), "attnres", "attnres-block:blocks=4")
    ]
    assert (
        "at the last by {:.3f} and {:.3f}, where full and block Attention Residuals are ahead by {:.3f} and "
        "{:.3f}".format(*at_last)
    ) in text
    at_last_size = {
        name: {seed: loss for _, loss, size, seed in fit.points if size == "1.6 M"}
        for name, fit in fits.items()
    }
    for gate in gates:
        assert all(loss < at_last_size["prenorm"][seed] for seed, loss in at_last_size[gate.name].items())
        row = sizes.row(gate.name, "1.6 M")
        assert row.verdict == "none" and f"(p = {row.p:.3f} for each after correction)" in text
    above = {name: loss_and_line(fit.points) for name, fit in fits.items()}
    over = [loss - line for loss, line in above.values()]
    assert f"rows end {min(over):.2f} to {max(over):.2f} above the line through their first three" in text
    assert "(PreNorm: {1:.2f} by the line, {0:.2f} found)".format(*above["prenorm"]) in text
    *unit, review, unit_review = (row for row in scores.rows if row.difference is not None)
    worse = [round(row.difference.mean, 3) for row in unit]
    assert f"{min(worse):.3f} to {max(worse):.3f} worse than the competitive" in text
    assert {row.verdict for row in (*unit, review)} == {"none"} and unit_review.p < 0.001
    assert f"without the division is worse by {unit_review.difference.mean:.3f} (p < 0.001)" in text
    assert f"in the tiny study it is {review.difference.mean:.3f} behind, within the error too" in text
    assert all(0.55 < np.nanmax(row.depth("gate_max")) < 0.95 for row in unit)
    sources = {row.name: np.nanmean(row.depth("sources")) for row in unit}
    assert all(value < (3.5 if "n=4" in name else 6.5) for name, value in sources.items())


def test_findings_on_rates(text):
    """What each row loses at which rates, by the validation loss of one seed, and what five say of those it chose."""
    study = load(ROOT / "studies/tiny.toml")
    tables = {result.table.name: result for result in tables_of(study, read_records(study.results))}
    own, main, chosen = tables["own-rates"], tables["main"], tables["own-main"]
    assert own.done == own.wanted == 54 and not any(row.diverged for row in own.rows)
    loss = {(row.name, row.point): row.mean("val_loss")[0] for row in own.rows}
    rows = [row.name for row in own.table.rows]
    ahead = {
        point.name: [loss["prenorm", point.name] - loss[name, point.name] for name in rows[1:]]
        for point in own.table.points
    }
    assert all(max(ahead[point]) < 0 for point in ("x 1/4", "x 1/2", "x 1"))
    assert own.best["prenorm"].name == "x 2" and sum(value > 0 for value in ahead["x 2"]) == 7
    assert f"seven of the other eight are ahead of it, by up to {max(ahead['x 2']):.3f}." in text
    more = {name: loss[name, "x 4"] - loss[name, "x 2"] for name in rows}
    lost = sorted(more[name] for name in rows if name.startswith("attnres"))
    moved = sorted(more[name] for name in rows if name.startswith("mgr-"))
    assert (len(lost), len(moved)) == (3, 4) and more["mhc-lite"] < 0
    assert (
        f"full and block, lose {lost[0]:.3f} to {lost[-1]:.3f}, PreNorm loses {more['prenorm']:.3f}, Multi-Gate "
        f"Residuals between {moved[0]:.3f} and {moved[-1]:.3f}, mHC-lite nothing." in text
    )
    three = ["mhc-lite", "mgr-independent n=8", "mgr-competitive n=8"]
    assert {name: point.name for name, point in own.best.items()} == {
        name: "x 4" if name in three else "x 2" for name in rows
    }
    assert chosen.done == chosen.wanted == 45 and not shown(chosen)
    assert (
        "mHC-lite is {:.3f} behind, the independent gate {:.3f} and the competitive one {:.3f},".format(
            *(chosen.row(name).difference.mean for name in three)
        )
        in text
    )
    largest = [np.nanmax(chosen.row(name).depth("hidden_rms")[2:]) for name in three[1:]]
    last = [round(chosen.row(name).depth("hidden_rms")[-1], 1) for name in three]
    assert sorted(map(round, largest)) == [10, 13] and round(last[0]) == 66 and max(last[1:]) < 2
    worse = []
    for name in three:
        at_own, shared = chosen.row(name).runs, main.row(name).runs
        by_seed = {seed: run["val_loss"] - shared[seed]["val_loss"] for seed, run in at_own.items()}
        worse.append(sum(by_seed.values()) / 5)
        assert len(by_seed) == 5 and by_seed[0] < 0 < worse[-1]
    assert "by {:.3f}, {:.3f} and {:.3f} in the mean of five seeds".format(*worse) in text


@pytest.fixture(scope="module")
def ablations():
    """The study, its records and its tables by name, all of them complete."""
    study = load(ROOT / "studies/ablations.toml")
    records = read_records(study.results)
    tables = {result.table.name: result for result in tables_of(study, records)}
    assert all(result.done == result.wanted for result in tables.values())
    return study, records, tables


def losses(result):
    """Mean test loss of each row."""
    return {row.name: row.mean("test_loss")[0] for row in result.rows}


def shown(result):
    """Rows that differ from the table's first."""
    return {row.name for row in result.rows if row.verdict != "none"}


def test_findings_on_gates_at_the_start(text, ablations):
    """Eq. 14 with n or 1, and its base bias."""
    _, _, tables = ablations
    init, bias = tables["independent-init"], tables["base-bias"]
    four, four_one, eight, eight_one, many, many_one = losses(init).values()
    assert f"{four_one - four:.3f} behind at four streams and {eight - eight_one:.3f} ahead at eight" in text
    assert shown(init) == {"n=16, n in Eq. 14"} and init.row("n=16, n in Eq. 14").p < 0.001
    assert f"is {many - four:.3f} behind four streams (p < 0.001)" in text
    assert f"and {many_one - four:.3f} is left, within the error" in text
    begin = [1 / (1 + math.exp(gate_bias_init(32 - 15, n))) for n in (16, 1)]
    assert f"begin at {begin[0]:.2f} and is" in text and f"they begin at {begin[1]:.2f}," in text
    rows, found = {row.name: row for row in bias.rows}, losses(bias)
    for sign, words in (
        (-2, "costs the competitive gate {:.3f} and the independent one {:.3f}"),
        (-4, "costs them {:.3f} and {:.3f}"),
    ):
        costs = [found[f"{gate} {sign}"] - found[f"{gate} -3"] for gate in ("competitive", "independent")]
        assert words.format(*costs) in text
        assert all(rows[f"{gate} {sign}"].verdict == "higher" for gate in ("competitive", "independent"))
    assert f"with -3: {max(row.p for row in rows.values() if row.verdict == 'higher'):.3f} and less)" in text
    for name, row in rows.items():
        gate, gradient = np.nanmean(row.depth("gate_mean")), row.depth("gradient_rms")
        low, high = {"-2": (0.6, 1.1), "-3": (3.5, 5.5), "-4": (9.5, 11)}[name[-2:]]
        assert low < gradient[0] / gradient[-1] < high
        base = np.nanmean(rows[f"{name[:-3]} -3"].depth("gate_mean"))
        assert gate / base == pytest.approx({"-2": 2.3, "-3": 1, "-4": 0.5}[name[-2:]], rel=0.2)


def test_findings_on_gates_that_learn(text, ablations):
    """The rate of gates and pools, scores with and without the division, gates that see the update."""
    study, records, tables = ablations
    rate, score, review = (tables[name] for name in ("connection-rate", "score-scale", "review"))
    assert shown(score) == shown(review) == set()
    found = losses(rate)
    rows = {row.name: row for row in rate.rows}
    assert shown(rate) == {"competitive x 16"}
    behind = [found[f"{gate} x 0"] - found[f"{gate} x 1"] for gate in ("competitive", "independent")]
    assert f"{-behind[0]:.3f} ahead of the competitive gate that learns" in text
    assert f"it is {behind[1]:.3f} behind, in every seed, which is not shown" in text
    each = {}
    for use, cell in study.uses(rate.table, {}):
        each.setdefault(use.row, {})[use.seed] = records[cell.key].values["test_loss"]
    assert all(each["independent x 0"][seed] > loss for seed, loss in each["independent x 1"].items())
    without = {name: of_seeds for name, of_seeds in each.items() if not name.endswith("x 16")}
    p = pooled(without, "independent x 1")["independent x 0"].p
    assert f"(p = {p:.3f} before any correction" in text
    most = [rows[f"{gate} x 16"] for gate in ("competitive", "independent")]
    assert f"sixteen times is {most[0].difference.mean:.3f} behind" in text and most[0].p < 0.001
    assert (
        f"{most[1].difference.mean:.3f} with the independent one (p < 0.001 and p = {most[1].p:.3f})" in text
    )
    fixed = rows["competitive x 0"]
    assert f"at {np.nanmean(fixed.depth('gate_mean')):.3f}" in text
    assert np.nanmax(fixed.depth("gate_max")) == np.nanmin(fixed.depth("gate_mean"))
    found = losses(score)
    undivided = [found[f"{gate}, 1"] - found[f"{gate}, 1/sqrt(D)"] for gate in ("competitive", "independent")]
    assert "Scores that are not divided are {:.3f} and {:.3f} behind".format(*undivided) in text
    found = losses(review)
    seen = (
        found["mgr-review"] - found["mgr-competitive"],
        found["mgr-review:gate=independent"] - found["mgr-independent"],
    )
    assert (
        "`mgr-review` is {:.3f} behind the competitive gate and, with independent gates, {:.3f} behind".format(
            *seen
        )
        in text
    )


def test_findings_on_streams(text, ablations):
    """How many, what is read of them at the end, and what each takes in."""
    _, _, tables = ablations
    streams, last, separate = (tables[name] for name in ("streams", "last-read", "separate-streams"))
    found = losses(streams)
    assert shown(streams) == {"competitive n=1", "independent n=16"}
    one = [found[f"{gate} n=1"] - found[f"{gate} n=4"] for gate in ("competitive", "independent")]
    assert (
        f"{one[0]:.3f} behind four with the competitive gate (p = {streams.row('competitive n=1').p:.3f})"
        in text
    )
    assert f"and {one[1]:.3f} behind with the independent one, which is not shown" in text

    found = losses(last)
    assert shown(last) == shown(separate) == set()
    assert f"{found['competitive, pool'] - found['competitive, mean']:.3f} ahead" in text
    assert 0 < found["independent, mean"] - found["independent, pool"] < 0.001
    found = losses(separate)
    four, eight, independent = (
        found[f"{kind}, separate"] - found[f"{kind}, together"]
        for kind in ("competitive n=4", "competitive n=8", "independent n=4")
    )
    assert f"four streams are {four:.3f} behind and eight {eight:.3f}; with the independent" in text
    assert f"gate four are {-independent:.3f} ahead;" in text
    alike = separate.row("competitive n=4, separate, gates as together")
    assert f"streams do, {alike.difference.mean:.3f} behind (p = {alike.p:.3f})" in text


def test_findings_on_how_streams_are_kept(text, ablations):
    """In which precision, replayed or inverted."""
    study, records, tables = ablations
    dtype, memory = tables["stream-dtype"], tables["stream-memory"]
    assert shown(dtype) == shown(memory) == set()
    _, *others = dtype.rows
    beside, autocast, both = (row.difference.mean for row in others)
    assert f"beside fp32 they are {-beside:.3f} ahead (p = {others[0].p:.3f})" in text
    assert f"beside autocast {both - autocast:.3f} behind; autocast itself is {autocast:.3f} behind" in text
    curves = {
        (use.row, use.seed): np.array(records[cell.key].values["curve"]["train_loss"])
        for use, cell in study.uses(memory.table, {})
    }
    apart, seeds = [], []
    for row in {row: None for row, _ in curves}:
        kept = "replay" if row.startswith("inversion") else f"{row.split(',')[0]}, replay"
        if "inversion" in row:
            apart.append(np.mean([abs(curves[row, seed] - curves[kept, seed]).mean() for seed in range(3)]))
        else:
            pairs = ((0, 1), (0, 2), (1, 2))
            seeds.append(np.mean([abs(curves[row, a] - curves[row, b]).mean() for a, b in pairs]))
    assert (
        f"the six are {min(apart):.3f} to {max(apart):.3f} nats from replay with the same seed, where two seeds of "
        f"one row are {min(seeds):.3f} to {max(seeds):.3f} apart" in text
    )
