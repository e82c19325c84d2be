"""The cost model: identities that hold whatever the machine, counts of real models, and its record of errors."""

import dataclasses
import importlib.util
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from depthmix import GPT, available_residuals, cli
from depthmix.config import GPTConfig, TrainConfig
from depthmix.errors import UserError
from depthmix.info import activation_bytes_per_token
from depthmix.parallel import cost
from depthmix.parallel.cost import Job, candidates, connection_traffic, estimate, search, volumes
from depthmix.parallel.hardware import HARDWARE, Hardware, hardware_of, measured_from
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.shape import SHAPES, Shape, shape_of, solve
from depthmix.parallel.volume import step_volume

ROOT = Path(__file__).parents[2]
VALIDATION = ROOT / "results/parallel/plan-validation.json"
# Free communication, no overheads: what is left is work and bubble.
FREE = Hardware(
    "free", ((1, 1e12),), 1e12, 1e12, {"": 1.0}, 1e30, 1e30, 0.0, 0.0, 1e15, 8, overlap={"dp": 0, "fsdp": 0}
)
SLOW = dataclasses.replace(
    FREE, name="slow", intra_bandwidth=1e9, inter_bandwidth=1e8, intra_latency=1e-5, inter_latency=1e-4
)


def job(residual="prenorm", layers=16, width=64, batch=32, vocab=256, micro=1, **fields) -> Job:
    shape = Shape(layers, width, 4, 4 * width, vocab)
    return Job(shape, shape.model(residual, 32), batch, micro, **fields)


# --- bubble ---------------------------------------------------------------------------------------


def simulate(schedule: str, pp: int, M: int, v: int, forward: float, backward: float) -> float:
    """Seconds until the last pass of a pipeline of equal stages ends, by the order in which processes take passes.

    1F1B as Narayanan et al. 2019 and 2021 describe it: warm up, then a forward and a backward pass in turns, then the
    rest.
    """
    stages = pp * v

    def order(rank):
        def forwards(k):  # the k-th forward pass of a process: (stage, micro-batch)
            group, inside = divmod(k, pp * v)
            chunk, micro = divmod(inside, pp)
            return rank + pp * chunk, group * pp + micro

        def backwards(k):
            group, inside = divmod(k, pp * v)
            chunk, micro = divmod(inside, pp)
            return rank + pp * (v - 1 - chunk), group * pp + micro

        total = M * v
        if schedule == "gpipe":
            warm = total
        elif v == 1:
            warm = min(total, pp - rank - 1)
        else:
            warm = min(total, 2 * (pp - rank - 1) + (v - 1) * pp)
        if v == 1:
            f, b = (lambda k: (rank, k)), (lambda k: (rank, k))
        else:
            f, b = forwards, backwards
        passes = [("f", *f(k)) for k in range(warm)]
        for k in range(total - warm):
            passes += [("f", *f(warm + k)), ("b", *b(k))]
        return passes + [("b", *b(k)) for k in range(total - warm, total)]

    orders, done, now, place = [order(r) for r in range(pp)], {}, [0.0] * pp, [0] * pp
    while any(place[r] < len(orders[r]) for r in range(pp)):
        moved = False
        for r in range(pp):
            while place[r] < len(orders[r]):
                kind, stage, micro = orders[r][place[r]]
                if kind == "f":
                    needs = [("f", stage - 1, micro)] if stage else []
                else:
                    needs = [("b", stage + 1, micro)] if stage < stages - 1 else [("f", stage, micro)]
                if not all(n in done for n in needs):
                    break
                start = max([now[r], *(done[n] for n in needs)])
                now[r] = start + (forward if kind == "f" else backward) / v
                done[kind, stage, micro] = now[r]
                place[r] += 1
                moved = True
        assert moved, "the schedule stands still"
    return max(now)


@pytest.mark.parametrize(
    "schedule, pp, M, v",
    [("gpipe", 4, 8, 1), ("gpipe", 2, 3, 1), ("1f1b", 4, 4, 1), ("1f1b", 4, 16, 1), ("1f1b", 8, 8, 1),
     ("interleaved", 2, 4, 2), ("interleaved", 4, 8, 2), ("interleaved", 4, 4, 4)],
)  # fmt: skip
def test_work_and_bubble_are_those_of_the_schedule_played_through(schedule, pp, M, v):
    # A vocabulary of one hardly weighs on the last stage.
    one = job(layers=pp * v * 2, batch=M, vocab=1)
    plan = ParallelPlan(pp=pp, schedule=schedule, stages=pp * v)
    found = estimate(one, plan, FREE)
    pace = estimate(one, ParallelPlan(), FREE)
    of_one = (pace.compute + pace.connection) / M / pp
    played = simulate(schedule, pp, M, v, of_one / 3, 2 * of_one / 3)
    assert found.compute + found.connection + found.bubble == pytest.approx(played, rel=2e-3)
    share = found.bubble / (found.compute + found.connection + found.bubble)
    assert share == pytest.approx((pp - 1) / (v * M + pp - 1), rel=5e-3)


def test_no_pipeline_no_bubble_and_one_process_sends_nothing():
    for residual in available_residuals():
        found = estimate(job(residual), ParallelPlan(), SLOW)
        assert found.bubble == 0 and found.communication == 0 and not found.volumes, residual
        parts = found.compute + found.connection + found.optimizer + found.overhead
        assert found.step == pytest.approx(parts, rel=1e-12)


def test_parts_of_a_step_add_up():
    for text in ("dp=2,fsdp=2,tp=2,pp=2", "pp=4,schedule=interleaved,stages=8", "tp=4,dp=2"):
        found = estimate(job("mgr-competitive"), ParallelPlan.parse(text), SLOW)
        parts = (
            found.compute
            + found.connection
            + found.bubble
            + found.communication
            + found.optimizer
            + found.overhead
        )
        assert found.step == pytest.approx(parts, rel=1e-9), text


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", available_residuals())
def test_parameters_of_one_process_are_those_of_the_model(residual):
    model = GPTConfig(96, 6, 32, 4, 16, residual=residual, n_streams=3)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = sum(p.numel() for p in GPT(model).parameters())
    config = TrainConfig(model=model, batch_size=2)
    assert estimate(config, ParallelPlan(), FREE).memory["parameters"] == 4 * exact


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("residual", [
    *available_residuals(),
    "mgr-competitive:stream_memory=store",
    "mgr-competitive:stream_memory=store:separate_streams=true",
    "mgr-independent:n_streams=8:stream_memory=store:separate_streams=true",
])  # fmt: skip
def test_kept_activations_are_near_those_counted(residual, precision):
    def counted(layers):
        model = GPTConfig(64, layers, 128, 4, 32, residual=residual)
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = GPT(model, seed=0)
            if precision == "bf16":
                for parameter in built.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
            return activation_bytes_per_token(built, precision)

    def predicted(layers):
        model = GPTConfig(64, layers, 128, 4, 32, residual=residual)
        config = TrainConfig(model=model, batch_size=1, precision=precision)
        return estimate(config, ParallelPlan(), FREE).memory["activations"] / 32

    # Blocks alone: four more of them, one window of streams that are replayed.
    assert predicted(8) - predicted(4) == pytest.approx(counted(8) - counted(4), rel=0.06)


@settings(max_examples=40, deadline=None)
@given(
    residual=st.sampled_from(available_residuals()),
    axis=st.sampled_from(["fsdp", "tp", "pp"]),
    start=st.sampled_from([1, 2]),
    checkpointing=st.booleans(),
)
def test_more_devices_never_need_more_memory_each(residual, axis, start, checkpointing):
    one = job(residual, activation_checkpointing=checkpointing)
    kinds = ("parameters", "gradients", "optimizer")
    few = estimate(one, ParallelPlan(**{axis: start}), FREE).memory
    many = estimate(one, ParallelPlan(**{axis: 2 * start}), FREE).memory
    for kind in kinds:
        assert many[kind] <= few[kind] * (1 + 1e-9), kind
    if axis == "tp":
        assert sum(many.values()) <= sum(few.values())


def test_checkpointing_keeps_less_and_computes_a_third_more():
    plain = estimate(job(vocab=1), ParallelPlan(), FREE)
    again = estimate(job(vocab=1, activation_checkpointing=True), ParallelPlan(), FREE)
    assert again.memory["activations"] < plain.memory["activations"] / 3
    assert 1.25 < again.compute / plain.compute < 1.35


def test_gpipe_holds_all_micro_batches_and_1f1b_no_more_than_stages():
    def activations(schedule, batch):
        one = job(batch=batch, vocab=1)
        plan = ParallelPlan(pp=4, schedule=schedule)
        return estimate(one, plan, FREE).memory["activations"]

    assert activations("1f1b", 32) == activations("1f1b", 4)
    assert activations("gpipe", 32) == pytest.approx(8 * activations("gpipe", 4), rel=0.01)


# --- connections ----------------------------------------------------------------------------------


def test_mgr_costs_the_same_at_every_depth_and_attention_residuals_more_and_more():
    def traffic(residual, layers):
        model = GPTConfig(64, layers, 64, 4, 32, residual=residual)
        return np.mean([sum(connection_traffic(model, s)) for s in range(5, 2 * layers + 1)])

    assert traffic("mgr-competitive", 8) == traffic("mgr-competitive", 64)
    assert traffic("attnres", 64) > 2 * traffic("attnres", 8)

    def state(residual, layers):
        # What the middle cut of two stages carries.
        found = volumes(job(residual, layers=layers), ParallelPlan(pp=2))
        return next(v.bytes for v in found if v.what == "state")

    assert state("mgr-competitive", 8) == state("mgr-competitive", 32) == 4 * state("prenorm", 8)
    assert state("attnres", 32) > 3.5 * state("attnres", 8)


def test_traffic_of_mgr_is_the_floor_that_the_operations_were_measured_against():
    measured = json.loads((ROOT / "benchmarks/results/ops-cpu.json").read_text())["problems"]
    checked = 0
    for problem in measured:
        if problem["case"] not in ("mgr-step", "mgr-step-window"):
            continue
        model = GPTConfig(
            64, 64, 768, 6, 32, residual="mgr-competitive", n_streams=problem["n"],
            stream_memory="store" if problem["case"] == "mgr-step" else "replay",
        )  # fmt: skip
        steps = 1 if problem["case"] == "mgr-step" else model.replay_window
        forward, backward = connection_traffic(model, 100)
        floor = problem["floor"]
        assert steps * forward == pytest.approx(sum(floor["forward"][k] for k in ("read", "written")))
        assert steps * backward == pytest.approx(sum(floor["backward"][k] for k in ("read", "written")))
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize(
    "text", ["dp=2", "fsdp=4", "tp=2", "pp=4", "dp=2,fsdp=2,tp=2,pp=2", "pp=2,schedule=interleaved"]
)
@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "attnres", "hc", "moda", "denseformer"])
def test_closed_form_of_communication_is_the_count_of_a_plan(residual, text):
    plan = ParallelPlan.parse(text)
    model = GPTConfig(256, 8, 64, 4, 32, residual=residual)
    config = TrainConfig(model=model, batch_size=16, micro_batch=1, device="cpu", parallel=text)
    closed = {(v.axis, v.kind, v.what): v.bytes for v in volumes(Job.of(config), plan)}
    states = 0
    for v in step_volume(config, plan):
        if v.what == "state":
            continue
        if v.what in ("parameters", "gradients"):
            assert closed[v.axis, v.kind, v.what] == pytest.approx(v.bytes, rel=0.03), v
        if v.what == "updates":  # these round matrices up to whole ones a process
            assert closed[v.axis, v.kind, v.what] == pytest.approx(v.bytes, rel=0.3), v
    sequence = [v for v in step_volume(config, plan) if v.what == "sequence" and residual != "moda"]
    for v in sequence:
        assert closed[v.axis, v.kind, v.what] == v.bytes
    if plan.pp > 1:
        from depthmix.parallel.volume import process_volume

        for rank in range(plan.processes):
            sent = sum(v.bytes for v in process_volume(config, plan, rank) if v.what == "state")
            states = max(states, sent)
        assert closed["pp", "point-to-point", "state"] == states


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "attnres", "moda"])
@pytest.mark.parametrize("memory", [1e12, 6e6])
def test_no_plan_is_better_than_the_one_found(residual, memory):
    hardware = dataclasses.replace(SLOW, memory=memory)
    one = job(residual, micro=0)
    best = search(one, hardware, 16, keep=3)
    every = [estimate(*pair, hardware, ep) for *pair, ep in candidates(one, hardware, 16)]
    fitting = sorted(each.step for each in every if each.fits)
    assert len(fitting) < len(every) or memory == 1e12
    assert [each.step for each in best] == fitting[:3]
    assert search(one, hardware, 16)[0].to_dict() == best[0].to_dict()


def test_no_division_of_experts_is_better_than_the_one_found():
    shape = Shape(4, 64, 4, 64, 64, experts=8, active=2)
    hardware = dataclasses.replace(SLOW, devices_per_node=4)
    one = Job(shape, shape.model("prenorm", 32), 32)
    every = [estimate(*pair, hardware, ep) for *pair, ep in candidates(one, hardware, 8)]
    assert {each.ep for each in every} == {1, 2, 4, 8}
    assert search(one, hardware, 8)[0].step == min(each.step for each in every)


def test_candidates_are_valid_plans_that_use_all_devices():
    moe = SHAPES["100B-moe"]
    one = Job(moe, moe.model("prenorm", 4096), 512)
    for each, plan, ep in candidates(one, hardware_of("h100"), 64):
        cost.check(each, plan, ep)
        assert plan.processes == 64 and plan.tp <= 8


# --- shapes ---------------------------------------------------------------------------------------


def test_presets_have_the_parameters_that_they_say():
    assert SHAPES["7B"].parameters == pytest.approx(6.65e9, rel=1e-3)
    assert SHAPES["70B"].parameters == pytest.approx(71.3e9, rel=1e-3)
    assert SHAPES["100B-moe"].parameters == pytest.approx(106.5e9, rel=1e-3)
    assert SHAPES["100B-moe"].active_parameters == pytest.approx(16.3e9, rel=5e-3)
    assert (
        shape_of("S").parameters == 123_587_328
    )  # counted from the model: benchmarks/results/training-step-cpu.json


def test_a_mixture_computes_for_the_active_experts_and_holds_all():
    dense = Shape(4, 64, 4, 256, 64)
    mixed = dataclasses.replace(dense, experts=8, active=2)
    a, b = (estimate(Job(s, s.model("prenorm", 32), 8), ParallelPlan(dp=4), FREE) for s in (dense, mixed))
    assert 1 < b.compute / a.compute < 2.1
    assert b.memory["parameters"] > 4 * a.memory["parameters"]
    shared = estimate(Job(mixed, mixed.model("prenorm", 32), 8), ParallelPlan(dp=4), FREE, ep=4)
    assert shared.memory["parameters"] < b.memory["parameters"] / 2
    tokens = next(v for v in shared.volumes if v.axis == "ep")
    # Two all-to-alls each way of two copies of every token in bf16, four blocks, two sequences of 32 a process.
    assert tokens.bytes == 4 * 4 * (2 * 32) * 2 * 64 * 2


@pytest.mark.parametrize("parameters, layers", [(100e9, 96), (7e9, 32), (350e6, 24), (1e9, 16)])
def test_width_follows_from_parameters(parameters, layers):
    found = solve(parameters, layers)
    assert found.parameters == pytest.approx(parameters, rel=0.02)
    assert found.width % found.heads == 0


# --- refusals -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named():
    big = Job(SHAPES["70B"], SHAPES["70B"].model("prenorm", 4096), 64)
    with pytest.raises(UserError, match=r"nothing fits 8 x h100 .* needs .* GB, .* of them \w+; use more"):
        search(big, hardware_of("h100"), 8)
    with pytest.raises(UserError, match="--gpus must be at least 1"):
        search(big, hardware_of("h100"), 0)
    with pytest.raises(UserError, match="no plan divides 1009 devices"):
        search(big, hardware_of("h100"), 1009)
    with pytest.raises(UserError, match=r"unknown hardware 'h10'\. Did you mean 'h100'"):
        hardware_of("h10")
    with pytest.raises(UserError, match="unknown preset '8B'"):
        shape_of("8B")
    with pytest.raises(UserError, match="ep = 3 must divide"):
        estimate(big, ParallelPlan(dp=4), HARDWARE["h100"], ep=3)
    with pytest.raises(UserError, match="no width in multiples of 32"):
        solve(1000, 96)
    with pytest.raises(UserError, match="active = 9 of experts = 8"):
        Shape(1, 64, 1, 64, 64, experts=8, active=9)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    out, plot = tmp_path / "a/plan.json", tmp_path / "plan.png"
    words = "plan --preset S --gpus 8 --seq-len 1024 --batch-tokens 512K --residuals prenorm"
    assert (
        cli.main([*words.split(), "mgr-competitive:n_streams=8", "--out", str(out), "--plot", str(plot)]) == 0
    )
    printed = capsys.readouterr().out
    assert "mgr-competitive:n_streams=8" in printed and "Not measured: NVIDIA H100" in printed
    record = json.loads(out.read_text())
    base, other = record["rows"]
    assert base["to_prenorm"] == 1 < other["to_prenorm"] == other["step_s"] / base["step_s"]
    assert record["shape"]["parameters"] == 123_587_328
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--gpus 8", "--params and --layers missing: give --params N --layers L, or --preset with one of 7B"),
        ("--params 7B", "--layers missing"),
        ("--params 7X --layers 2", "--params takes a positive number, with K, M, B or T behind it; got '7X'"),
        ("--preset 7B --layers 3", "--preset 7B has dimensions already"),
        ("--preset 7B --parallel dp=4", "--parallel dp=4 is for 4 devices and --gpus says 8"),
        ("--preset 70B --parallel fsdp=8", "fsdp=8 needs .* GB a device, .* usable; raise fsdp, tp or pp"),
        ("--preset 7B --batch-tokens 1K", "--batch-tokens 1K is less than a sequence of 4096 tokens"),
        ("--preset 70B --gpus 8", "nothing fits 8 x h100 with 80 GB each"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, capsys):
    assert cli.main(["plan", *words.split(), "--residuals", "prenorm"]) == 2
    assert re.search(message, capsys.readouterr().err)


# --- the record of errors -------------------------------------------------------------------------


def validation_script():
    spec = importlib.util.spec_from_file_location("plan_validation", ROOT / "benchmarks/plan_validation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stored_constants_give_the_stored_predictions_and_errors():
    script, record = validation_script(), json.loads(VALIDATION.read_text())
    assert [plan["plan"] for plan in record["plans"]] == [text or "1 process" for text in script.PLANS]
    for plan in record["plans"]:
        text = "" if plan["plan"] == "1 process" else plan["plan"]
        for kind in script.KINDS:
            hardware = measured_from(plan["hardware"][kind])
            assert script.hardware_from(text, plan["constants_s"][kind]) == hardware
            again = script.predict(text, hardware)
            for run in plan["runs"]:
                one = run[kind]
                expected = script.time_of(kind, again[run["name"]])
                assert expected == pytest.approx(one["predicted_s"], rel=1e-9)
                assert one["error"] == pytest.approx(one["predicted_s"] / one["measured_s"] - 1, rel=1e-9)
        for run in plan["runs"]:
            for kind in ("parameters", "optimizer"):
                counted = run["bytes"][kind]
                assert counted["predicted"] == pytest.approx(counted["measured"], rel=5e-3)
    assert script.summary(record["plans"]) == record["summary"]
