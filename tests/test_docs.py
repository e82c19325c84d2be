"""The pages under docs: their code runs, their links lead somewhere, their figures are those of the files."""

import collections
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from depthmix import available_residuals
from depthmix.residuals import residual_options

sys.path.insert(0, str(Path(__file__).parent))

import warm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(page, first):
    """Cells of every table row that begins with ``first``, without the first."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


# huggingface.md needs folders made by its commands: tests/hf/test_docs.py runs it.
BLOCKS = [
    (page.name, code)
    for page in PAGES
    if page.name != "huggingface.md"
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
]
HEAVY = re.compile(r"^import (transformers|timm)", re.M)
"""Such code is run by tests/hf/vision/test_pages.py."""
CODE = [(name, code) for name, code in BLOCKS if not HEAVY.search(code)]


@pytest.mark.parametrize("page, code", CODE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CODE)])
def test_python(page, code, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    ran = warm.run(["-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_connection_and_option_is_described():
    page = text("connections.md")
    for name in available_residuals():
        assert len(rows(page, f"`{name}`")) >= 1, name
        for option in residual_options(name):
            assert f"`{option}`" in page, (name, option)


def test_costs_are_those_of_the_files():
    page = text("connections.md")
    measured = json.loads((ROOT / "benchmarks/results/connections-cpu.json").read_text())
    assert [preset["preset"] for preset in measured["presets"]] == ["quick"]
    for row in measured["presets"][0]["rows"]:
        (cells,) = [cells for cells in rows(page, f"`{row['residual']}`") if cells[0].startswith("×")]
        share = 100 * row["connection_parameters"] / row["parameters"]
        assert cells == [
            f"× {row['ratio']:.2f}",
            f"{row['parameters']:,}",
            f"{share:.1f} %",
            f"{row['saved_bytes_per_token']:,}",
        ]
    without = json.loads((ROOT / "benchmarks/results/connections-cpu-torch.json").read_text())
    assert without["machine"]["cpu_kernels"] == "off: DEPTHMIX_NATIVE=0"
    ratios = ["{ratio:.2f}".format(**row) for row in without["presets"][0]["rows"][1:]]
    assert "Without kernels the three take {}, {} and {} times".format(*ratios) in " ".join(page.split())
    for row in json.loads((ROOT / "benchmarks/results/peer-modules-cpu.json").read_text())["rows"]:
        size = "{} × {} × {}".format(*row["size"])
        package = f"{row['package']}, `{row['module']}`"
        assert [package, size, f"{row['ms']:.1f}", f"{row['their_ms']:.1f}", f"{row['ratio']:.2f}"] in rows(
            page, f"`{row['pair']}`"
        )


@pytest.fixture(scope="module")
def depth_sweep():
    """``depth.json``, and its cells by connection and depth, one a seed."""
    data = json.loads((ROOT / "results/depth/depth.json").read_text())
    cells: dict[tuple[str, int], list[dict]] = {}
    for cell in data["cells"]:
        assert cell["status"] == "finished"
        cells.setdefault((cell["label"], cell["sublayers"]), []).append(cell)
    assert {len(seeds) for seeds in cells.values()} == {data["seeds"]}
    return data, cells


def of_seeds(seeds, words, all_of="{}", some_of="{} {} of {}"):
    """``words`` of the verdicts of a connection's seeds, with how many where they differ."""
    counts = collections.Counter(cell["verdict"] for cell in seeds)
    return ", ".join(
        all_of.format(word)
        if counts[verdict] == len(seeds)
        else some_of.format(word, counts[verdict], len(seeds))
        for verdict, word in words.items()
        if counts[verdict]
    )


def initial_share(label, seeds, depth):
    """What is left of the embedding along one stream behind ``depth`` sublayers at the start; ``None``: not convex."""
    gate = seeds[0].get("gate")
    if gate:
        return (1 - gate["initial_beta"]) ** gate["lerp"]
    if label.startswith(("review-convex", "highway")) and label != "highway-additive":
        low, high = seeds[0]["initial_bias"]["gate_bias"]
        assert low == high
        return (1 - 1 / (1 + math.exp(-low))) ** depth
    return None


def test_depth_tables_are_those_of_the_file(depth_sweep):
    page = text("depth.md")
    data, cells = depth_sweep
    (header,) = [line for line in page.splitlines() if re.fullmatch(r"\| connection( \| \d+)+ \|", line)]
    depths = [int(word) for word in re.findall(r"\d+", header)]
    assert depths == data["sublayers"]
    for label in data["residuals"]:
        losses, *shares = rows(page, f"`{label}`")
        found = [cells[label, depth] for depth in depths]
        for shown, seeds in zip(losses, found, strict=True):
            marks = of_seeds(seeds, {"slow": "~", "stalled": "=", "diverged": "^"})
            assert shown == f"{statistics.fmean(c['train_loss'] for c in seeds):.3f} {marks}".strip()
        left = [initial_share(label, seeds, depth) for seeds, depth in zip(found, depths, strict=True)]
        assert len(shares) == (left[0] is not None)
        for line in shares:
            assert line[0::3] == [f"{share:.1g}" for share in left]
            assert line[1::3] == [
                f"{statistics.fmean(c['gradient_first']['median'] for c in seeds):.1g}" for seeds in found
            ]
            verdicts = {verdict: verdict for verdict in ("learns", "slow", "stalled", "diverged")}
            assert line[2::3] == [of_seeds(seeds, verdicts, some_of="{} {}") for seeds in found]
    assert f"{data['unigram_loss']:.3f}" in page


def test_findings_of_the_depth_sweep(depth_sweep):
    """What the page says of shares, of biases and of who is ahead, by differences to PreNorm seed by seed."""
    page = " ".join(text("depth.md").split())
    data, cells = depth_sweep
    base = {(c["sublayers"], c["seed"]): c["train_loss"] for c in data["cells"] if c["label"] == "prenorm"}
    behind, errors, learning = {}, [], set()
    for (label, depth), seeds in cells.items():
        differences = [c["train_loss"] - base[depth, c["seed"]] for c in seeds]
        behind[label, depth] = statistics.fmean(differences)
        verdicts = {c["verdict"] for c in seeds}
        if verdicts == {"learns"}:
            learning.add((label, depth))
            if label != "prenorm":
                errors.append(statistics.stdev(differences) / math.sqrt(len(seeds)))
        share = initial_share(label, seeds, depth)
        if share is not None and share >= 0.1:
            assert verdicts == {"learns"} and -0.111 < behind[label, depth] < 0.03
        if share is not None and share < 1.5e-4:  # to one digit, as the table has it
            assert "learns" not in verdicts
    assert (
        "0.03 behind PreNorm at most and 0.11 ahead of it at best, and in none once it is 1e-4 or less"
        in page
    )
    assert (
        f"standard error of {statistics.median(errors):.3f} in the median and of {max(errors):.2f} at most"
        in page
    )
    for depth in (32, 64, 96):
        assert behind["review-convex:bias=-3.0", depth] < 0 > behind["review-convex:bias=-4.0", depth]
    two = {depth: behind["review-convex:bias=-2.0", depth] for depth in (32, 64, 96)}
    assert two[32] < 0 and f"at 32 sublayers, {two[64]:.2f} behind it at 64 and does not learn at 96" in page
    assert "learns" not in {c["verdict"] for c in cells["review-convex:bias=-2.0", 96]}
    deepest = {label: -behind[label, 96] for label, depth in learning if depth == 96}
    assert min(deepest.values()) > -0.001
    ahead = {
        "0.11": ["review-convex:bias=-4.0"],
        "0.08": ["siamese", "highway", "hc-static", "review-convex:bias=-3.0"],
        "0.07": ["denseformer", "hc"],
        "0.05": ["attnres-block"],
        "0.02": ["mgr-competitive", "mgr-independent"],
    }
    for shown, labels in ahead.items():
        assert {f"{deepest[label]:.2f}" for label in labels} == {shown}, labels
    for depth, best, shown in (
        (64, "review-convex:bias=-3.0", ".07"),
        (96, "review-convex:bias=-4.0", ".11"),
    ):
        assert min(behind[label, d] for label, d in behind if d == depth) == behind[best, depth]
        assert f"{-behind[best, depth]:.2f}".removeprefix("0") == shown
    assert f"{behind['mgr-independent:bias=-1.0', 16]:.2f}" == "0.07"
    assert f"{behind['mgr-competitive:bias=0.0', 32]:.2f}" == "0.36"
    # The third seed's last batches: what does not see its input ends at one loss there, another elsewhere.
    blind = {"review-convex", "highway:bias=0.0", "mgr-independent:bias=0.0"}
    for seed, loss in ((0, 3.185), (1, 3.185), (2, 3.093)):
        ends = [c["train_loss"] for label in blind for c in cells[label, 96] if c["seed"] == seed]
        assert all(abs(end - loss) < 0.001 for end in ends) and f"at {loss}" in page


def test_the_comparison_is_that_of_the_file():
    page = text("connections.md")
    measured = json.loads((ROOT / "results/compare-all-quick.json").read_text())["residuals"]
    assert {row["residual"] for row in measured} == set(available_residuals())
    for row in measured:
        difference = row["val_loss_difference"]
        shown = "–" if difference is None else f"{difference:+.4f}"
        assert [f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}", shown] in rows(
            page, f"`{row['residual']}`"
        )


def test_saved_bytes_are_those_of_the_file():
    page = text("memory.md")
    kept = json.loads((ROOT / "benchmarks/results/stream-memory.json").read_text())
    assert kept["preset"] == "M"
    for precision, column in (("fp32", 0), ("autocast", 1), ("bf16", 2)):
        for row in (row for row in kept["rows"] if row["precision"] == precision):
            name = f"`{row['residual']}`"
            name += f", n = {row['n_streams']}" if "n_streams" in row else ""
            name += f", {row['stream_memory']}" if "stream_memory" in row else ""
            ((*cells,),) = rows(page, name)
            assert cells[column] == f"{row['bytes_per_token']:,} ({row['ratio']:.3f})", name


@pytest.mark.parametrize("name", ["ops-cpu", "ops-cpu-avx2"])
def test_times_of_operations_are_those_of_the_file(name):
    page = text("bench.md")
    record = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert record["command"] in " ".join(page.split())
    for problem in record["problems"]:
        (row,) = (row for row in problem["rows"] if row["candidate"] == "depthmix")
        both, found = row["modes"]["both"], rows(page, f"`{problem['case']}:{problem['variant']}`")
        assert row["status"] == "timed"
        over = [
            f"{both['over'][k]:.3f}" if k in both["over"] else "–"
            for k in ("eager", "compile", "depthmix:torch")
        ]
        n = "–" if problem["n"] is None else str(problem["n"])
        assert [n, f"{both['ms']:.1f}", f"{both['copies']:.1f}", *over] in found


def test_what_shorter_vectors_gain_is_that_of_the_files():
    took = {}
    for name in ("ops-cpu-avx2", "ops-cpu-avx2-before"):
        for problem in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["problems"]:
            (row,) = (row for row in problem["rows"] if row["candidate"] == "depthmix")
            took.setdefault(problem["case"], []).append(row["modes"]["both"]["ms"])
    gains = {
        case: sorted(
            before / after for after, before in zip(ms[: len(ms) // 2], ms[len(ms) // 2 :], strict=True)
        )
        for case, ms in took.items()
    }
    step, window, gate = (gains[case] for case in ("mgr-step", "mgr-step-window", "channel-gate"))
    pools = sorted(gains["pool"] + gains["attnres-block-two-phase"])
    assert (
        f"{step[0]:.1f} to {step[-1]:.1f} times as long for a step, {window[0]:.1f} times for the window, "
        f"{pools[0]:.1f} to {pools[-1]:.1f} times for pools and {gate[0]:.1f} to {gate[-1]:.1f} times for channel gates"
    ) in " ".join(text("bench.md").split())


def test_the_watched_run_is_that_of_its_files():
    import io

    from PIL import Image, ImageChops
    from rich.console import Console

    from depthmix import health, watch

    page, folder = text("watch.md"), ROOT / "results/watch/quick-mgr"
    view = watch.View([watch.Followed(folder)])
    view.look()
    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None, legacy_windows=False)
    console.print(view)
    (screen,) = re.findall(r"```text\n(.*?)```", page, re.S)
    shown = console.file.getvalue()
    assert [line.rstrip() for line in shown.splitlines()] == screen.splitlines()
    lines = [json.loads(line) for line in (folder / "depth.jsonl").read_text().splitlines()]
    drawn = Image.open(io.BytesIO(health.images(lines)["depth/gate_mean over time"].png)).convert("RGB")
    kept = Image.open(ROOT / "docs/img/watch-gates.png").convert("RGB")
    # The map itself: letters are the drawing library's.
    inside = (28, 30, 508, 350)
    assert ImageChops.difference(drawn.crop(inside), kept.crop(inside)).getbbox() is None


def test_the_cost_of_watching_is_that_of_the_file():
    page = text("watch.md")
    measured = json.loads((ROOT / "benchmarks/results/watch-cost-cpu.json").read_text())
    assert (measured["preset"], measured["eval_interval"]) == ("quick", 60)
    assert [row["residual"] for row in measured["rows"]] == ["prenorm", "mgr-competitive"]
    for row in measured["rows"]:
        pairs = f"× {row['ratio']:.3f} ({row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f})"
        cells = [f"{row['share']:.2%}", f"{row['ms_per_evaluation']:.0f} ms", pairs]
        assert rows(page, f"`{row['residual']}`") == [cells]
        assert row["largest_share"] < 0.02


def diagnosis_tables():
    """The tables of docs/diagnostics.md, made from the stored arrays."""
    from depthmix.diagnostics.arrays import Diagnosis
    from depthmix.report.diagnosis import summary

    folder = ROOT / "results" / "diagnosis"
    names = "prenorm", "attnres", "mgr-independent", "mgr-competitive"
    found = [Diagnosis.load(folder / "quick" / f"{name}-s0.npz") for name in names]
    numbers = [summary(one) for one in found]

    def line(title, cells):
        return f"| {title} | " + " | ".join(cells) + " |"

    def block(n, which):
        return "block {} (+{:.4f} ± {:.4f})".format(
            *(n[f"{which}_important_{k}"] for k in ("block", "delta", "error"))
        )

    quick = [
        line("", [f"`{name}`" for name in names]),
        "|---" * (1 + len(names)) + "|",
        line("mean loss, nats", [f"{n['base_loss']:.4f}" for n in numbers]),
        line("most important block, nats", [block(n, "most") for n in numbers]),
        line("least important block, nats", [block(n, "least") for n in numbers]),
        line(
            "RMS behind block 0 and block 15",
            ["{:.3f}, {:.3f}".format(*f["output_rms"][[0, -1]]) for f in found],
        ),
        line(
            "gradient RMS, block 0 over block 15",
            ["{:.1f}".format(f["gradient_rms"][0] / f["gradient_rms"][-1]) for f in found],
        ),
        line("largest activation", [f"{n['largest_hidden']:.2f}" for n in numbers]),
        line("over the median there", [f"{n['largest_hidden_to_median']:.0f}" for n in numbers]),
        line(
            "smallest angular distance of a block",
            [f"{n['closest_distance']:.4f}, block {n['closest_block']}" for n in numbers],
        ),
        line(
            "mean and largest gate",
            [
                "–" if n["gate_mean"] is None else f"{n['gate_mean']:.4f}, {n['gate_largest']:.4f}"
                for n in numbers
            ],
        ),
        line(
            "distance of the stillest stream",
            [
                "–"
                if n["static_streams"] is None
                else "{:.3f}, stream {}".format(min(f["static_score"]), f["static_score"].argmin())
                for n, f in zip(numbers, found, strict=True)
            ],
        ),
    ]
    smol = Diagnosis.load(folder / "smollm2-135m.npz")
    blocks = [0, 1, 2, 5, 9, 10, 11, 15, 20, 25, 27, 28, 29]
    rows = [
        "| block | median | largest | channel | position | over the median | removal, nats | angular distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for b in blocks:
        s = 2 * b + 1
        largest, median = smol["top_hidden"][s, 0], smol["median_hidden"][s]
        rows.append(
            f"| {b} | {median:.2f} | {largest:,.0f} | {smol['top_hidden_channel'][s, 0]} | "
            f"{smol['top_hidden_position'][s, 0]} | {largest / median:,.0f} | {smol['removal_delta'][b]:.3f} ± "
            f"{smol['removal_se'][b]:.3f} | {smol['angular_distance'][0, b, b + 1]:.3f} |"
        )
    return {"quick": "\n".join(quick), "smollm2": "\n".join(rows)}


def test_diagnoses_are_those_of_the_files():
    page = text("diagnostics.md")
    for table in diagnosis_tables().values():
        assert table in page


def test_cost_of_a_diagnosis_is_that_of_the_file():
    page = " ".join(text("diagnostics.md").split())
    xs, large = json.loads((ROOT / "results/diagnosis/cost.json").read_text())["runs"]
    seconds = {part: round(value) for part, value in xs["seconds"].items()}
    assert f"takes {xs['wall_seconds']} seconds: {seconds['activations']} for the pass" in page
    assert f"{seconds['removal']} for block removal on {xs['removal_texts']} of them" in page
    assert f"{seconds['gradients']} for gradients on {xs['gradient_texts']}" in page
    assert f"needs {large['peak_resident_gib']} GiB" in page


# --- tutorial.md ----------------------------------------------------------------------------------


def test_importing_loads_nothing_heavy():
    """Nor does building a model and running it; in an interpreter of its own."""
    heavy = ("triton", "transformers", "matplotlib", "tensorboard", "datasets", "lm_eval", "timm")
    code = f"""
import sys, torch
before = set(sys.modules)
import depthmix
for name in depthmix.__all__:
    getattr(depthmix, name)
depthmix.GPT(depthmix.GPTConfig(16, 2, 16, 2, 8))(torch.zeros(1, 8).long())
depthmix.wrap([torch.nn.Linear(8, 8)])
print([name for name in {heavy!r} if name in set(sys.modules) - before])
"""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


# --- drop-in.md -----------------------------------------------------------------------------------


def start_table():
    """The table of docs/drop-in.md, made from the stored numbers."""
    measured = json.loads((ROOT / "results/pretrained-start.json").read_text())
    lines = ["| connection | `prenorm` | `prenorm-scaled` | `own` |", "|---|---|---|---|"]
    for row in measured["rows"]:
        cells = [
            "–" if "refused" in row[start] else "{loss:.4f}, {largest_difference:.0e}".format(**row[start])
            for start in ("prenorm", "prenorm-scaled", "own")
        ]
        if cells != ["–"] * 3:
            lines.append(
                f"| `{row['residual']}` | {' | '.join(cells)} |".replace("e+00", "").replace("e-0", "e-")
            )
    return measured, "\n".join(lines)


def test_starts_of_a_trained_model_are_those_of_the_file():
    page = text("drop-in.md")
    measured, table = start_table()
    assert table in page
    assert f"the model's own loss is {measured['loss']:.4f}" in " ".join(page.split())
    assert (measured["tokens"], measured["n_streams"]) == (256, 4)
    for row in measured["rows"]:
        for start in ("prenorm", "prenorm-scaled"):
            assert "refused" in row[start] or row[start]["largest_difference"] < 1e-4


# --- huggingface.md -------------------------------------------------------------------------------


def test_cost_of_decoding_is_that_of_the_file():
    page = text("huggingface.md")
    measured = json.loads((ROOT / "benchmarks/results/decode-cpu.json").read_text())
    assert (measured["preset"], measured["prefix"]) == ("S", 512) and f"of {measured['rounds']} turns" in page
    for row in measured["rows"][1:]:
        low, high = row["cpu_ratio_quartiles"]
        cells = [f"{row['cpu_ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
        assert rows(page, f"`{row['residual']}`") == [cells]


# --- parallel.md ----------------------------------------------------------------------------------


def test_exactness_is_that_of_the_file():
    words = " ".join(text("parallel.md").split())
    found = json.loads((ROOT / "results/parallel/exactness.json").read_text())["connections"]
    others = [off for name, one in found.items() if name != "mhc-lite" for off in one["plans"].values()]
    loss, weights = (max(off[key] for off in others) for key in ("loss", "weights"))
    assert (
        f"by at most {loss:.1e} relative and all weights behind them by {weights:.1e}".replace("e-0", "e-")
        in words
    )
    lite = found["mhc-lite"]
    worst = max(off["weights"] for off in lite["plans"].values())
    assert f"weights differ by more, {worst:.1e}".replace("e-0", "e-") in words
    assert f"differs from itself by {lite['rounding']['weights']:.1e}".replace("e-0", "e-") in words


def test_speed_of_many_processes_is_that_of_the_file():
    words = " ".join(text("parallel.md").split())
    found = json.loads((ROOT / "benchmarks/results/parallel-speed-cpu.json").read_text())
    names = "prenorm", "mgr-competitive"
    for size in {key.partition(" ")[0] for key in found["data_parallel"]}:
        ratios = [found["data_parallel"][f"{size} {name}"]["ratio"] for name in names]
        assert "same batch, `{}` | {:.2f} | {:.2f} |".format(size, *ratios) in words
    for size in ("quick", "xs"):
        for name in names:
            assert f"{100 * (found['fsdp_overhead'][f'{size} {name}']['ratio'] - 1):.1f} %" in words
    assert f"{found['loader']['ratio']:,.0f} times" in words
    for label in ("dp=2", "fsdp=2", "dp=2 against one process"):
        assert f"{found['muon'][label]['ratio']:.2f}" in words
    kept = json.loads((ROOT / "benchmarks/results/checkpoint-async-cpu.json").read_text())
    assert f"for {100 * kept['ratio']:.0f} % of the time that writing takes" in words


def test_errors_of_the_cost_model_are_those_of_the_file():
    page = text("parallel-plan.md")
    found = json.loads((ROOT / "results/parallel/plan-validation.json").read_text())
    for plan in found["plans"]:
        cells = [plan["plan"], str(len(plan["runs"]))]
        for kind in ("processor", "clock"):
            errors = [run[kind]["error"] for run in plan["runs"]]
            cells += [
                f"{100 * statistics.median(map(abs, errors)):.0f} %",
                f"{100 * max(errors, key=abs):+.0f} %",
            ]
        assert f"| {' | '.join(cells)} |" in page
    summary = found["summary"]
    words = " ".join(page.split())
    for kind in ("processor", "clock"):
        assert f"**{100 * summary[kind]['median_error']:.1f} %** of the {kind}" in words
    ratios = [100 * summary[kind]["median_error_of_ratio_to_prenorm"] for kind in ("processor", "clock")]
    assert "of ratios to PreNorm {:.1f} % and {:.1f} %".format(*ratios) in words


def test_counts_of_communication_are_those_of_the_file():
    cases = json.loads((ROOT / "results/parallel/comm.json").read_text())["cases"]
    assert all(case["equal"] for case in cases)
    figures = sum(len(case["traffic"]) for case in cases)
    assert f"{figures:,} figures of {len(cases)} runs" in " ".join(text("parallel-communication.md").split())
    wide = json.loads((ROOT / "results/parallel/comm-wide.json").read_text())["cases"]
    for case in wide:
        carried, rings = case["socket_bytes_of_all_processes"], case["ring_bytes_of_all_processes"]
        cells = [f"`{case['parallel']}`", f"{carried:,}", f"{carried / rings:.3f}"]
        assert f"| {' | '.join(cells)} |" in text("parallel-communication.md")


def test_faults_are_those_of_the_file():
    """The table of docs/parallel-faults.md is that of its file."""
    page = (ROOT / "docs/parallel-faults.md").read_text(encoding="utf-8")
    data = json.loads((ROOT / "results/parallel/faults.json").read_text())
    found, kinds = data["summary"], data["summary"]["by_kind"]
    interval = data["setting"]["checkpoint_interval"]
    assert found["faults"] == sum(kind["faults"] for kind in kinds.values())
    assert f"{found['faults']} faults at random moments" in page
    counts = {name: kind["faults"] for name, kind in kinds.items()}
    assert (
        f"{counts['kill'] + counts['kill in save']} kills, {counts['kill in save']} of them inside a save, "
        f"{counts['stall']} stalls, {counts['no room']} full disks, {counts['nan']} NaNs, {counts['terminate']} signals"
    ) in page
    assert f"| jobs that hung | {found['hangs']} |" in page
    assert (
        f"metrics or weights than undisturbed ones | {found['jobs_with_other_metrics_or_weights']} of {found['jobs']} |"
        in page
    )
    windows = found["windows_skipped"] + found["windows_out_of_order"]
    assert f"read twice or skipped | {windows} |" in page
    assert f"| checkpoints damaged | {found['checkpoints_damaged']} |" in page
    assert found["steps_lost_max"] == interval and f"at most | {interval}: one checkpoint interval |" in page
    assert (
        f"the right one | {found['ranks_wrong']}, of {found['ranks_that_told']} that said something |" in page
    )
    assert f"| ranks that said nothing | {found['ranks_silent']} |" in page
    ends = {name: kind["seconds_to_end_max"] for name, kind in kinds.items()}
    stall = math.ceil(ends.pop("stall"))
    assert f"at most | {stall} after a stall" in page and f"else {math.ceil(max(ends.values()))} |" in page


def test_the_time_of_an_import_is_that_of_the_file():
    measured = json.loads((ROOT / "benchmarks/results/import-time.json").read_text())["rows"]
    beyond = {row["kind"]: row["clock"].get("beyond") for row in measured}
    assert f"{beyond['depthmix']:.2f} s beyond torch's own import, {beyond['names']:.2f} s" in text(
        "tutorial.md"
    )
