"""Formulas of communication against small cases worked out by hand and against the tensors that models do send."""

import math

import pytest

from depthmix import available_residuals
from depthmix.config import GPTConfig, TrainConfig
from depthmix.errors import UserError
from depthmix.parallel.pipeline import crossing_examples
from depthmix.parallel.plan import ParallelPlan, units
from depthmix.parallel.updates import owners
from depthmix.parallel.volume import (
    Volume,
    boundary_bytes,
    boundary_numbers,
    crossing_numbers,
    sent_values,
    stage_weights,
    step_volume,
    wire_bytes,
)

D = 8


def model(residual, n_layer, n_streams=4, **fields):
    given = {"vocab_size": 16, "d_model": D, "n_head": 2, "head_size": 6, "seq_len": 4, **fields}
    return GPTConfig(n_layer=n_layer, residual=residual, n_streams=n_streams, **given)


@pytest.mark.parametrize(
    "residual, numbers",
    [
        # Behind sublayers 2, 4, 6, 8, 10 of 12, in units of D.
        ("prenorm", [1, 1, 1, 1, 1]),
        ("highway", [1, 1, 1, 1, 1]),
        ("review-convex", [1, 1, 1, 1, 1]),
        ("siamese", [2, 2, 2, 2, 2]),
        ("mgr-independent", [3, 4, 4, 4, 4]),
        ("mgr-competitive:n_streams=8", [3, 5, 7, 8, 8]),
        ("mgr-review:n_streams=1", [1, 1, 1, 1, 1]),
        ("hc", [4, 4, 4, 4, 4]),
        ("mhc-lite:n_streams=2", [2, 2, 2, 2, 2]),
        ("attnres", [3, 5, 7, 9, 11]),
        ("attnres-block:block_size=3", [2, 3, 3, 4, 5]),
        ("attnres-block:blocks=2", [2, 2, 2, 3, 3]),
        ("attnres-block:blocks=5", [2, 3, 3, 4, 5]),  # of 3, 3, 2, 2 and 2 sublayers
        ("denseformer", [2, 3, 4, 5, 6]),
        ("denseformer:period=3", [2, 3, 4, 5, 6]),  # all of them until block 6 averages
        (
            "denseformer:period=4",
            [2, 3, 4, 5, 1],
        ),  # block 4 is the last to average; then the newest is all that is read
        ("denseformer:dilation=3", [2, 3, 4, 5, 4]),  # blocks 5 and 6 read outputs 2 and 5, and 0 and 3
        ("moda", [1 + 2 * 2 * 1.5, 1 + 4 * 2 * 1.5, 1 + 6 * 2 * 1.5, 1 + 8 * 2 * 1.5, 1 + 10 * 2 * 1.5]),
    ],
)
def test_what_crosses_a_cut_by_hand(residual, numbers):
    config = model(residual, 6)
    assert [crossing_numbers(config, sublayer) / D for sublayer in (2, 4, 6, 8, 10)] == numbers


def test_constant_or_growing_with_depth():
    def last(residual, n_layer, **options):
        return crossing_numbers(model(residual, n_layer, **options), 2 * n_layer - 2) / D

    assert {last("mgr-competitive", n_layer) for n_layer in (4, 8, 32, 96)} == {4}
    assert {last("mhc", n_layer, n_streams=6) for n_layer in (4, 8, 32, 96)} == {6}
    assert [last("attnres", n_layer) for n_layer in (4, 8, 32, 96)] == [7, 15, 63, 191]
    assert [last("attnres-block:blocks=4", n_layer) for n_layer in (4, 8, 32, 96)] == [4, 5, 5, 5]


@pytest.mark.parametrize(
    "residual, cached, plain",
    [
        # 6 blocks on 2 processes in turn; cut i is met by a process that was given cut i - 1 the stage before.
        ("prenorm", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("mgr-competitive", [3, 4, 4, 4, 4], [3, 4, 4, 4, 4]),
        ("mgr-competitive:n_streams=8", [3, 2, 2, 8, 8], [3, 5, 7, 8, 8]),
        ("attnres", [3, 2, 2, 2, 2], [3, 5, 7, 9, 11]),
        # The sum that is still being added to is sent again, and the embedding and finished sums are not.
        ("attnres-block:block_size=3", [2, 2, 1, 1, 2], [2, 3, 3, 4, 5]),
        ("attnres-block:block_size=4", [2, 1, 1, 1, 1], [2, 2, 3, 3, 4]),
        ("denseformer", [2, 1, 1, 1, 1], [2, 3, 4, 5, 6]),
        ("moda", [7, 7, 7, 7, 7], [7, 13, 19, 25, 31]),
    ],
)
def test_the_cache_by_hand(residual, cached, plain):
    config, plan = model(residual, 6), ParallelPlan.parse("pp=2,schedule=interleaved,stages=6")
    assert [boundary_numbers(config, plan, cut) / D for cut in range(5)] == cached
    assert [boundary_numbers(config, plan, cut, cache=False) / D for cut in range(5)] == plain


CASES = (
    # blocks, streams, precision, plan: 4 to 20 sublayers; stages alone, and with the cache.
    (2, 3, "fp32", "pp=2"),
    (5, 2, "bf16", "pp=4"),
    (7, 5, "autocast", "pp=3,schedule=interleaved,stages=6"),
    (10, 4, "fp32", "pp=2,schedule=interleaved,stages=4"),
)
SPECS = [
    *available_residuals(), "attnres-block:blocks=3", "attnres-block:block_size=3", "denseformer:dilation=2",
    "denseformer:period=2", "mgr-competitive:n_streams=8:bias=-3", "mgr-competitive:stream_dtype=bf16",
    "mgr-independent:stream_dtype=fp32", "mgr-review:n_streams=4:separate_streams=true:stream_memory=store",
]  # fmt: skip


@pytest.mark.parametrize("residual", SPECS)
def test_formulas_are_the_tensors_that_models_send(residual):
    for n_layer, n_streams, precision, text in CASES:
        plan = ParallelPlan.parse(text)
        config = model(residual, n_layer, n_streams)
        run = TrainConfig(model=config, batch_size=24, micro_batch=2, parallel=text, precision=precision)
        dtype = "bfloat16" if precision == "bf16" else "float32"
        rows = 2 * config.seq_len
        sent = _sent(config, plan, True, dtype, precision == "autocast")
        assert len(sent) == plan.stages - 1
        for cut, tensors in enumerate(sent):
            formula = [numbers for _, numbers in sent_values(config, plan, cut)]
            assert formula == [x.numel() / rows for x in tensors], (text, cut)
            size = sum(x.numel() * x.element_size() for x in tensors)
            assert boundary_bytes(run, plan, cut) * rows == size
    # Without the cache, of a shallow one.
    config = model(residual, 4, 3)
    sent = _sent(config, plan, False, dtype, False)
    for cut, tensors in enumerate(sent):
        assert boundary_numbers(config, plan, cut, cache=False) * rows == sum(x.numel() for x in tensors)


def _sent(config, plan, cache, dtype, autocast):
    import torch

    examples, _ = crossing_examples(
        config, plan, 2, dtype=getattr(torch, dtype), autocast=autocast, cache=cache
    )
    return examples


@pytest.mark.parametrize("residual", available_residuals())
def test_parameters_of_the_stages_are_those_of_the_model(residual):
    import torch

    from depthmix import GPT

    config = model(residual, 5, 3)
    with torch.device("meta"):
        whole = [tuple(p.shape) for p in GPT(config).parameters()]
    for text in ("dp=1", "pp=2", "pp=5", "pp=2,schedule=interleaved,stages=4"):
        plan = ParallelPlan.parse(text)
        found = [w.shape for stage in stage_weights(config, plan) for w in stage.all]
        twice = [(16, D)] if plan.pp > 1 else []  # the embedding, which both ends hold
        assert sorted(found) == sorted(whole + twice)


def total(volumes, **wanted):
    return sum(v.bytes for v in volumes if all(getattr(v, k) == x for k, x in wanted.items()))


def run(parallel, residual="prenorm", n_layer=4, **fields):
    given = {"batch_size": 16, "micro_batch": 2, "device": "cpu", "parallel": parallel, **fields}
    config = TrainConfig(model=model(residual, n_layer, n_head=4, head_size=2), **given)
    return config, ParallelPlan.parse(parallel)


def test_a_step_of_prenorm_by_hand():
    # Of a block: two norms of 8, matrices of 24 x 8, 8 x 8, 32 x 8, 8 x 32. Besides: embedding 16 x 8, a norm.
    block, rest = 16 + 192 + 64 + 256 + 256, 128 + 8
    assert total(step_volume(*run("dp=2")), what="gradients") == 4 * (4 * block + rest)
    sharded = step_volume(*run("fsdp=4,unit=0"))  # 4 sequences, 2 micro-batches
    assert total(sharded, kind="all-gather", what="parameters") == 4 * 2 * (2 * 4 * block + rest)
    together = step_volume(*run("fsdp=4"))  # small blocks stay gathered
    assert total(together, kind="all-gather", what="parameters") == 4 * 2 * (4 * block + rest)
    assert total(together, kind="reduce-scatter") == 4 * 2 * (4 * block + rest)
    assert total(sharded, kind="reduce-scatter") == 4 * 2 * (4 * block + rest)
    both = step_volume(*run("dp=2,fsdp=2"))  # likewise
    assert total(both, kind="all-reduce", axis="dp") == 4 * 2 * (4 * block + rest) // 2
    # 8 micro-batches of 2 x 4 tokens, 8 sublayers, two passes.
    sequence = step_volume(*run("tp=2"))
    assert total(sequence, kind="all-gather", what="sequence") == 4 * 8 * 8 * D * 8 * 2
    assert total(sequence, kind="reduce-scatter") == 4 * 8 * 8 * D * 8 * 2
    assert total(sequence, axis="tp", what="gradients") == 4 * (4 * 16 + rest)
    pipeline = step_volume(*run("pp=4"))
    for cut in range(3):
        for direction in ("forward", "backward"):
            assert total(pipeline, boundary=cut, direction=direction) == 4 * 8 * 8 * D
    assert total(pipeline, axis="tied") == 4 * 128


def test_muons_updates_by_hand():
    def updates(parallel, backend=None, **fields):
        volumes = step_volume(*run(parallel, **fields), backend=backend)
        return {(v.kind, v.axis): (v.bytes, v.calls) for v in volumes if v.what == "updates"}

    # Matrices of four shapes, four of each, 768 numbers a block. Three processes get 3, 3 and 2 of the eight that cost
    # most (256 numbers), 1, 1 and 2 of 192 and of 64: 1024 numbers each.
    assert updates("dp=3", batch_size=6) == {("all-gather", "dp"): (4 * 3 * 1024, 1)}
    # There and back, a quarter of everything each time; bf16 back on GPUs.
    assert updates("fsdp=4", "gloo") == {("all-to-all", "fsdp"): ((4 + 4) * 768, 2)}
    assert updates("fsdp=4", "nccl") == {("all-to-all", "fsdp"): ((4 + 2) * 768, 2)}
    # One axis after the other; the copies hand each other what they own of the parts.
    assert updates("fsdp=2,tp=2") == {
        ("all-to-all", "fsdp"): (8 * 768, 2),
        ("all-to-all", "tp"): (8 * 768, 2),
    }
    assert updates("dp=2,fsdp=2") == {
        ("all-to-all", "fsdp"): (8 * 768, 2),
        ("all-gather", "dp"): (4 * 2 * 768, 1),
    }
    # Of one block, a matrix for each of four processes: the largest go as a whole, 256 numbers in 4 parts.
    assert updates("fsdp=4", n_layer=1) == {("all-to-all", "fsdp"): (4 * (768 // 4 + 256), 2)}


@pytest.mark.parametrize("text", ["dp=3", "fsdp=4", "dp=2,fsdp=2,tp=2", "dp=5,fsdp=3"])
def test_matrices_are_shared_out_equally(text):
    plan = ParallelPlan.parse(text)
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32)] * 13
    place_of = owners(shapes, plan)
    loads = {}
    for shape, place in zip(shapes, place_of, strict=True):
        assert all(0 <= place[axis] < getattr(plan, axis) for axis in ("dp", "fsdp", "tp"))
        small, large = sorted(shape)
        # The operations of an iteration: X X^T, its square, and their product with X.
        operations = 2 * small**2 * large + small**3
        loads[tuple(place.values())] = loads.get(tuple(place.values()), 0) + operations
    assert len(loads) == plan.processes
    assert max(loads.values()) - min(loads.values()) <= 2 * 8**2 * 32 + 8**3  # one of the largest


def test_units_of_small_blocks():
    def of(sizes, unit):
        return [
            list(found) for found in units([size << 20 for size in sizes], ParallelPlan(fsdp=2, unit=unit))
        ]

    assert of([1, 1, 1], 0) == [[0], [1], [2]]
    assert of([4, 5, 6], 4) == [[0], [1], [2]]
    assert of([2, 1, 2, 3, 2, 1], 4) == [[0, 1, 2], [3, 4, 5]]  # the last one has too little alone
    assert of([1, 1, 1], 4) == []
    assert of([], 4) == []


@pytest.mark.parametrize("parallel", ["tp=2", "tp=4", "fsdp=2,tp=2", "dp=2,tp=2"])
def test_sequence_parallel_sends_no_streams(parallel):
    def of(residual, **wanted):
        config, plan = run(parallel, residual)
        return total(step_volume(config, plan), axis="tp", **wanted)

    for residual in available_residuals():
        if residual == "moda":  # whose MLPs' keys and values need the whole sequence
            assert of(residual, what="sequence") > of("prenorm", what="sequence")
        else:
            assert of(residual, what="sequence") == of("prenorm", what="sequence")
    # What MGR adds, L = 8 and n = 4: 3 sites of the ramp have a pool of 8 numbers; 5 lerps that and a gate of 8 + 5.
    more = of("mgr-competitive", what="gradients") - of("prenorm", what="gradients")
    shards = ParallelPlan.parse(parallel).fsdp
    assert more == 4 * (3 * 8 // shards + 5 * (16 // shards + -(-5 // shards)))


def test_wire_bytes_of_rings():
    def wire(kind, group, backend="nccl"):
        return wire_bytes(Volume(kind, "dp", "gradients", 1200, 1, group), backend)

    assert wire("all-gather", 4) == wire("reduce-scatter", 4) == wire("all-to-all", 4) == 900
    assert wire("all-reduce", 4) == wire("reduce-scatter", 4, "gloo") == 1800
    assert wire("all-reduce", 2) == wire("point-to-point", 2) == 1200


def test_a_hundred_billion_parameters_are_quick_arithmetic():
    large = GPTConfig(
        vocab_size=128000, n_layer=120, d_model=8192, n_head=64, seq_len=4096, residual="mgr-competitive"
    )
    plan = "dp=2,fsdp=8,tp=8,pp=8"
    config = TrainConfig(
        model=large, batch_size=512, micro_batch=1, parallel=plan, device="cuda", precision="bf16"
    )
    volumes = step_volume(config, ParallelPlan.parse(plan))
    states = [v.bytes for v in volumes if v.what == "state"]
    # 32 micro-batches a process, 4096 / 8 tokens of them, 4 streams, 2 bytes.
    assert len(states) == 14 and set(states) == {32 * 512 * 4 * 8192 * 2}
    parameters = sum(math.prod(w.shape) for stage in stage_weights(large, ParallelPlan()) for w in stage.all)
    assert parameters > 97e9


def test_an_unknown_connection_has_no_formula():
    config = model("prenorm", 4)
    object.__setattr__(config, "residual", "mine")
    with pytest.raises(UserError, match="'mine'"):
        crossing_numbers(config, 2)
