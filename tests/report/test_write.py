import json
import math
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest

from depthmix.config import from_dict
from depthmix.errors import RunError, UserError
from depthmix.presets import PRESETS
from depthmix.report import plots, write_compare_report, write_run_report
from depthmix.report.records import read_run
from depthmix.report.reproduce import compare_command, train_command
from depthmix.report.write import write_atomically

VOID = {"meta", "br", "img", "link", "input", "hr"}
NAMES = ["prenorm", "mgr-independent", "mgr-competitive"]


class Page(HTMLParser):
    """Checks nesting, collects references, scripts and text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.references, self.tags, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.references.append(value)
            assert not name.startswith("on")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(path):
    page = Page(path)
    assert all(value.startswith(("data:", "#")) for value in page.references)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    source = path.read_text()
    assert "@import" not in source
    # What is left of addresses are the names of XML namespaces, which nobody fetches.
    assert set(re.findall(r'[\w:]+="https?://[^"]*"', source)) <= {
        'xmlns="http://www.w3.org/2000/svg"',
        'xmlns:xlink="http://www.w3.org/1999/xlink"',
    }
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    return page


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_run_report(fake, make_config, tmp_path):
    run = fake.fabricate(tmp_path / "run", make_config("mgr-competitive"))
    page = assert_self_contained(write_run_report(run))
    assert_png(run / "loss.png")
    assert page.tags.count("svg") == 4
    for text in ("mgr-competitive", "finished, 40 steps", "2.13.0", "depthmix train --preset quick", "1,100"):
        assert text in page.text
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("upto", [0, 1, 3])
def test_run_report_of_a_run_that_has_hardly_begun(fake, make_config, tmp_path, upto):
    run = fake.fabricate(tmp_path / "run", make_config(), upto=upto)
    page = assert_self_contained(write_run_report(run))
    assert f"unfinished, {upto} of 40 steps" in page.text
    assert (run / "loss.png").exists() == (upto > 0)


def test_run_report_without_timing_and_with_a_loss_that_is_not_finite(fake, make_config, tmp_path):
    run = fake.fabricate(tmp_path / "run", make_config(), upto=12)
    (run / "timing.jsonl").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"split": "train", "step": 13, "tokens": 9, "loss": math.nan}) + "\n")
    assert assert_self_contained(write_run_report(run)).tags.count("svg") == 3


def test_compare_report(fake, make_comparison):
    folder = make_comparison(NAMES, seeds=3)
    page = assert_self_contained(write_compare_report(folder))
    assert_png(folder / "loss.png")
    results = json.loads((folder / "results.json").read_text())
    rival = results["residuals"][2]
    differences = [
        fake.val_loss("mgr-competitive", k, 40) - fake.val_loss("prenorm", k, 40) for k in range(3)
    ]
    assert rival["val_loss_difference"] == pytest.approx(np.mean(differences))
    assert rival["val_loss_difference_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))
    assert rival["step_time_ratio"] == pytest.approx(1.5)
    mean = np.mean(differences)
    assert f"−{abs(mean):.4f}" in page.text
    assert page.tags.count("svg") == 5
    assert all(sentence in page.text for sentence in results["statements"])
    assert "mgr-competitive, seed 2" in page.text


def test_compare_report_of_what_is_there(make_comparison):
    folder = make_comparison(
        NAMES,
        seeds=2,
        upto={"mgr-independent-s0": 7, "mgr-competitive-s1": None},
        failures={"mgr-independent-s0": "loss is <not> finite", "mgr-competitive-s1": "gone"},
    )
    page = assert_self_contained(write_compare_report(folder))
    assert "mgr-independent, seed 0: loss is <not> finite" in page.text
    assert "1 of 2 runs finished" in page.text
    rows = json.loads((folder / "results.json").read_text())["runs"]
    assert [row["status"] for row in rows] == [
        "finished",
        "failed",
        "finished",
        "finished",
        "finished",
        "failed",
    ]


def test_compare_report_before_any_run(make_comparison):
    folder = make_comparison(NAMES, seeds=1, upto={f"{name}-s0": None for name in NAMES})
    page = assert_self_contained(write_compare_report(folder))
    assert "No step has been taken yet" in page.text
    assert not (folder / "loss.png").exists()


def test_compare_report_without_prenorm_measures_against_the_first(make_comparison):
    folder = make_comparison(NAMES[1:], seeds=1)
    assert "difference to mgr-independent" in assert_self_contained(write_compare_report(folder)).text


def test_what_users_name_is_escaped(fake, make_config, tmp_path):
    nasty = '</style><script>alert("1")</script>&amp;\''
    config = make_config()
    config["data"]["data"] = [nasty]
    run = fake.fabricate(tmp_path / "a <b> & c", config, environment={nasty: nasty})
    path = write_run_report(run)
    page = assert_self_contained(path)
    assert "<script" not in path.read_text()
    assert page.text.count(nasty) >= 3
    assert "a <b> & c" in page.text


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_run_report(tmp_path)
    with pytest.raises(UserError, match="is not a comparison"):
        write_compare_report(tmp_path)


def test_failed_write_keeps_what_was_there(tmp_path):
    target = tmp_path / "report.html"
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(RunError, match=r"cannot write .*report\.html"):
        write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_long_runs_are_thinned_but_keep_their_spikes():
    x, y = np.arange(50_000.0), np.zeros(50_000)
    y[31_337], y[123] = 9.0, -9.0
    thin_x, thin_y = plots._thin(x, y)
    assert thin_x.size <= plots.MOST_POINTS
    assert (thin_y.max(), thin_y.min()) == (9.0, -9.0)
    assert (np.diff(thin_x) > 0).all()


def test_sixteen_connections_have_sixteen_looks():
    names = [f"residual-{k}" for k in range(16)]
    assert len(set(plots._style(names, names[0], "#000000").values())) == 16


def test_figures_follow_the_page(fake, make_config, tmp_path):
    record = read_run(fake.fabricate(tmp_path / "run", make_config()))
    for _, _, svg in plots.svgs({"prenorm": [record]}, None):
        assert "currentColor" in svg and plots._SVG_INK not in svg
        assert re.match(r'<svg role="img" aria-label="[^"]+" ', svg)
        assert "viewBox" in svg and not re.match(r"<svg[^>]* (width|height)=", svg)


@pytest.mark.parametrize("name", list(PRESETS))
def test_train_command_gives_the_configuration_again(name):
    from depthmix import cli, flags

    config = PRESETS[name].to_dict()
    config["data"]["data"] = ["a file", "b"]
    config["compile"] = True
    config["optim"]["lr"] = 1.25e-4
    config["model"]["residual"] = "prenorm"
    words = shlex.split(train_command(config))
    assert words[:2] == ["depthmix", "train"]
    chosen = flags.given(words, "--preset")
    args = flags.parse(cli.Train, words[2:], "train", cli.Train(training=flags.to_flags(PRESETS[chosen])))
    assert flags.to_config(args.training) == from_dict(config)


def test_compare_command_names_what_differs_from_the_recipe(make_config):
    plan = {"recipe": "quick", "residuals": NAMES, "seeds": 3, "config": make_config(steps=7)}
    assert compare_command(plan) == (
        "depthmix compare --recipe quick --residuals prenorm,mgr-independent,mgr-competitive --seeds 3 "
        "--steps 7 --eval-interval 10"
    )


def test_a_failed_connection_does_not_flatten_the_others():
    values = {"a": [0.01, -0.1], "b": [0.05], "c": [-0.06], "stalled": [0.2, 1.3]}
    assert plots.beyond(values) == {"stalled": 1.3}
    assert plots.beyond(values | {"stalled": [0.2, 0.3]}) == {}
    assert plots.beyond({name: values[name] for name in ("a", "b", "stalled")}) == {}
    assert plots.beyond(values | {"diverged": [float("nan")]}) == {"stalled": 1.3}
