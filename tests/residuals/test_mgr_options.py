"""Options of the mgr connections for ablations: dtype of streams, last read, separate streams.

The truth is a trunk written here as a loop over a list of streams, from the equations, in float64 torch operations; the
rounding of streams is the only one in it.
"""

import math
import warnings

import numpy as np
import pytest
import torch

import depthmix
from depthmix import GPT, GPTConfig, health
from depthmix.errors import UserError
from depthmix.memory import reconstruction_error
from depthmix.mixing import mixing_error, mixing_map
from depthmix.parallel.pipeline import GPTStage
from depthmix.parallel.plan import ParallelPlan, cuts, stage_blocks
from depthmix.residuals import build_residual

EPS = 1e-6
D = 8
IDS = torch.arange(24).view(2, 12) * 7 % 32
SEPARATE = ":separate_streams=true:stream_memory=store"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config(residual, **changes):
    options = dict(vocab_size=32, n_layer=5, d_model=D, n_head=1, seq_len=12, n_streams=4, replay_window=3)
    return GPTConfig(residual=residual, **(options | changes))


def perturbed(made_of, size=0.3, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT(made_of, seed=0, **arguments)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return model


def gradients(model):
    model.zero_grad(set_to_none=True)
    loss = model(IDS, IDS.roll(1))[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


# --- the trunk as its equations stand --------------------------------------------------------------


def rms(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)


def pooled(streams, weight):
    s = torch.stack(streams, -2)
    scores = torch.zeros(s.shape[:-1], dtype=s.dtype) if weight is None else (rms(s) * weight).sum(-1)
    return (torch.softmax(scores / math.sqrt(D), -1).unsqueeze(-1) * s).sum(-2)


def trunk(x, outputs, sites, n, gate, separate=False, dtype=torch.float64):
    """``(inputs of sublayers 2 .. L and the output, streams behind each)``; streams are rounded to ``dtype``."""

    def kept(stream):
        return stream.to(dtype).double()

    streams, reads, seen = [kept(x)], [], []
    for l, (y, site) in enumerate(zip(outputs, sites, strict=True), start=1):  # noqa: E741
        weights = {name: p.double() for name, p in site.named_parameters()}
        if len(streams) < n:
            assert set(weights) <= {"pool_weight"}
            streams = [*streams, kept(y)]
        else:
            # Stream i, from 1, was begun by sublayer i - 1: of the kind of this one where l - (i - 1) is even.
            mine = [i for i in range(n) if not separate or (l - i) % 2 == 0]
            assert len(mine) == (n // 2 if separate else n)
            scores = torch.stack([(rms(streams[i]) * weights["gate_weight"]).sum(-1) for i in mine], -1)
            if "update_weight" in weights:
                scores = scores + (rms(y) * weights["update_weight"]).sum(-1, keepdim=True)
            scores = scores / math.sqrt(D)
            bias = weights["gate_bias"]
            if gate == "competitive":
                keep = bias[0].expand(*scores.shape[:-1], 1)
                beta = torch.softmax(torch.cat([keep, scores + bias[1:]], -1), -1)[..., 1:]
            else:
                beta = torch.sigmoid(scores + bias)
            streams = list(streams)
            for place, i in enumerate(mine):
                b = beta[..., place, None]
                streams[i] = kept((1 - b) * streams[i] + b * y)
        reads.append(pooled(streams, weights.get("pool_weight")))
        seen.append(streams)
    return reads, seen


def both(made_of, dtype=torch.float64, own=torch.float64):
    """What the connection does with random outputs, and what :func:`trunk` does; parameters are of ``own``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        residual = build_residual(made_of)
    sites = [residual.site(i).to(own) for i in range(1, made_of.n_sublayers + 1)]
    for site in sites:
        for p in site.parameters():
            torch.nn.init.normal_(p)
    x, *outputs = (torch.randn(2, 3, D, dtype=own).requires_grad_() for _ in range(len(sites) + 1))
    h, state = residual.begin(x)
    assert h is x
    reads, seen = [], []
    for site, y in zip(sites, outputs, strict=True):
        h, state = site(y, state)
        reads.append(h)
        seen.append(site.streams(state))
    reads[-1] = residual.finish(reads[-1], state)
    wanted = trunk(
        x.double(), [y.double() for y in outputs], sites, made_of.n_streams, residual.gate,
        residual.separate, dtype,
    )  # fmt: skip
    return sites, [x, *outputs], (reads, seen), wanted


# --- separate streams ------------------------------------------------------------------------------

GATES = ["mgr-competitive", "mgr-independent", "mgr-review", "mgr-review:gate=independent"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_separate_streams_follow_the_equations(gate, n):
    sites, inputs, (reads, seen), (want_reads, want_seen) = both(config(gate + SEPARATE, n_streams=n))
    for a, b in zip(reads, want_reads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for mine, wanted in zip(seen, want_seen, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    leaves = [*inputs, *(p for site in sites for p in site.parameters())]
    directions = [torch.randn_like(h) for h in reads]
    ours, theirs = (
        torch.autograd.grad(sum((h * d).sum() for h, d in zip(found, directions, strict=True)), leaves)
        for found in (reads, want_reads)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_a_sublayer_writes_its_own_half_alone(gate):
    _, _, (_, seen), _ = both(config(f"mgr-{gate}{SEPARATE}"))
    for l in range(4, 10):  # noqa: E741
        changed = [not torch.equal(a, b) for a, b in zip(seen[l - 1], seen[l], strict=True)]
        # seen[l] is behind sublayer l + 1: streams 1, 3 are those of even numbers.
        assert changed == [(l + 1) % 2 == 0, (l + 1) % 2 == 1] * 2


def test_separate_streams_in_a_model():
    made_of = config("mgr-review" + SEPARATE, n_layer=3)
    model = perturbed(made_of).double()
    assert all(g.abs().sum() > 0 for g in gradients(model))
    assert mixing_error(model, IDS) < 1e-12
    found = mixing_map(model, IDS, streams=True)
    # Convex: coefficients of every read and every stream sum to 1, and MLPs' streams hold no attention's output.
    torch.testing.assert_close(found.matrix.sum(1), torch.ones(7, dtype=torch.float64))
    last = found.streams[-1]
    assert (last[0::2, 1::2] == 0).all() and (last[1::2, 0::2] == 0).all()
    assert (last[0::2, 2::2].sum(0) > 0).all() and (last[1::2, 1::2].sum(0) > 0).all()
    with pytest.raises(UserError, match="without separate_streams"):
        reconstruction_error(model, IDS)


def test_gradcheck_of_a_model_with_separate_streams():
    made_of = config("mgr-competitive" + SEPARATE, n_layer=3, d_model=4, n_streams=2, vocab_size=5, seq_len=3)
    model = perturbed(made_of).double()
    ids, targets = torch.tensor([[0, 3, 1]]), torch.tensor([[3, 1, 4]])
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids, targets))[1]

    inputs = tuple(p.detach().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True, atol=1e-6)


def test_the_bias_of_separate_gates():
    """Of 32 sublayers and n = 4, 29 lerp, up to 15 of them into one stream, and two streams share a gate."""
    want = 1 / (math.sqrt(15 / 21) * (math.exp(3) + 1))
    for name in ("mgr-competitive", "mgr-independent:independent_init=sigmoid"):
        residual = build_residual(config(name + SEPARATE, n_layer=16))
        assert residual.gate_summary()["initial_beta"] == pytest.approx(want, rel=1e-12)
        site, y, s = residual.site(9), torch.ones(1, 1, D), torch.zeros(1, 1, 2, D)
        streams = site.write(y, (s, s))
        torch.testing.assert_close(streams[1], torch.full_like(s, want))  # from zeros to ones
        assert not streams[0].any()
    as_printed = build_residual(config("mgr-independent" + SEPARATE, n_layer=16))
    assert as_printed.init_bias == pytest.approx(-math.log(1 / want - 2), rel=1e-12)


def test_separate_streams_refuse_what_they_cannot_do():
    with pytest.raises(UserError, match="n_streams must be even, got 3"):
        build_residual(config("mgr-competitive" + SEPARATE, n_streams=3))
    for memory in ("replay", "inversion"):
        with pytest.raises(UserError, match=f"got {memory}; set stream_memory=store"):
            build_residual(config(f"mgr-competitive:separate_streams=true:stream_memory={memory}"))
    sublayers = [torch.nn.Linear(D, D) for _ in range(6)]
    with pytest.raises(UserError, match="cannot start as PreNorm: separate_streams"):
        depthmix.wrap(sublayers, "mgr-competitive" + SEPARATE, start="prenorm-scaled")


def test_gates_of_separate_streams_are_shown_where_they_belong():
    from depthmix.diagnostics.measures import measure
    from depthmix.diagnostics.subject import Run

    model = perturbed(config("mgr-competitive" + SEPARATE)).double()
    with torch.no_grad(), depthmix.capture(model, "*") as c:
        model.hidden(IDS)
    found = {k: a.values for k, a in measure(Run(model, name="x"), IDS, 2).items()}
    record = health.measure(model, IDS, torch.no_grad()).record["gate_mean_stream"]
    total = torch.zeros(2, 12, 4, dtype=torch.float64)
    for s in range(10):
        name = f"blocks.{s // 2}.hook_gate{'' if s % 2 else '_mid'}"
        if s < 3:
            assert name not in c and record[s] is None
            continue
        gate, own = c[name], [1, 3] if s % 2 == 0 else [0, 2]
        assert gate.shape == (2, 12, 2)
        wanted = np.full(4, np.nan)
        wanted[own] = gate.mean((0, 1))
        np.testing.assert_allclose(found["gate_mean_stream"][s], wanted, rtol=1e-9)
        np.testing.assert_allclose(np.array(record[s], float), wanted, rtol=1e-5)
        total[..., own] -= torch.log10(1 - gate)
        np.testing.assert_allclose(found["amplification_mean"][s], total.mean((0, 1)), rtol=1e-9)


# --- the last read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", SEPARATE])
@pytest.mark.parametrize("n", [2, 4, 12])
def test_the_last_read_is_a_mean(options, n):
    """n = 12: ten sublayers never leave the ramp."""
    made_of = config(f"mgr-competitive:last_read=mean{options}", n_streams=n)
    sites, _, (reads, seen), (want_reads, _) = both(made_of)
    for a, b in zip(reads, want_reads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(reads[-1], torch.stack(seen[-1]).mean(0))
    assert [site.pool_weight is None for site in sites] == [False] * 9 + [True]


@pytest.mark.parametrize("memory", ["store", "replay", "inversion"])
def test_a_model_with_a_mean_at_the_end(memory):
    stored = gradients(perturbed(config("mgr-competitive:last_read=mean", stream_memory="store")))
    found = gradients(perturbed(config("mgr-competitive:last_read=mean", stream_memory=memory)))
    assert all(g.abs().sum() > 0 for g in found)
    for a, b in zip(found, stored, strict=True):
        if memory == "inversion":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(a, b)
    model = perturbed(config("mgr-competitive:last_read=mean", stream_memory=memory)).double()
    assert mixing_error(model, IDS) < 1e-12


# --- dtype of the streams --------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", ":last_read=mean", SEPARATE])
@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_streams_are_rounded_and_nothing_else(options, gate):
    """Against float64 that rounds the same: where fp32 falls on the other side of a boundary, one bf16 step differs."""
    made_of = config(f"mgr-{gate}:stream_dtype=bf16{options}", n_layer=8)
    if not options:
        made_of = config(f"mgr-{gate}:stream_dtype=bf16:stream_memory=store", n_layer=8)
    sites, inputs, (reads, seen), (want_reads, want_seen) = both(made_of, torch.bfloat16, torch.float32)
    mine = torch.cat([torch.stack(s).flatten() for s in seen])
    wanted = torch.cat([torch.stack(s).flatten() for s in want_seen])
    assert mine.dtype == torch.bfloat16 and {h.dtype for h in reads} == {torch.float32}
    assert (mine.double() == wanted).double().mean() > 0.999
    torch.testing.assert_close(mine.double(), wanted, rtol=2**-7, atol=1e-6)
    exact = torch.stack(want_reads)
    torch.testing.assert_close(torch.stack(reads).double(), exact, rtol=2**-8, atol=1e-3)
    # The rounding passes gradients on as they are, in bf16.
    leaves = [*inputs, *(p for site in sites for p in site.parameters())]
    ours, theirs = (torch.autograd.grad(torch.stack(h)[-3:].sum(), leaves) for h in (reads, want_reads))
    size = sum(b.double().square().sum() for b in theirs)
    off = sum((a.double() - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    assert (off / size).sqrt() < 0.02
    assert {g.dtype for g in ours} == {torch.float32}


RUNS = [("fp32", "bf16"), ("autocast", "bf16"), ("bf16", "fp32")]


def in_precision(precision, residual, **changes):
    model = perturbed(config(residual, **changes), size=0.1)
    if precision == "bf16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("precision, dtype", RUNS)
def test_every_memory_keeps_the_dtype(precision, dtype):
    found = {}
    for memory in ("store", "replay", "inversion"):
        spec = f"mgr-competitive:stream_dtype={dtype}"
        model = in_precision(precision, spec, stream_memory=memory)
        seen = []
        for block in model.blocks:
            for site in (block.attn_site, block.mlp_site):
                site.register_forward_hook(
                    lambda _, args, out, seen=seen: seen.append((out[0].dtype, out[1][0].dtype))
                )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found[memory] = gradients(model)
        read = torch.bfloat16 if precision == "bf16" else torch.float32
        assert set(seen) == {(read, torch.bfloat16 if dtype == "bf16" else torch.float32)}
        assert all(p.grad.dtype == p.dtype and p.grad.abs().sum() > 0 for p in model.parameters())
    for a, b in zip(found["replay"], found["store"], strict=True):
        assert torch.equal(a, b)
    total, off = (
        sum((b.double() - a.double()).square().sum() for a, b in zip(first, found["store"], strict=True))
        for first in ([torch.zeros_like(g) for g in found["store"]], found["inversion"])
    )
    assert (off / total).sqrt() < 0.01


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_the_streams_of_fp32_weights_are_fp32_already(precision):
    """So naming that dtype changes no bit."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        named, today = (
            gradients(in_precision(precision, f"mgr-competitive{option}"))
            for option in (":stream_dtype=fp32", "")
        )
    assert all(torch.equal(a, b) for a, b in zip(named, today, strict=True))


# --- cuts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, precision",
    [(":stream_dtype=bf16", "fp32"), (":stream_dtype=bf16", "autocast"), (":stream_dtype=fp32", "bf16"),
     (":stream_dtype=bf16:stream_memory=inversion", "fp32"), (":stream_dtype=bf16" + SEPARATE, "fp32"),
     (SEPARATE, "fp32"), (":last_read=mean", "fp32")],
)  # fmt: skip
def test_stages_compute_what_the_whole_does(options, precision):
    """In one process: what leaves a stage enters the next. Norms are computed with a step or behind it, which shows in
    the last bits unless reads are converted."""
    made_of, plan = config(f"mgr-competitive{options}"), ParallelPlan.parse("pp=3")
    whole = perturbed(made_of, size=0.1)
    parts = perturbed(made_of, size=0.1, cuts=cuts(made_of, plan))
    if precision == "bf16":
        for p in (*whole.parameters(), *parts.parameters()):
            p.data = p.data.bfloat16()
    stages = [GPTStage(parts, blocks) for blocks in stage_blocks(made_of.n_layer, 3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        values, crossed = (IDS,), []
        for stage in stages:
            values = stage(*values)
            crossed.append(values)
            values = values if isinstance(values, tuple) else (values,)
        (logits,) = values
        wanted = whole(IDS)
    own = "bf16" if "bf16" in options else "fp32"
    assert {x.dtype for state in crossed[:-1] for x in state} == {
        torch.bfloat16 if own == "bf16" else torch.float32
    }
    if "dtype" in options:
        assert torch.equal(logits, wanted)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    direction = torch.randn(logits.shape).to(logits.dtype)
    (logits * direction).sum().backward(), (wanted * direction).sum().backward()
    off = total = 0.0
    for name, p in whole.named_parameters():
        held = [dict(stage.named_parameters()).get(name) for stage in stages]
        found = {
            id(q): q.grad for q in held if q is not None and q.grad is not None
        }  # the embedding is in both ends
        (gradient,) = found.values()
        off += (gradient.double() - p.grad.double()).square().sum().item()
        total += p.grad.double().square().sum().item()
    # bf16: gradients of streams, too, are rounded at a cut.
    limit = 0.01 if "bf16" in (own, precision) else 1e-6
    assert (off / total) ** 0.5 < limit


def test_one_stream_of_its_own_dtype_is_not_cut():
    with pytest.raises(UserError, match="stream_dtype cannot be set for n_streams = 1 under a pipeline"):
        GPT(config("mgr-competitive:n_streams=1:stream_dtype=bf16"), cuts=(4,))
    model = perturbed(config("mgr-competitive:n_streams=1:stream_dtype=bf16"))
    assert all(g.isfinite().all() for g in gradients(model))
