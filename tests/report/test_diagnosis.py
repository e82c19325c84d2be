"""The report of diagnoses: its numbers against direct computation, its figures, its page in a browser."""

import base64
import html
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.transforms import Bbox

from depthmix.diagnostics.arrays import Diagnosis
from depthmix.errors import RunError, UserError
from depthmix.report import diagnosis as report
from depthmix.report import diagnosis_canvas as canvas
from depthmix.report import diagnosis_drawings as drawings
from depthmix.report import diagnosis_figures as figures
from depthmix.report.plots import INK

KEYS = [figure.key for figure in figures.FIGURES]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def make():
    """The module ``fabricate_diagnosis.py`` beside this file."""
    path = Path(__file__).with_name("fabricate_diagnosis.py")
    spec = importlib.util.spec_from_file_location("fabricate_diagnosis", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    """A report of a run without streams, of one that pools sources, and of one with streams."""
    folder = tmp_path_factory.mktemp("diagnosis") / "not" / "there yet"
    runs = [make.fabricate("prenorm", 3), make.fabricate("attnres", 2), make.fabricate("mgr", 4, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.write_diagnosis(folder, runs) == folder / "report.html"
    return folder


@pytest.fixture
def coarse(monkeypatch):
    """Pictures that are quick to draw."""
    monkeypatch.setattr(figures, "DPI", 40)


@pytest.fixture
def few(coarse, monkeypatch):
    """Five of the figures."""
    keys = "outputs", "gradients", "activations-mlp", "gates", "mixing"
    monkeypatch.setattr(report, "FIGURES", [figure for figure in figures.FIGURES if figure.key in keys])


class Page(HTMLParser):
    """Checks nesting; collects addresses, pictures and text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.addresses, self.tags, self.text, self.pictures = [], [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value)
                if tag in ("img", "image"):
                    self.pictures.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "img"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(path):
    page = Page(path)
    assert all(value.startswith(("data:", "#")) for value in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in page.source
    namespaces = r'xmlns(:xlink)?="http://www\.w3\.org/(2000/svg|1999/xlink)"'
    assert not re.search(r"https?:|//[a-z]", re.sub(namespaces, "", re.sub(r"data:[^\"]*", "", page.source)))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
    for picture in page.pictures:
        kind, data = picture.split(",", 1)
        assert kind == "data:image/png;base64"
        assert matplotlib.image.imread(io.BytesIO(base64.b64decode(data))).size
    return page


def shown(*diagnoses):
    return [canvas.Shown(label, d) for label, d in zip(canvas.labels(diagnoses), diagnoses, strict=True)]


# --- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prenorm", "attnres", "mgr"])
def test_summary_is_what_a_loop_over_the_arrays_finds(make, kind):
    diagnosis = make.fabricate(kind, 5, 3, seed=3)
    found = report.summary(diagnosis)
    distances = [(diagnosis["angular_distance"][0, i, i + 1], i) for i in range(5)]
    assert (found["closest_distance"], found["closest_block"]) == min(distances)
    changes = [(d, i) for i, d in enumerate(diagnosis["removal_delta"]) if not math.isnan(d)]
    assert (found["most_important_delta"], found["most_important_block"]) == max(changes)
    assert (found["least_important_delta"], found["least_important_block"]) == min(changes)
    assert found["least_important_error"] == diagnosis["removal_se"][min(changes)[1]]
    for what in ("hidden", "output"):
        places = itertools.product(range(10), range(3))
        value, s, r = max((diagnosis[f"top_{what}"][s, r], s, r) for s, r in places)
        assert (found[f"largest_{what}"], found[f"largest_{what}_sublayer"]) == (value, s)
        for part in ("text", "position", "channel", "token"):
            assert found[f"largest_{what}_{part}"] == diagnosis[f"top_{what}_{part}"][s, r]
        assert found[f"largest_{what}_to_median"] == value / diagnosis[f"median_{what}"][s]
    assert found["base_loss"] == 3.21 and found["texts"] == 512 and found["parameters"] == 1_234_570
    if kind == "mgr":
        edges = diagnosis["gate_edges"][0]
        middles = diagnosis["gate_counts"] @ ((edges[1:] + edges[:-1]) / 2)
        # To the width of half a bin.
        assert found["gate_mean"] == pytest.approx(middles.sum() / diagnosis["gate_counts"].sum(), abs=5e-4)
        value, s = max((v, s) for s, v in enumerate(diagnosis["gate_max"]) if not math.isnan(v))
        assert (found["gate_largest"], found["gate_largest_sublayer"]) == (value, s)
        assert found["static_streams"] == [2] and found["static_scores"] == [0.01]
    else:
        assert found["gate_mean"] is found["gate_largest"] is found["static_streams"] is None
    json.dumps(found, allow_nan=False)


def test_massive_activations_are_above_100_and_above_1000_medians(make):
    diagnosis = make.fabricate("prenorm", 2)
    make.put(
        diagnosis,
        top_hidden=[[101, 99, 1], [5000, 4999, 2], [900, 800, 700], [99.9, 50, 50]],
        top_hidden_channel=[[7, 1, 1], [9, 7, 1], [3, 3, 3], [2, 2, 2]],
        median_hidden=[0.1, 4.9995, 1.0, 0.001],
    )
    found = report.summary(diagnosis)
    # 101 > 100 medians of 0.1; 5000 > 4999.5, which 4999 is not; 900 is no thousand medians; 99.9 is too small.
    assert found["massive"] == 2
    assert found["massive_sublayers"] == [0, 1] and found["massive_channels"] == [7, 9]


def test_mean_gate_counts_every_gate_once(make):
    diagnosis = make.fabricate("mgr", 2, 2)
    counts = np.zeros((4, 1000))
    counts[1, 100], counts[2, 200] = 100, 300
    make.put(diagnosis, gate_counts=counts, gate_mean=[np.nan, 0.1, 0.3, np.nan])
    assert report.summary(diagnosis)["gate_mean"] == pytest.approx((100 * 0.1 + 300 * 0.3) / 400)


def test_strongest_source_is_by_size(make):
    diagnosis = make.fabricate("prenorm", 1)
    make.put(diagnosis, mixing_matrix=[[1, 0, 0], [1, 1, 0], [0.5, -2, 1]], mixing_source_rms=[3.0, 1.0, 1.5])
    found = report.summary(diagnosis)
    assert (found["strongest_source"], found["strongest_share"]) == (1, pytest.approx(2 / 5))


def test_token_text_of_a_saved_diagnosis(make, tmp_path):
    diagnosis = make.fabricate("prenorm", 2)
    token = report.summary(diagnosis)["largest_hidden_token"]
    diagnosis.text["top_tokens"] = {str(token): "\n<s>"}
    loaded = Diagnosis.load(diagnosis.save(tmp_path / "a.npz"))
    assert report.summary(loaded)["largest_hidden_token_text"] == "\n<s>"
    assert report.summary(loaded) == report.summary(diagnosis)
    assert '"\\n<s>"' in report._rows(report.summary(loaded))["largest activation"][1]


def test_printed_table_has_a_column_a_run(make, capsys):
    report.print_summary([make.fabricate("prenorm", 2, name="[red]a"), make.fabricate("mgr", 3, 2)])
    printed = capsys.readouterr().out
    assert "[red]a" in printed and "mgr-competitive" in printed
    assert re.search(r"mean loss +3\.2100 nats +3\.2100 nats", printed)


# --- the figures -----------------------------------------------------------------------------------


def test_every_array_of_the_schema_is_used(make, coarse, monkeypatch, tmp_path):
    used = set()
    take = Diagnosis.__getitem__
    monkeypatch.setattr(Diagnosis, "__getitem__", lambda self, name: used.add(name) or take(self, name))
    report.write_diagnosis(tmp_path, [make.fabricate("mgr", 2, 3)])
    assert set(make.AXES) - used == set()


def test_report_has_every_figure_in_print_quality(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{key}.png" for key in KEYS), "report.html"]
    )
    for key in KEYS:
        data = (folder / f"{key}.png").read_bytes()
        # pHYs: pixels per metre.
        place = data.index(b"pHYs") + 4
        assert int.from_bytes(data[place : place + 4]) == round(300 / 0.0254)
        image = matplotlib.image.imread(io.BytesIO(data))[..., :3]
        assert image.shape[1] > 1000 and (image[0] == 1).all() and (image < 0.5).any()


@pytest.mark.parametrize("key", [key for key in KEYS if key != "mixing"])
def test_four_deep_runs_stay_legible(make, key):
    """No letter is cut off, and no two texts lie on each other."""
    runs = shown(
        make.fabricate("prenorm", 24),
        make.fabricate("attnres", 24, name="a run with a long name of its own", seed=1),
        make.fabricate("mgr", 24, 8, seed=2, name="x" * 60),
        make.fabricate("mgr", 24, 8, seed=3, name="independent"),
    )
    figure = figures.FIGURES[KEYS.index(key)]
    runs = [run for run in runs if figure.has(run)]
    assert len(runs) >= 2
    with warnings.catch_warnings(), canvas.drawing(INK):
        warnings.simplefilter("error")
        drawn = figure.draw(runs, INK)
        drawn.canvas.draw()
        boxes = text_boxes(drawn)
    width, height = drawn.bbox.size
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


def text_boxes(figure):
    """(text, extent in pixels) of everything written in a drawn figure."""
    texts = []
    for part in [figure, *figure.subfigs]:
        for legend in part.legends:
            texts += legend.get_texts()
    for ax in figure.axes:
        if not ax.axison:
            continue
        texts += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    texts += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    boxes = []
    for text in texts:
        words, box = text.get_text(), text.get_window_extent()
        lines = words.split("\n") if text.get_rotation() == 0 else [words]
        for i, line in enumerate(lines if text.get_visible() else []):
            # Lines of one text have their own widths.
            text.set_text(line)
            height = box.height / len(lines)
            bottom = box.y1 - (i + 1) * height
            width = text.get_window_extent().width
            if line.strip():
                boxes.append((line, Bbox.from_bounds(box.x0, bottom, width, height)))
        text.set_text(words)
    return boxes


@pytest.mark.parametrize("key", ["activations-mlp", "removal", "rank"])
def test_runs_share_their_scales(make, key):
    small, large = make.fabricate("prenorm", 3), make.fabricate("prenorm", 3, seed=1)
    for name in ("top_hidden", "removal_delta", "effective_rank"):
        make.put(large, **{name: large[name] * 1000})
    with canvas.drawing(INK):
        axes = figures.FIGURES[KEYS.index(key)].draw(shown(small, large), INK).axes
    name = {"activations-mlp": "top_hidden", "removal": "removal_delta", "rank": "effective_rank"}[key]
    one, other = axes[0], axes[len(axes) // 2]
    assert one is not other and one.get_ylim() == other.get_ylim()
    assert one.get_ylim()[0] < small[name].min() and one.get_ylim()[1] > large[name].max()


def test_distance_map_has_the_later_block_upwards():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    distance = np.arange(16.0).reshape(4, 4)
    shown = drawings._distance_map(ax, distance, 1.0, "black").get_array()
    for first, later in itertools.product(range(3), range(1, 4)):
        if first + later <= 3:
            assert shown[later - 1, first] == distance[first, first + later]
        else:
            assert np.ma.is_masked(shown[later - 1, first])


def test_gate_distribution_keeps_all_gates(make):
    """Shares of a sublayer add up to one, and lie where its gates are."""
    from matplotlib.figure import Figure

    diagnosis = make.fabricate("mgr", 2, 2)
    counts = np.zeros((4, 1000))
    counts[2, 250], counts[3, 0], counts[3, 999] = 5, 1, 3
    make.put(diagnosis, gate_counts=counts)
    ax = Figure().subplots()
    drawings._gate_distribution(ax, shown(diagnosis)[0], "black", np.sqrt, np.square, 0, 1, rows=10)
    shares = ax.images[0].get_array().filled(0)
    assert shares.sum(0) == pytest.approx([0, 0, 1, 1])
    # A gate of a quarter is half way up the square root.
    assert np.flatnonzero(shares[:, 2]).tolist() == [5]
    assert shares[[0, 9], 3] == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("seed", [0, 1])
def test_holes_and_infinities_are_drawn_around(make, coarse, tmp_path, seed):
    rng = np.random.default_rng(seed)
    runs = [make.fabricate("mgr", 3, 3), make.fabricate("attnres", 2)]
    for diagnosis in runs:
        for name in make.AXES:
            values = diagnosis.arrays[name].values if name in diagnosis else np.zeros(())
            if values.dtype.kind == "f" and values.ndim:
                hole = rng.choice([np.nan, np.inf, -np.inf], values.shape)
                make.put(diagnosis, **{name: np.where(rng.random(values.shape) < 0.3, hole, values)})
        make.put(diagnosis, not_finite=rng.integers(0, 2, len(diagnosis["not_finite"])) * 1234)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = assert_self_contained(report.write_diagnosis(tmp_path, runs))
    assert "Values that are not finite" in page.text and "1,234 tokens" in page.text
    for sublayer in np.flatnonzero(runs[0]["not_finite"]):
        assert canvas.sublayer_name(int(sublayer)) in page.text


def test_nothing_finite_gives_a_page_that_says_so(make, tmp_path):
    diagnosis = make.fabricate("mgr", 2, 2)
    for name in make.AXES:
        values = diagnosis.arrays[name].values
        if values.dtype.kind == "f":
            make.put(diagnosis, **{name: np.full(values.shape, np.nan)})
    page = assert_self_contained(report.write_diagnosis(tmp_path, [diagnosis]))
    assert "svg" not in page.tags and [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.text.count("nothing finite was measured") == len(KEYS) - 1
    assert "no block can be removed" in page.text


@pytest.mark.parametrize("kind", ["prenorm", "mgr"])
def test_a_single_block(make, coarse, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = assert_self_contained(report.write_diagnosis(tmp_path, [make.fabricate(kind, 1, 2)]))
    assert "input of block 0 and output of the last" in page.text
    assert (tmp_path / "distance.png").exists()


# --- the page --------------------------------------------------------------------------------------


def test_page_is_self_contained_and_complete(folder):
    page = assert_self_contained(folder / "report.html")
    assert page.tags.count("svg") == page.tags.count("section") == len(KEYS)
    assert len(page.pictures) > 10
    for figure in figures.FIGURES:
        assert figure.title in page.text and figure.shown in page.text and figure.look in page.text
        assert f'id="{figure.key}"' in page.source and f"{figure.key}.png" in page.text
    for number in ("Fig. 2, left", "Fig. 2, right", "Fig. 3, 8 and 9", "Fig. 4", "Fig. 10 and 11a", "Fig. 5 and 11b",
                   "Fig. 6 and 12", "Fig. 7 and 13"):  # fmt: skip
        assert f"Paper: {number}." in page.text
    assert "currentColor" in page.source and "prefers-color-scheme: dark" in page.source


def test_missing_figures_are_named_with_their_reason(folder, make, few, tmp_path):
    text = Page(folder / "report.html").text
    left_out = text[text.index("Figures that could not be made") :]
    assert f"Gates, prenorm: {make.NO_GATES}" in left_out
    assert f"Size of streams, attnres-block:blocks=4: {make.NO_STREAMS}" in left_out
    assert "Gates, mgr" not in left_out and "Removing one block" not in left_out
    diagnosis = make.put(make.fabricate("prenorm", 2), gradient_rms=None, top_hidden=None)
    diagnosis.missing = {"gradients": "no gradient was asked for", "activations": "too <large>"}
    page = Page(report.write_diagnosis(tmp_path, [diagnosis]))
    assert "Gradient by block, prenorm: no gradient was asked for" in page.text
    assert "Largest activations, MLP, prenorm: too <large>" in page.text
    # What the pass over all texts would have given, where that was not made.
    assert "Gates, prenorm: too <large>" in page.text
    assert not (tmp_path / "gradients.png").exists() and not (tmp_path / "activations-mlp.png").exists()


def test_weights_below_zero_have_their_colours(make):
    """As DenseFormer may have them."""
    plain, signed = make.fabricate("attnres", 2), make.fabricate("attnres", 2)
    make.put(signed, pool_mean=np.where(np.isnan(signed["pool_mean"]), np.nan, -0.25))
    for runs, limits in (([plain], (0, np.nanmax(plain["pool_mean"]))), ([signed], (-0.25, 0.25))):
        with canvas.drawing(INK):
            image = drawings.pools(shown(*runs), INK).axes[0].images[0]
        assert image.get_clim() == limits
    assert image.cmap(image.norm(-0.25))[:3] == image.cmap(0.0)[:3]


def test_blocks_that_cannot_be_removed_have_their_reason(make):
    diagnosis = make.fabricate("mgr", 4, 4)
    run = shown(diagnosis)[0]
    assert drawings.kept_because(run) == {"it appends streams that later blocks read": [0, 1]}
    with canvas.drawing(INK):
        figure = drawings.removal([run], INK)
        words = " ".join(t.get_text() for t in figure.legends[0].get_texts()).replace("\n", " ")
    assert "not removable: it appends streams that later blocks read" in words
    bars = [patch for patch in figure.axes[0].patches if patch.get_hatch() is None]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [2, 3]


def test_what_users_name_is_escaped(make, few, tmp_path):
    nasty = '</style><script>alert("1")</script>&amp;\' $x$ $'
    diagnosis = make.fabricate("prenorm", 2, name=nasty, detail=nasty)
    other = make.fabricate("prenorm", 2, name="other")
    token = report.summary(diagnosis)["largest_hidden_token"]
    diagnosis.text.update(source=nasty, top_tokens={str(token): nasty})
    diagnosis.missing, diagnosis.warnings = {"gates": nasty}, [nasty]
    diagnosis.seconds = {nasty: 1.0}
    page = assert_self_contained(report.write_diagnosis(tmp_path, [diagnosis, other]))
    assert "<script" not in page.source and page.text.count(nasty) >= 6


def test_labels_tell_runs_apart(make):
    runs = [make.fabricate("prenorm", 1, name=name) for name in ("a", "b", "b")] + [make.fabricate("mgr", 1)]
    assert canvas.labels(runs) == ["prenorm (a)", "prenorm (b) #1", "prenorm (b) #2", "mgr-competitive"]


# --- writing ---------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_is_replaced_only_when_complete(make, few, monkeypatch, tmp_path):
    report.write_diagnosis(tmp_path, [make.fabricate("mgr", 1, 2)])
    (tmp_path / "mine.txt").write_text("kept")
    before = files(tmp_path)
    assert "gates.png" in before

    with monkeypatch.context() as patch:
        # The last figure: all others are drawn by then.
        patch.setattr(figures.MixingFigure, "render", lambda self, runs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report.write_diagnosis(tmp_path, [make.fabricate("prenorm", 1)])
    assert files(tmp_path) == before

    write = report.write_atomically

    def full(path, data):
        if path.name == "report.html":
            raise RunError("the disk is full")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_atomically", full)
        with pytest.raises(RunError, match="full"):
            report.write_diagnosis(tmp_path, [make.fabricate("prenorm", 1)])
    assert files(tmp_path) == before

    titles = []
    report.write_diagnosis(tmp_path, [make.fabricate("prenorm", 1)], titles.append)
    after = files(tmp_path)
    # What the new report does not have is gone; what is not ours stays.
    assert "gates.png" not in after and after["mine.txt"] == b"kept"
    assert after["outputs.png"] != before["outputs.png"] and len(titles) == len(after) - 2
    assert not [name for name in after if name.startswith(".")]


def test_folders_that_cannot_be_written(make, few, tmp_path):
    with pytest.raises(UserError, match="no diagnosis"):
        report.write_diagnosis(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the report"):
        report.write_diagnosis(tmp_path / "file" / "inside", [make.fabricate("prenorm", 1)])


# --- in a browser ----------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, style = e => frame.contentWindow.getComputedStyle(e);
    const text = page.querySelector("svg");
    return {
      width: frame.contentWindow.innerWidth,
      scroll: Math.max(page.documentElement.scrollWidth, page.body.scrollWidth),
      tables: [...page.querySelectorAll(".wide")].map(e => [e.scrollWidth, e.clientWidth, style(e).overflowX]),
      drawings: [...page.querySelectorAll(".drawing svg")].map(
        e => [e.getBoundingClientRect().width, e.viewBox.baseVal.width, e.getBoundingClientRect().height]),
      images: [...page.querySelectorAll("svg image")].map(e => e.getBoundingClientRect().width),
      copies: [...page.querySelectorAll("img")].map(e => e.naturalWidth),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name)
        .filter(name => !name.startsWith("data:")),
      dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
      ink: style(text).color, body: style(page.body).color, ground: style(page.body).backgroundColor,
      drawn: style(page.querySelector("svg [style*=currentColor]")).stroke,
    };
  });
  document.body.innerHTML = "";
  const shown = document.createElement("pre");
  shown.textContent = "FOUND" + JSON.stringify(found) + "END";
  document.body.append(shown);
});
</script>"""
RULES = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STRICT = f'<meta http-equiv="Content-Security-Policy" content="{RULES}">'


def opened(path, tmp_path, *options):
    """What a browser finds in the page at 390 and at 1200 pixels."""
    source = path.read_text().replace("<head>", "<head>" + STRICT)
    # Every picture of a drawing also as an element that knows whether it was decoded.
    copies = "".join(f'<img src="{picture}" width="1">' for picture in Page(path).pictures)
    source = html.escape(source.replace("</body>", f"<div>{copies}</div></body>"), quote=True)
    frames = "".join(
        f'<iframe width="{w}" height="900" frameborder="0" srcdoc="{source}"></iframe>' for w in (390, 1200)
    )
    (tmp_path / "outer.html").write_text(f"<!DOCTYPE html><html><body>{frames}{PROBE}</body></html>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", *options, "--dump-dom",
               (tmp_path / "outer.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    return json.loads(html.unescape(re.search(r"<pre>FOUND(.*?)END</pre>", dom, re.DOTALL)[1]))


def luminance(colour):
    channels = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(folder, tmp_path, dark):
    options = ["--force-dark-mode"] if dark else []
    phone, wide = opened(folder / "report.html", tmp_path, *options)
    assert (phone["width"], wide["width"]) == (390, 1200)
    for found in (phone, wide):
        assert found["requests"] == []
        assert found["copies"] and min(found["copies"]) > 0 and min(found["images"]) > 0
        # Nothing is wider than the page: what is wide scrolls by itself.
        assert found["scroll"] == found["width"]
        assert {overflow for *_, overflow in found["tables"]} == {"auto"}
        assert len(found["drawings"]) == len(KEYS)
        for width, points, height in found["drawings"]:
            # Letters of 8.5 points in the drawing are at least 7.5 pixels high on the screen.
            assert height > 50 and width / points > 0.9
        assert found["dark"] is dark
        light, ground = luminance(found["body"]), luminance(found["ground"])
        assert (light > ground) is dark
        assert (max(light, ground) + 0.05) / (min(light, ground) + 0.05) > 7
        assert found["ink"] == found["drawn"] == found["body"]
    assert any(scroll > client for scroll, client, _ in phone["tables"])
