"""``depthmix bench``: nothing wrong is timed, floors are those counted by hand, records can be gone on with."""

import dataclasses
import gc
import json
import os
import sys
import types
import weakref

import pytest
import torch

from depthmix import GPT, cli, functional
from depthmix.bench import cases as _cases  # noqa: F401  registers them
from depthmix.bench import command, floor, machine, peers, report, runner, steps
from depthmix.bench.case import CASES, DTYPES, Adapted, Peer, Size
from depthmix.config import GPTConfig
from depthmix.info import forward_flops
from depthmix.presets import PRESETS

SHORT = ("--rounds", "2", "--threads", "1", "--device", "cpu")
TINY = ("--n", "3", "--width", "5", "--tokens", "7", *SHORT)
NO_COMPILER = ("--against", "peers")
ALL = [
    (name, variant, dtype)
    for name, case in CASES.items()
    for variant in case.variants
    for dtype in case.dtypes
]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 16)


def size(dtype="fp32", n=3, width=5, tokens=7):
    axes = {axis: value for axis, value in (("n", n), ("width", width)) if value is not None}
    return Size(torch.device("cpu"), DTYPES[dtype], axes, tokens)


def measure(problem, **options):
    defaults = dict(kernels=("auto",), against=(), rounds=1, flush=False, copy_bytes=2**12)
    record = runner.measure(problem, torch.device("cpu"), **(defaults | options))
    return {row["candidate"]: row for row in record["rows"]}


def run(*arguments, out=None):
    """Operations at a tiny size; models have that of ``tiny_preset`` or say another."""
    few = SHORT if arguments[0] in steps.STEP_CASES or ":batch" in arguments[0] else TINY
    return cli.main(["bench", *arguments, *few, *(["--out", str(out)] if out else [])])


# --- every case -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant, dtype", ALL)
def test_every_case_is_right(name, variant, dtype):
    """In every dtype and at odd sizes; so the reference, the rule and the floors fit together."""
    case = CASES[name]
    axes = case.variants[variant]
    problem = case.build(size(dtype, n=3 if "n" in axes else None), variant)
    rows = measure(problem, kernels=("auto", "torch"))
    assert {key: row["status"] for key, row in rows.items()} == {
        "eager": "timed",
        "depthmix": "timed",
        "depthmix:torch": "timed",
    }, rows
    assert set(problem.floor) == set(runner.MODES)


@pytest.mark.parametrize("name", ["mgr-step", "pool"])
def test_one_stream_and_one_token(name):
    variant = "streams" if name == "pool" else "independent"
    rows = measure(CASES[name].build(size(n=1 if name == "mgr-step" else 2, width=1, tokens=1), variant))
    assert rows["depthmix"]["status"] == "timed"


def test_chunks_do_not_change_the_truth(monkeypatch):
    problem = CASES["mgr-step"].build(size(), "competitive")
    upstream = runner.upstream_gradients(problem)
    whole = runner.truth(problem, upstream)
    monkeypatch.setattr(runner, "CHUNK_ELEMENTS", 2 * 3 * 5)
    parts = runner.truth(problem, upstream)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-13, atol=1e-14)


# --- what is wrong gets no time ---------------------------------------------------------------


def spoil(problem, change):
    """The problem with a function whose outputs went through ``change(name, y)``."""
    right = problem.function
    problem.function = lambda x: {name: change(name, y) for name, y in right(x).items()}
    return problem


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def last_token(y, value):
    y = y.clone()
    y[-1] = value
    return y


@pytest.mark.parametrize(
    "change, tensor",
    [
        (lambda name, y: y * 1.00001 if name == "h" else y, "h"),
        (lambda name, y: last_token(y, 0.0) if name == "h" else y, "h"),
        (lambda name, y: last_token(y, float("nan")) if name == "new_streams" else y, "new_streams"),
        (lambda name, y: Scaled.apply(y), "d "),
        (lambda name, y: y[:-1] if name == "h" else y, "h"),
    ],
    ids=["slightly off", "last token", "nan", "gradient", "shape"],
)
def test_wrong_results_are_not_timed(change, tensor):
    problem = spoil(CASES["mgr-step"].build(size(), "competitive"), change)
    rows = measure(problem)
    row = rows["depthmix"]
    assert row["status"] in ("wrong", "failed") and "modes" not in row and row["reason"]
    if row["status"] == "wrong":
        assert row["error"]["value"] > row["error"]["allowed"]
        assert row["error"]["tensor"].startswith(tensor) or "d " in row["error"]["tensor"]
    assert rows["eager"]["status"] == "timed"
    assert "depthmix" not in rows["eager"]["modes"]["both"]["over"]


def test_a_token_left_out_of_a_parameter_gradient_is_found():
    """The floor of sums must not hide it: one of 4096 tokens."""
    problem = CASES["pool"].build(size(n=2, width=3, tokens=4096), "streams")

    def reference(x):
        h = problem.reference(x)["h"]
        without = x | {"weight": x["weight"].detach()}
        return {"h": torch.cat([h[:-1], problem.reference(without)["h"][-1:]])}

    problem.function = reference
    row = measure(problem)["depthmix"]
    assert row["status"] == "wrong" and row["error"]["tensor"] == "d weight"


def test_wrong_depthmix_is_the_exit_status(monkeypatch, capsys, tmp_path):
    right = functional.multi_gate_residual

    def off(*args, **kwargs):
        h, streams = right(*args, **kwargs)
        return h * 1.01, streams

    monkeypatch.setattr(functional, "multi_gate_residual", off)
    assert run("mgr-step:competitive", "--against", out=tmp_path / "a.json") == 1
    said = capsys.readouterr().out
    assert "depthmix: WRONG (h: error" in said and "eager" in said
    problem = json.loads((tmp_path / "a.json").read_text())["problems"][0]
    assert [row["status"] for row in problem["rows"]] == ["timed", "wrong", "wrong"]
    assert not [row for row in problem["rows"] if row["status"] == "wrong" and "modes" in row]


def test_wrong_peers_and_failing_ones_change_nothing(monkeypatch, capsys):
    problem = CASES["pool"].build(size(), "streams")
    monkeypatch.setattr(runner, "installed_version", lambda package: None if package == "gone" else "1.0")

    def adapted(run):
        return lambda: Adapted(problem.inputs, run)

    def broken():
        raise ImportError("no such kernel\nand more lines")

    problem.peers = [
        Peer("right", "a", adapted(problem.reference)),
        Peer("wrong", "b", adapted(lambda x: {"h": 2 * problem.reference(x)["h"]})),
        Peer("broken", "c", broken),
        Peer("raises", "d", adapted(lambda x: {"h": x["nothing"]})),
        Peer("gone", "gone", broken),
        Peer("elsewhere", "e", broken, device="cuda"),
        Peer("picky", "f", broken, refuses="takes D = 4 only"),
    ]
    rows = measure(problem, against=("peers",))
    found = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert found["right"] == ("timed", None) and rows["right"]["version"] == "1.0"
    assert found["wrong"][0] == "wrong" and found["wrong"][1].startswith("h: error")
    assert found["broken"] == ("failed", "ImportError: no such kernel")
    assert found["raises"][0] == "failed"
    assert found["gone"] == ("not installed", "pip install gone")
    assert found["elsewhere"] == ("cannot run", "on cuda only")
    assert found["picky"] == ("cannot run", "takes D = 4 only")
    assert set(rows["depthmix"]["modes"]["forward"]["over"]) == {"eager", "right"}


def test_without_a_reference_nothing_is_timed(monkeypatch):
    """Where it runs out of memory, say: nobody can be judged then."""
    problem = CASES["pool"].build(size(), "streams")
    right = problem.reference

    def reference(x):
        if x["streams"].dtype != torch.float64 and len(x["streams"]) > 1:
            raise RuntimeError("out of memory")
        return right(x)

    problem.reference = reference
    rows = measure(problem)
    assert rows["eager"]["status"] == "failed" and "out of memory" in rows["eager"]["reason"]
    assert rows["depthmix"]["status"] == "cannot run" and "modes" not in rows["depthmix"]


def test_the_rule():
    exact = {"h": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    for error, status in ((3.9e-3, "waiting"), (4.1e-3, "wrong")):
        candidate = runner.Candidate("c", "peer")
        found = {"h": torch.tensor([1.0, -2.0 - 2 * error], dtype=torch.float64).float()}
        runner.check(candidate, found, exact, {"h": 2e-3})
        assert candidate.status == status, candidate.errors
    assert runner.tolerance_floor(torch.float32) == 2**-20
    assert runner.tolerance_floor(torch.bfloat16) == 2**-20 + 2**-9
    assert runner.tolerance_floor(torch.float32, 16) == 2**-20 + 2**-22
    missing = runner.Candidate("c", "peer")
    runner.check(missing, {}, exact, {"h": 1.0})
    assert missing.status == "wrong"


# --- backends and compilation -----------------------------------------------------------------


def test_backends_are_chosen_by_the_variable(monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", "mine")
    seen = []
    for choice, inside in (("torch", "torch"), ("auto", None), (None, "mine")):
        with runner.using(choice):
            seen.append(os.environ.get("DEPTHMIX_KERNELS"))
        assert seen[-1] == inside and os.environ["DEPTHMIX_KERNELS"] == "mine"
    monkeypatch.delenv("DEPTHMIX_KERNELS")
    with pytest.raises(KeyError), runner.using("native"):
        raise KeyError
    assert "DEPTHMIX_KERNELS" not in os.environ


def test_forward_and_backward_run_under_the_backend():
    problem = CASES["pool"].build(size(), "streams")
    right, seen = problem.function, set()

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.add(("forward", os.environ.get("DEPTHMIX_KERNELS")))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.add(("backward", os.environ.get("DEPTHMIX_KERNELS")))
            return grad

    problem.function = lambda x: {"h": Spy.apply(right(x)["h"])}
    measure(problem, kernels=("auto", "torch"))
    assert seen == {(mode, choice) for mode in ("forward", "backward") for choice in (None, "torch")}


def test_compiled_reference_takes_part(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    problem = CASES["mgr-step"].build(size(), "independent")
    rows = measure(problem, against=("compile",))
    assert compiled == [problem.reference] and rows["compile"]["status"] == "timed"
    assert set(rows["depthmix"]["modes"]["backward"]["over"]) == {"eager", "compile"}


@pytest.mark.slow
def test_compiled_reference_of_a_list():
    """Really compiled: inputs are a dictionary, outputs too."""
    problem = CASES["pool"].build(size(), "sources-8")
    assert measure(problem, against=("compile",))["compile"]["status"] == "timed"


# --- figures ----------------------------------------------------------------------------------


def test_floors_by_hand():
    def counts(floors):
        return [(floors[mode].read, floors[mode].written) for mode in runner.MODES]

    # spec section 6: read n + 1, write n + 1; backward read 2n + 2, write n + 1
    assert counts(floor.step(4)) == [(5, 5), (10, 5), (15, 10)]
    assert counts(floor.step(8)) == [(9, 9), (18, 9), (27, 18)]
    assert counts(floor.pool(25)) == [(25, 1), (26, 25), (51, 26)]
    assert counts(floor.channel_gate()) == [(2, 1), (3, 2), (5, 3)]
    assert counts(floor.sinkhorn()) == [(1, 1), (2, 1), (3, 2)]
    # One step is a step. Two at n = 4: written in between 10 + 10; not written read 5 + 6, write 1 + 5.
    assert counts(floor.window(4, 1)) == counts(floor.step(4))
    assert counts(floor.window(4, 2))[0] == (11, 6)
    # Backward the second step reads one output more.
    assert counts(floor.window(4, 2))[1] == (10 + 11, 10)
    # Of one stream writing it costs as much as reading an output again, or less: no plan beats 8 steps of 2 + 2.
    assert floor.window(1, 8)["forward"].total == 32
    # At n = 8, eight steps: written once in between, behind the fourth.
    assert counts(floor.window(8, 8))[0] == (2 * (9 + 10 + 11 + 12), 8 + 2 * 8)
    # A read (streams in, h out), a step, a write (streams and y in, streams out).
    assert counts(floor.hyper(4, 2))[0] == (4 + 5 + 5, 1 + 5 + 4)
    # 8 sources, 8 reads, two phases: 8 sources, 8 means, 8 outputs, 7 sums in; 8 means, 8 h, 7 sums out.
    assert counts(floor.block(8, 8))[0] == (31, 23)
    # Of one source, reading it again is cheaper than a mean in between.
    assert counts(floor.block(1, 2))[0] == (2 + 3, 3)


def test_bytes_and_shares():
    problem = CASES["mgr-step"].build(size("bf16", n=4, width=6, tokens=10), "competitive")
    record = runner.measure(
        problem, torch.device("cpu"), kernels=("auto",), against=(), rounds=3, flush=False, copy_bytes=2**12
    )
    assert record["floor"]["forward"] == {"read": 5, "written": 5, "bytes": 10 * 10 * 6 * 2}
    assert record["floor"]["both"]["bytes"] == 25 * 10 * 6 * 2
    assert record["copy"]["bytes"] == 10 * 4 * 6 * 2
    assert record["copy"]["far_bytes"] == 2**12 and record["turns"] == 3
    figures = record["rows"][1]["modes"]["both"]
    low, high = figures["quartiles_ms"]
    assert 0 < low <= figures["ms"] <= high


def test_patience_ends_the_turns(monkeypatch):
    problem = CASES["sinkhorn"].build(size(n=2), "mhc")
    options = dict(kernels=("auto",), against=(), flush=False, copy_bytes=2**12)
    device = torch.device("cpu")
    assert runner.measure(problem, device, rounds=9, patience=0.0, **options)["turns"] == runner.FEWEST_TURNS
    assert runner.measure(problem, device, rounds=5, **options)["turns"] == 5
    assert runner.measure(problem, device, rounds=2, patience=0.0, **options)["turns"] == 2


def test_ratios_are_taken_turn_by_turn():
    slow, fast = (runner.Candidate(name, "peer", status="timed") for name in ("slow", "fast"))
    slow.seconds["forward"], fast.seconds["forward"] = [2.0, 30.0, 6.0], [1.0, 10.0, 2.0]
    once = types.SimpleNamespace(size=4, seconds=[0.5, 2.0, 1.0])
    far = types.SimpleNamespace(size=100, seconds=[1.0, 10.0, 2.0])
    figures = runner._figures(slow, "forward", 60, once, far, [slow, fast])
    assert figures["over"] == {"fast": 3.0} and figures["ms"] == 6000
    assert figures["copies"] == 6.0  # of 4, 15 and 6
    # 60 bytes at the bandwidth of a copy (200 bytes in a third of the time) would take a tenth of it.
    assert figures["share_of_copy_bandwidth"] == pytest.approx(0.1)


# --- the verb ---------------------------------------------------------------------------------


def test_record(tmp_path, capsys):
    out = tmp_path / "sub" / "record.json"
    assert run("mgr-step:competitive", "pool:streams", "--dtype", "fp32", "bf16", *NO_COMPILER, out=out) == 0
    record = json.loads(out.read_text())
    assert record["format"] == 1 and record["command"].startswith("depthmix bench mgr-step:competitive")
    assert set(record["machine"]) >= {
        "device",
        "threads",
        "torch",
        "commit",
        "date",
        "cpu_kernels",
        "vectors",
    }
    assert set(record["peers"]) == set(peers.PACKAGES)
    assert [(p["case"], p["dtype"]) for p in record["problems"]] == [
        ("mgr-step", "fp32"),
        ("mgr-step", "bf16"),
        ("pool", "fp32"),
        ("pool", "bf16"),
    ]
    for problem in record["problems"]:
        assert (problem["n"], problem["width"], problem["tokens"]) == (3, 5, 7)
        assert set(problem["copy"]) == {"bytes", "ms", "far_bytes", "bytes_per_second"}
        for row in problem["rows"]:
            assert set(row) >= {"candidate", "kind", "version", "status", "reason"}
            if row["status"] == "timed":
                assert set(row["modes"]) == set(runner.MODES) and row["error"]["value"] >= 0
    said = capsys.readouterr().out
    assert "mgr-step competitive, bf16, n = 3, D = 5, 7 tokens" in said and f"written: {out}" in said


def test_resume_keeps_what_is_there(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    assert run("pool:streams", "--against", out=out) == 0
    first = json.loads(out.read_text())["problems"]
    measured = []
    build = CASES["pool"].build

    def spy(size, variant):
        measured.append((size.dtype, variant))
        return build(size, variant)

    monkeypatch.setitem(CASES, "pool", dataclasses.replace(CASES["pool"], build=spy))
    again = ("pool:streams", "--against", "--resume", "--dtype", "fp32", "bf16")
    assert run(*again, out=out) == 0
    second = json.loads(out.read_text())["problems"]
    assert measured == [(torch.bfloat16, "streams")] and second[0] == first[0] and len(second) == 2
    assert run(*again, out=out) == 0 and len(measured) == 1


def test_resume_on_another_machine_is_refused(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert run("pool:streams", "--against", out=out) == 0
    record = json.loads(out.read_text())
    record["machine"]["device"] = "abacus"
    out.write_text(json.dumps(record))
    capsys.readouterr()
    assert run("pool:streams", "--resume", out=out) == 2
    assert "device = abacus" in capsys.readouterr().err
    assert json.loads(out.read_text()) == record


def test_what_does_not_fit_is_passed_over(tmp_path, monkeypatch, capsys):
    build = CASES["pool"].build

    def large(size, variant):
        if size.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")
        return build(size, variant)

    monkeypatch.setitem(CASES, "pool", dataclasses.replace(CASES["pool"], build=large))
    out = tmp_path / "record.json"
    assert run("pool:streams", "--against", "--dtype", "fp32", "bf16", out=out) == 1
    assert [p["dtype"] for p in json.loads(out.read_text())["problems"]] == ["bf16"]
    assert "out of memory; try fewer --tokens" in " ".join(capsys.readouterr().out.split())


def test_a_stopped_run_leaves_its_problems(tmp_path, monkeypatch):
    def stop(size, variant):
        raise KeyboardInterrupt

    monkeypatch.setitem(CASES, "pool", dataclasses.replace(CASES["pool"], build=stop))
    out = tmp_path / "record.json"
    assert run("sinkhorn", "pool:streams", "--against", out=out) == 130
    assert [p["case"] for p in json.loads(out.read_text())["problems"]] == ["sinkhorn"]


def test_plots_come_from_the_record_alone(tmp_path, capsys):
    out, folder = tmp_path / "record.json", tmp_path / "plots"
    assert run("mgr-step", "pool:streams", "sinkhorn", "--plots", str(folder), *NO_COMPILER, out=out) == 0
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(drawn) == {"bandwidth.png", "ratios.png"}
    assert all(data.startswith(b"\x89PNG") for data in drawn.values())
    again = tmp_path / "again"
    assert cli.main(["bench", "--from", str(out), "--plots", str(again)]) == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == drawn


def test_list(capsys):
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    for name in (*CASES, *steps.STEP_CASES, *peers.PACKAGES):
        assert name in said
    assert "sources-49" in said and "batch-64" in said


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["mgr-stp"], "unknown case 'mgr-stp'. Did you mean 'mgr-step'?"),
        (["pool:stream"], "unknown variant of pool 'stream'. Did you mean 'streams'?"),
        (["--n", "0"], "--n must be between 1 and 64, got 0"),
        (["--n", "65"], "--n must be between 1 and 64, got 65"),
        (["hyper-step", "--n", "1"], "--n must be at least 2 for hyper-step, got 1"),
        (["--width", "0"], "--width must be at least 1, got 0"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--dtype", "bf61"], "unknown --dtype value 'bf61'. Did you mean 'bf16'?"),
        (["--kernels", "cuda"], "Valid: auto, torch, native, triton"),
        (["--against", "everyone"], "Valid: compile, peers"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--preset", "quik"], "Did you mean 'quick'?"),
        (["--residuals", "prenrom"], "Did you mean 'prenorm'?"),
        (["--stream-memory", "repaly"], "Did you mean 'replay'?"),
        (["training-step", "--dtype", "fp16"], "models run in fp32 or bf16"),
        (
            ["training-step", "--width", "48"],
            "--width of models must be a multiple of their heads' 32, got 48",
        ),
        (["training-step", "--layers", "0"], "--layers must be at least 1, got 0"),
        (["--resume"], "give --out FILE"),
        (["--from", "nowhere.json", "--plots", "x"], "cannot read nowhere.json"),
        (["--from", "nowhere.json"], "say where to with --plots DIR"),
        (["--n", "many"], "many"),
    ],
)
def test_wrong_requests(arguments, hint, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert hint in " ".join(said.err.replace("│", " ").split()) and said.out == ""


def test_other_json_is_no_record(tmp_path, capsys):
    path = tmp_path / "x.json"
    for text in ("[]", "{", '{"format": 1}', '{"problems": []}'):
        path.write_text(text)
        assert cli.main(["bench", "--from", str(path), "--plots", str(tmp_path)]) == 2
        assert str(path) in capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_preset(monkeypatch):
    model = GPTConfig(vocab_size=32, n_layer=4, d_model=16, n_head=2, seq_len=16)
    config = dataclasses.replace(PRESETS["quick"], model=model, batch_size=2, micro_batch=0)
    monkeypatch.setitem(PRESETS, "tiny", config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(dtype, tiny_preset, tmp_path, capsys):
    out = tmp_path / "record.json"
    models = ("--preset", "tiny", "--residuals", "mgr-competitive", "attnres")
    options = ("--stream-memory", "store", "replay", "--dtype", dtype)
    assert run("training-step", *models, *options, out=out) == 0
    (problem,) = json.loads(out.read_text())["problems"]
    rows = {row["candidate"]: row for row in problem["rows"]}
    assert list(rows) == ["prenorm", "mgr-competitive, store", "mgr-competitive, replay", "attnres"]
    kept = {name: row["modes"]["step"]["saved_bytes_per_token"] for name, row in rows.items()}
    assert kept["prenorm"] < kept["mgr-competitive, replay"] < kept["mgr-competitive, store"]
    for name, row in rows.items():
        figures = row["modes"]["step"]
        assert row["status"] == "timed" and figures["mfu"] > 0 and figures["peak_memory_bytes"] is None
        assert (name == "prenorm") == ("prenorm" not in figures["over"])
        # Two passes of one sequence make the batch.
        assert figures["ms"] == pytest.approx(2 * figures["ms_per_pass"] + figures["ms_optimizer"], rel=1e-4)
    assert problem["tokens"] == 16 and problem["matrix_flops_per_second"] > 0
    assert "MFU" in capsys.readouterr().out


def test_generation_step(tiny_preset, tmp_path):
    out = tmp_path / "record.json"
    models = ("--preset", "tiny", "--residuals", "mgr-review", "--stream-memory", "store", "replay")
    assert run("generation-step:batch-8", *models, out=out) == 0
    (problem,) = json.loads(out.read_text())["problems"]
    assert (problem["batch"], problem["prefix"]) == (8, 8)
    assert [row["candidate"] for row in problem["rows"]] == ["prenorm", "mgr-review"]
    for row in problem["rows"]:
        figures = row["modes"]["token"]
        assert figures["tokens_per_second"] == pytest.approx(8e3 / figures["ms"], rel=1e-4)


def test_widths_blocks_and_streams_of_models(tiny_preset, tmp_path):
    """Beside the preset's: one record, and what a model is called says what it has."""
    out = tmp_path / "record.json"
    sizes = ("--preset", "tiny", "--layers", "3", "--width", "16", "32", "--n", "2", "4", "--sequences", "1")
    models = ("--residuals", "mgr-independent", "mgr-independent:n_streams=3", "attnres")
    assert run("training-step", *sizes, *models, "--stream-memory", "store", "replay", out=out) == 0
    problems = json.loads(out.read_text())["problems"]
    assert [(p["d_model"], p["n_layer"], p["width"], p["layers"]) for p in problems] == [
        (16, 3, 16, 3), (32, 3, 32, 3),
    ]  # fmt: skip
    for problem in problems:
        rows = {row["candidate"]: row for row in problem["rows"]}
        memories = ("store", "replay")
        assert list(rows) == [
            "prenorm", *(f"mgr-independent:n_streams={n}, {m}" for n in (2, 4, 3) for m in memories), "attnres",
        ]  # fmt: skip
        for n in (2, 3, 4):
            row = rows[f"mgr-independent:n_streams={n}, replay"]
            assert (row["n_streams"], row["stream_memory"], row["residual"]) == (
                n,
                "replay",
                "mgr-independent",
            )
        # Twice as wide in twice as many heads of 8: four times the matrices, twice the embedding.
        model = GPTConfig(32, 3, problem["width"], problem["width"] // 8, 16, residual="prenorm")
        flops = 3 * forward_flops(GPT(model))
        assert rows["prenorm"]["modes"]["step"]["flops_per_token"] == flops
    assert run("generation-step:batch-1", *sizes, *models, out=out) == 0
    (_, narrow), (_, wide) = ((p["prefix"], p) for p in json.loads(out.read_text())["problems"])
    for problem in (narrow, wide):
        assert [row["candidate"] for row in problem["rows"]] == [
            "prenorm", *(f"mgr-independent:n_streams={n}" for n in (2, 4, 3)), "attnres",
        ]  # fmt: skip


def test_models_are_gone_on_with(tiny_preset, monkeypatch, tmp_path, capsys):
    """Stopped in the third model: the first two stay as they were measured; PreNorm is there for the others' turns."""
    out = tmp_path / "record.json"
    words = ("training-step", "--preset", "tiny", "--n", "2", "--residuals", "attnres", "hc", "mgr-review")
    real, held = steps.trainee, []

    def stopping(config, device, kernels=None):
        if config.model.residual == "hc":
            raise KeyboardInterrupt
        return real(config, device, kernels)

    def counting(config, device, kernels=None):
        found = real(config, device, kernels)
        held.append(weakref.ref(found.model))
        gc.collect()
        assert sum(model() is not None for model in held) <= 2
        return found

    monkeypatch.setattr(steps, "trainee", stopping)
    assert run(*words, out=out) == 130
    (before,) = json.loads(out.read_text())["problems"]
    assert before["unfinished"] and [r["candidate"] for r in before["rows"]] == ["prenorm", "attnres"]
    assert "attnres: timed" in capsys.readouterr().out
    monkeypatch.setattr(steps, "trainee", counting)
    assert run(*words, "--resume", out=out) == 0
    (after,) = json.loads(out.read_text())["problems"]
    assert "unfinished" not in after and after["rows"][:2] == before["rows"]
    assert [r["candidate"] for r in after["rows"][2:]] == ["hc:n_streams=2", "mgr-review:n_streams=2, replay"]
    assert all(r["modes"]["step"]["over"]["prenorm"] > 0 for r in after["rows"][1:])
    assert len(held) == 3
    said = capsys.readouterr().out
    assert "hc:n_streams=2: timed" in said and "attnres: timed" not in said
    assert run(*words, "--resume", out=out) == 0 and len(held) == 3


def test_every_model_is_compiled(tiny_preset, monkeypatch, tmp_path):
    """The compiler gives up on one function with its ninth graph, and would leave what comes then uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=backend))
    models = ("mgr-competitive", "mgr-independent", "hc", "mhc")
    words = ("training-step", "--preset", "tiny", "--compile", "--n", "2", "3", "4", "--residuals", *models)
    out = tmp_path / "record.json"
    assert run(*words, out=out) == 0
    (problem,) = json.loads(out.read_text())["problems"]
    assert len(problem["rows"]) == 1 + 3 * 4 and all(row["status"] == "timed" for row in problem["rows"])
    assert len(compiled) >= 13


def test_plots_of_training_steps(tiny_preset, tmp_path, capsys):
    """Two records in one set of figures; the numbers are those of the records."""
    words = (
        "training-step",
        "--preset",
        "tiny",
        "--n",
        "2",
        "3",
        "--residuals",
        "mgr-competitive",
        "attnres",
    )
    outs = [tmp_path / f"{width}.json" for width in (16, 32)]
    for out in outs:
        assert run(*words, "--width", out.stem, out=out) == 0
    problems = [p for out in outs for p in json.loads(out.read_text())["problems"]]
    drawn = {}
    folder = tmp_path / "plots"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report, "_picture", lambda width, height, panels, paint, rows=1: drawing(drawn, panels, paint)
        )
        assert cli.main(["bench", "--from", *map(str, outs), "--plots", str(folder)]) == 0
    overhead, memory = drawn.values()
    (ax,) = overhead
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    for name in ("mgr-competitive:n_streams=2, replay", "attnres"):
        rows = [next(row for row in p["rows"] if row["candidate"] == name) for p in problems]
        over = [row["modes"]["step"]["over"]["prenorm"] for row in rows]
        assert lines[name] == [[16, over[0]], [32, over[1]]]
    for ax, problem in zip(memory, problems, strict=True):
        kept = {r["candidate"]: r["modes"]["step"]["saved_bytes_per_token"] for r in problem["rows"]}
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
        assert lines["mgr-competitive, replay"] == [
            [n, kept[f"mgr-competitive:n_streams={n}, replay"] / kept["prenorm"]] for n in (2, 3)
        ]
        assert {y for _, y in lines["attnres"]} == {kept["attnres"] / kept["prenorm"]}
    assert cli.main(["bench", "--from", *map(str, outs), "--plots", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"overhead.png", "memory.png"}
    # What differs in depth alone, or in both, is in no line with what differs in width.
    deeper = [{**problem, "n_layer": 9} for problem in problems[:1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report, "_picture", lambda width, height, panels, paint, rows=1: drawing(drawn, panels, paint)
        )
        report.draw({"problems": problems + deeper}, folder)
    overhead, memory = [*drawn.values()][-2:]
    assert [ax.get_title() for ax in overhead] == ["4 blocks", "9 blocks"] and len(memory) == 3
    assert {len(line.get_xdata()) for line in overhead[1].lines if line.get_label() == "attnres"} == {1}
    # A record of models alone by themselves has nothing to show.
    for out in outs:
        record = json.loads(out.read_text())
        record["problems"][0]["rows"] = record["problems"][0]["rows"][1:]
        out.write_text(json.dumps(record))
    assert cli.main(["bench", "--from", *map(str, outs), "--plots", str(folder)]) == 2
    assert "no training step beside PreNorm's" in capsys.readouterr().err


def drawing(drawn, panels, paint):
    """Axes after ``paint``, kept in ``drawn``."""
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, panels, squeeze=False).ravel()
    paint(axes)
    drawn[len(drawn)] = axes
    return b""


def test_wrong_models_are_not_timed(tiny_preset, monkeypatch, capsys, tmp_path):
    """A kernel that is off by a thousandth, chosen by the backend."""
    right = functional.multi_gate_window_step

    def off(*args, **kwargs):
        h, *rest = right(*args, **kwargs)
        return (h if os.environ.get("DEPTHMIX_KERNELS") == "torch" else h * 1.001), *rest

    monkeypatch.setattr(functional, "multi_gate_window_step", off)
    out = tmp_path / "record.json"
    assert run("training-step", "--preset", "tiny", "--residuals", "mgr-competitive", out=out) == 1
    assert "mgr-competitive, replay: WRONG (gradient: error" in capsys.readouterr().out
    prenorm, mgr = json.loads(out.read_text())["problems"][0]["rows"]
    assert mgr["status"] == "wrong" and "modes" not in mgr and prenorm["status"] == "timed"


def test_a_model_that_fails_is_listed(tiny_preset, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(functional, "multi_gate_window_step", broken)
    out = tmp_path / "record.json"
    assert run("training-step", "--preset", "tiny", "--residuals", "mgr-competitive", out=out) == 1
    prenorm, mgr = json.loads(out.read_text())["problems"][0]["rows"]
    assert mgr["status"] == "failed" and "no kernel" in mgr["reason"] and prenorm["status"] == "timed"


def test_a_model_that_fails_in_its_turns_is_listed(tiny_preset, monkeypatch, tmp_path):
    """Beside PreNorm, as for want of memory; the next one and PreNorm go on as if nothing had been."""
    real = steps.train_in_turns

    def failing(trainees, *args):
        real(trainees, *args)
        if len(trainees) == 2 and trainees[1].config.model.residual == "attnres":
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(steps, "train_in_turns", failing)
    out = tmp_path / "record.json"
    assert run("training-step", "--preset", "tiny", "--residuals", "attnres", "mgr-review", out=out) == 1
    (problem,) = json.loads(out.read_text())["problems"]
    prenorm, attnres, review = problem["rows"]
    assert attnres["status"] == "failed" and "no room" in attnres["reason"] and "modes" not in attnres
    assert prenorm["status"] == review["status"] == "timed"
    assert review["modes"]["step"]["over"]["prenorm"] > 0 and "unfinished" not in problem


# --- layouts of other packages ----------------------------------------------------------------
# The packages need a GPU. Here stand-ins with their documented layouts, in plain torch: what the adapters
# hand over and take back is tested, not the packages.


def pooled(values, query, eps):
    """``[k, ...], [D]`` -> softmax mean over k, and the log-sum-exp of the logits."""
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], eps=eps)
    logits = keys @ query
    return (logits.softmax(0).unsqueeze(-1) * values).sum(0), logits.logsumexp(0)


def merged(running, query, mean, lse, eps):
    logit = torch.nn.functional.rms_norm(running, running.shape[-1:], eps=eps) @ query
    weight = torch.sigmoid(logit - lse).unsqueeze(-1)
    return weight * running + (1 - weight) * mean


def phase_1(values, queries, eps):
    means, lse = zip(*(pooled(values, query, eps) for query in queries), strict=True)
    return torch.stack(means), torch.stack(lse)


def sinkhorn(logits, last):
    for _ in range(20):
        for dim in (-1, -2) if last == -2 else (-2, -1):
            logits = logits - logits.logsumexp(dim, keepdim=True)
    return logits.exp()


class Liger:
    @staticmethod
    def liger_attn_res(V, w_query, w_norm, eps):
        return pooled(V, w_query * w_norm, eps)[0]

    @staticmethod
    def liger_mhc_coeffs(x, phi, b, pre, post, res, *, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps):
        n = x.shape[-2]
        normed = torch.nn.functional.rms_norm(x.flatten(-2), (x.shape[-1] * n,), eps=rms_eps)
        z = (normed @ phi) * torch.cat([pre.expand(n), post.expand(n), res.expand(n * n)]) + b
        return (
            z[..., :n].sigmoid(),
            2 * z[..., n : 2 * n].sigmoid(),
            sinkhorn(z[..., 2 * n :].unflatten(-1, (n, n)), -1),
        )

    @staticmethod
    def liger_mhc_pre(x, h_pre):
        return (h_pre.unsqueeze(-1) * x).sum(-2)

    @staticmethod
    def liger_mhc_post_res(x, f_out, h_post, h_res):
        return h_res @ x + h_post.unsqueeze(-1) * f_out.unsqueeze(-2)


class Engine:
    @staticmethod
    def mhc_fused_projection(x, phi):
        return torch.nn.functional.pad(x @ phi.t(), (0, 8)), x.square().mean(-1)

    @staticmethod
    def mhc_fused_scale(H, alpha, beta, ms, n):
        scale = torch.cat([alpha[:1].expand(n), alpha[1:2].expand(n), alpha[2:].expand(n * n)])
        z = H[:, : n * n + 2 * n] * scale * torch.rsqrt(ms + 1e-6).unsqueeze(-1) + beta
        return z[:, :n].sigmoid(), 2 * z[:, n : 2 * n].sigmoid(), z[:, 2 * n :]

    @staticmethod
    def mhc_fused_sinkhorn(H_res, n, recompute, iters):
        return sinkhorn(H_res, -2)

    @staticmethod
    def mhc_fused_aggregate(x, H_pre, n):
        return (x @ H_pre.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def mhc_fused_expand_combine(f, bias, H_post, x, H_res, n):
        return f.unsqueeze(-1) * H_post.unsqueeze(-2) + x @ H_res


def fused_attnres(query, residuals, rms_weight, *, rms_eps, scale, checkpoint_level):
    return pooled(torch.stack(list(residuals)), query * rms_weight * scale, rms_eps)[0]


def naive_attnres(query, residuals, rms_weight, *, rms_eps, scale):
    return fused_attnres(query, residuals, rms_weight, rms_eps=rms_eps, scale=scale, checkpoint_level=0)


MODULES = {
    "fla.ops.attnres": types.SimpleNamespace(fused_attnres=fused_attnres, naive_attnres=naive_attnres),
    "attnres": types.SimpleNamespace(
        attnres=lambda values, query, *, eps, scale: pooled(torch.stack(list(values)), query * scale, eps)[0]
    ),
    "flash_attn_res.ops.phase_1": types.SimpleNamespace(phase_1_batched_attention_triton_op=phase_1),
    "flash_attn_res.ops.phase_2": types.SimpleNamespace(phase_2_online_softmax_merge_triton_op=merged),
    "liger_kernel.transformers.functional": Liger,
    "transformer_engine.pytorch.triton.mhc": Engine,
}


@pytest.mark.parametrize(
    "name, variant, count",
    [("pool", "sources-8", 6), ("attnres-block-two-phase", "plain", 3), ("hyper-step", "mhc", 2)],
)
def test_adapters(name, variant, count, monkeypatch):
    for path, stand_in in MODULES.items():
        parts = path.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if parent not in MODULES:
                package = types.ModuleType(parent)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, parent, package)
        monkeypatch.setitem(sys.modules, path, stand_in)
    for path in MODULES:  # `import a.b.c` leaves a, whose attributes are then followed
        parts = path.split(".")
        for depth in range(1, len(parts)):
            child = sys.modules[".".join(parts[: depth + 1])]
            monkeypatch.setattr(sys.modules[".".join(parts[:depth])], parts[depth], child, raising=False)
    monkeypatch.setattr(runner, "installed_version", lambda package: "9.9")
    problem = CASES[name].build(size(n=4, width=6), variant)
    problem.peers = [dataclasses.replace(peer, device=None, refuses=None) for peer in problem.peers]
    rows = measure(problem, against=("peers",))
    found = [row for row in rows.values() if row["kind"] == "peer"]
    assert len(found) == count
    assert [(row["candidate"], row["status"], row["reason"]) for row in found] == [
        (row["candidate"], "timed", None) for row in found
    ]


def test_limits_of_peers():
    pool = CASES["pool"].build(size("fp32", n=None, width=6), "sources-8")
    refused = {peer.name: peer.refuses for peer in pool.peers}
    assert refused["fast-attnres"] == "takes bf16 only" and refused["liger attn_res"] is None
    pool = CASES["pool"].build(size("bf16", n=None, width=6), "sources-8")
    refused = {peer.name: peer.refuses for peer in pool.peers}
    assert refused["flash-attn-res phase 1"] == "takes a D that is a power of two only, not 6"
    mhc = CASES["hyper-step"].build(size(n=3), "mhc")
    assert {peer.name: peer.refuses for peer in mhc.peers}[
        "transformer-engine mhc"
    ] == "takes n = 4 only, not 3"


def test_key_tells_problems_apart():
    plan = command._plan(command.Bench(cases=("mgr-step", "pool", "hyper-step"), n=(4, 8), width=(8, 16)))
    keys = [key for key, _ in plan.problems(command.Bench(n=(4, 8), width=(8, 16)))]
    assert len(keys) == len(set(keys)) == 3 * 4 + (3 * 2 + 4) + 2 * 4
