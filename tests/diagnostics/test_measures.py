"""What one pass measures, against direct computation in float64 on everything at once, and on planted cases."""

import math

import numpy as np
import pytest
import torch

import depthmix
from depthmix import GPT, GPTConfig, available_residuals
from depthmix.diagnostics import measures
from depthmix.diagnostics.measures import AbsoluteHistogram, Largest, effective_rank, measure, place
from depthmix.diagnostics.subject import Run

LAYERS, WIDTH, TEXTS, LENGTH = 4, 12, 7, 10
IDS = torch.randint(40, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(1))


def model(residual, layers=LAYERS, **config):
    made = GPT(
        GPTConfig(
            vocab_size=40, n_layer=layers, d_model=WIDTH, n_head=2, seq_len=24, residual=residual, **config
        ),
        seed=0,
    ).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return made.double()


def everything(made):
    """All points on all texts at once."""
    with torch.no_grad(), depthmix.capture(made, "*") as c:
        made.hidden(IDS)
    return c


def of_sublayers(c, point_of_attention, point_of_mlp):
    """The values of both points, in the order of sublayers; ``None`` where there is none."""
    names = [f"blocks.{i}.hook_{p}" for i in range(LAYERS) for p in (point_of_attention, point_of_mlp)]
    return [c[name] if name in c else None for name in names]


def found_of(made, batch=3, ids=IDS):
    return {k: a.values for k, a in measure(Run(made, name="x"), ids, batch).items()}


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-9, "atol": 1e-12} | tolerance)


def test_places():
    assert place("blocks.0.hook_resid_pre") == ("hidden", -1)
    assert place("blocks.3.hook_resid_mid") == ("hidden", 6)
    assert place("blocks.3.hook_attn_out") == ("output", 6)
    assert place("blocks.3.hook_streams_mid") == ("streams", 6)
    assert place("blocks.3.hook_gate") == ("gate", 7)
    assert place("blocks.12.hook_pool_mid") == ("pool", 24)


@pytest.mark.parametrize("residual", available_residuals())
def test_magnitudes(residual):
    made = model(residual)
    c, found = everything(made), found_of(made)
    hidden, outputs = of_sublayers(c, "resid_mid", "resid_post"), of_sublayers(c, "attn_out", "mlp_out")
    # Squares are taken in fp32 before they are added up in fp64.
    close(found["output_rms"], [h.square().mean().sqrt() for h in hidden[1::2]], rtol=1e-6)
    close(found["sublayer_output_rms"], [y.square().mean().sqrt() for y in outputs], rtol=1e-6)
    for name, values in (("hidden", hidden), ("output", outputs)):
        for s, x in enumerate(values):
            flat = x.abs().flatten()
            order = flat.argsort(descending=True, stable=True)[:3]
            close(found[f"top_{name}"][s], flat[order])
            texts, positions, channels = np.unravel_index(order.numpy(), x.shape)
            assert found[f"top_{name}_text"][s].tolist() == texts.tolist()
            assert found[f"top_{name}_position"][s].tolist() == positions.tolist()
            assert found[f"top_{name}_channel"][s].tolist() == channels.tolist()
            assert found[f"top_{name}_token"][s].tolist() == IDS[texts, positions].tolist()
    streams = of_sublayers(c, "streams_mid", "streams")
    assert ("stream_max" in found) == (streams[-1] is not None)
    for s, x in enumerate(streams):
        if x is None:
            continue
        n = x.shape[2]
        close(found["stream_max"][s, :n], x.abs().amax((0, 1, 3)))
        close(found["stream_rms"][s, :n], x.square().mean((0, 1, 3)).sqrt(), rtol=1e-6)
        assert np.isnan(found["stream_max"][s, n:]).all() and np.isnan(found["stream_rms"][s, n:]).all()
    assert not found["not_finite"].any()


@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "hc", "siamese", "attnres"])
def test_angular_distances(residual):
    made = model(residual)
    c, found = everything(made), found_of(made)
    depths = [c["blocks.0.hook_resid_pre"], *(c[f"blocks.{i}.hook_resid_post"] for i in range(LAYERS))]
    streams = (
        [None, *(c.get(f"blocks.{i}.hook_streams") for i in range(LAYERS))]
        if "blocks.3.hook_streams" in c
        else []
    )
    n = streams[-1].shape[2] if streams else 0
    distance = found["angular_distance"]
    assert distance.shape == (1 + n, LAYERS + 1, LAYERS + 1)
    for r in range(1 + n):
        for i in range(LAYERS + 1):
            for j in range(LAYERS + 1):
                at = [depths[k] if r == 0 else streams[k] for k in (i, j)]
                if r:
                    at = [None if s is None or s.shape[2] < r else s[:, :, r - 1] for s in at]
                if j < i or at[0] is None or at[1] is None:
                    assert math.isnan(distance[r, i, j])
                elif i == j:
                    assert distance[r, i, j] == 0
                else:
                    cos = torch.nn.functional.cosine_similarity(at[0][:, -1], at[1][:, -1], dim=-1)
                    close(distance[r, i, j], (torch.arccos(cos) / math.pi).mean())
    if n:
        close(found["static_score"], [np.nanmax(d) for d in distance[1:]])
        assert found["static_streams"].tolist() == (found["static_score"] < 0.05).tolist()


@pytest.mark.parametrize("residual", available_residuals())
def test_gates_and_pools(residual):
    made = model(residual)
    c, found, run = everything(made), found_of(made), Run(made, name="x")
    gates, pools = of_sublayers(c, "gate_mid", "gate"), of_sublayers(c, "pool_mid", "pool")
    assert ("gate_mean" in found) == any(g is not None for g in gates)
    assert ("pool_mean" in found) == any(p is not None for p in pools)
    for s, g in enumerate(gates):
        if "gate_mean" not in found:
            break
        if g is None:
            assert math.isnan(found["gate_mean"][s]) and not found["gate_counts"][s].any()
            continue
        close([found[f"gate_{k}"][s] for k in ("mean", "min", "max")], [g.mean(), g.min(), g.max()])
        low, high = run.gate_range(s)
        counts = np.histogram(g.clip(low, high).numpy(), 1000, (low, high))[0]
        # A value on an edge may fall on either side.
        assert np.abs(np.cumsum(counts) - np.cumsum(found["gate_counts"][s])).max() <= 2
        levels = 0.05, 0.25, 0.5, 0.75, 0.95
        exact = np.quantile(g.clip(low, high).numpy(), levels, method="inverted_cdf")
        assert np.abs(found["gate_quantiles"][s] - exact).max() <= (high - low) / 1000
        if run.n_streams:
            close(found["gate_mean_stream"][s, : g.shape[-1]], g.mean((0, 1)))
        assert ("gate_mean_stream" in found) == (run.n_streams > 0)
    for s, p in enumerate(pools):
        if p is None:
            continue
        k = p.shape[-1]
        close(found["pool_mean"][s, :k], p.mean((0, 1)))
        assert np.isnan(found["pool_mean"][s, k:]).all()
        share = p.abs() / p.abs().sum(-1, keepdim=True)
        entropy = -(share * share.log()).nan_to_num().sum(-1).mean() / math.log(k)
        close(found["pool_entropy"][s], entropy)


@pytest.mark.parametrize("residual", ["mgr-independent", "mgr-competitive"])
def test_amplification(residual):
    made = model(residual, n_streams=3)
    c, found = everything(made), found_of(made)
    total = torch.zeros(TEXTS, LENGTH, 3, dtype=torch.float64)
    for s, g in enumerate(of_sublayers(c, "gate_mid", "gate")):
        if g is None:
            assert np.isnan(found["amplification_mean"][s]).all()
            continue
        total += torch.log10(1 / (1 - g))
        close(found["amplification_mean"][s], total.mean((0, 1)))
        close(found["amplification_max"][s], total.amax((0, 1)))


def test_amplification_is_of_convex_gates_of_streams():
    for residual in ("hc", "highway", "prenorm", "attnres"):
        assert "amplification_mean" not in found_of(model(residual))


def test_ranks_and_similarity(monkeypatch):
    made = model("mgr-competitive", n_streams=2)
    c, found = everything(made), found_of(made)
    rows = np.arange(TEXTS)
    positions = (np.random.default_rng(0).random(TEXTS) * LENGTH).astype(int)
    for depth in range(1, LAYERS + 1):
        hidden = c[f"blocks.{depth - 1}.hook_resid_post"][rows, positions]
        streams = c[f"blocks.{depth - 1}.hook_streams"][rows, positions]
        s = np.linalg.svd(hidden.numpy(), compute_uv=False)
        p = s / s.sum()
        close(found["effective_rank"][depth, 0], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)
        unit = streams / streams.norm(dim=-1, keepdim=True)
        alike = torch.einsum("tid,tjd->ij", unit, unit) / TEXTS
        close(found["stream_similarity"][depth], alike, rtol=1e-5, atol=1e-6)
    # No more samples than asked for, of texts at equal distances.
    monkeypatch.setattr(measures, "RANK_SAMPLES", 3)
    few = measures.Ranks(Run(made, name="x"), TEXTS)
    assert sorted(few.row_of) == [0, 3, 6]


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(effective_rank(torch.full((2, 2), math.nan)))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_batch_size_changes_nothing(batch):
    made = model("mgr-independent")
    some, other = found_of(made, 3), found_of(made, batch)
    assert some.keys() == other.keys()
    for name in some:
        if not name.startswith("median"):  # its samples are positions that depend on the text's number
            close(some[name], other[name], rtol=1e-6)


def test_a_planted_massive_activation_is_found_at_its_place():
    made = model("prenorm")
    token, channel = 17, 5
    ids = IDS.clone()
    ids[ids == token] = 16
    ids[4, 6] = token
    with torch.no_grad():
        made.embed.weight[token, channel] = 5000.0
    found = found_of(made, ids=ids)
    for s in range(2 * LAYERS):
        place_ = [int(found[f"top_hidden_{k}"][s, 0]) for k in ("text", "position", "channel", "token")]
        assert place_ == [4, 6, channel, token]
        assert found["top_hidden"][s, 0] > 1000 * found["median_hidden"][s]


def test_a_planted_static_stream_is_named():
    """A gate shut for stream 1 leaves it as the ramp made it."""
    made = model("mgr-independent", n_streams=3)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
        for site in Run(made, name="x").sites[2:]:
            site.gate_bias.copy_(torch.tensor([1.0, -60.0, 1.0]))
            site.gate_weight.zero_()
    found = found_of(made)
    assert found["static_streams"].tolist() == [False, True, False]
    assert found["static_score"][1] < 1e-6


def test_what_is_not_finite_is_counted_and_the_rest_still_made():
    made = model("prenorm")
    ids = IDS.clone()
    ids[ids == 17] = 16
    ids[2, 5:8] = 17
    handle = made.blocks[1].mlp.register_forward_hook(
        lambda m, args, y: y.masked_fill((ids_of_batch[0] == 17).unsqueeze(-1), math.nan)
    )
    ids_of_batch = [None]
    made.embed.register_forward_pre_hook(lambda m, args: ids_of_batch.__setitem__(0, args[0]))
    try:
        found = found_of(made, ids=ids)
    finally:
        handle.remove()
    assert found["not_finite"][:3].tolist() == [0, 0, 0]
    assert found["not_finite"][3] == 2 * 3  # in its output and behind it
    assert np.isfinite(found["output_rms"][0]) and np.isnan(found["output_rms"][1])
    assert np.isfinite(found["top_hidden"][3]).all()


def test_a_single_block_and_a_single_text():
    found = {k: a.values for k, a in measure(Run(model("prenorm", 1), name="x"), IDS[:1, :2], 8).items()}
    assert found["angular_distance"].shape == (1, 2, 2) and found["output_rms"].shape == (1,)


# --- the statistics by themselves -----------------------------------------------------------------


def test_largest_over_many_batches_is_exact():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 50, (20, 4, 6), generator=g).double()  # full of ties
    ids = torch.arange(80).view(20, 4)
    for size in (1, 3, 20):
        largest = Largest()
        for first in range(0, 20, size):
            part = x[first : first + size]
            largest.see(part, part.amax(-1), first, ids[first : first + size])
        order = x.flatten().argsort(descending=True, stable=True)[:3]
        close(largest.values, x.flatten()[order])
        if size == 20:
            texts, positions, channels = np.unravel_index(order.numpy(), x.shape)
            assert sorted(map(tuple, largest.places)) == sorted(
                zip(texts, positions, channels, ids[texts, positions].tolist(), strict=True)
            )


def test_largest_with_nan_infinity_and_too_few():
    largest = Largest()
    x = torch.tensor([[[1.0, math.nan], [math.inf, 2.0]]])
    largest.see(x, x.amax(-1), 3, torch.tensor([[8, 9]]))
    assert largest.values[:2].tolist() == [math.inf, 2.0]
    assert largest.places[0].tolist() == [3, 1, 0, 9]


def test_median_of_absolute_values():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(20001, generator=g) * 3).exp().double()
    histogram = AbsoluteHistogram()
    for part in x.split(500):
        histogram.see(part)
    assert histogram.median() == pytest.approx(x.median().item(), rel=0.03)
    histogram = AbsoluteHistogram()
    assert math.isnan(histogram.median())
    histogram.see(torch.tensor([0.0, math.nan, 0.0]))
    assert histogram.median() < 1e-18
