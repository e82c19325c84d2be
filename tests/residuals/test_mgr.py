"""Multi-Gate Residuals against the equations, transcribed here a second time in float64 numpy."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import depthmix
from depthmix import functional
from depthmix.config import GPTConfig
from depthmix.residuals import build_residual


def np_rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_step(y, s, w1, b, w2, gate, w3=None, scale=None, eps=1e-6):
    """Equations 1 to 5, one token at a time: y [D], s [n, D] -> (h [D], new streams [n, D], beta [n])."""
    scale = 1 / math.sqrt(len(y)) if scale is None else scale
    g = np.array([scale * (w1 * np_rms(s_i, eps)).sum() for s_i in s])
    if w3 is not None:
        g = g + scale * (w3 * np_rms(y, eps)).sum()
    if gate == "competitive":
        beta = np_softmax(np.concatenate([[b[0]], g + b[1:]]))[1:]
    else:
        beta = 1 / (1 + np.exp(-(g + b)))
    new = np.stack([s_i + beta_i * (y - s_i) for s_i, beta_i in zip(s, beta, strict=True)])
    alpha = np_softmax(np.array([scale * (w2 * np_rms(s_i, eps)).sum() for s_i in new]))
    return (alpha[:, None] * new).sum(0), new, beta


def draw(shape_leading, n, width, gate, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    y, s = make(*shape_leading, width), make(*shape_leading, n, width)
    w1, w2, w3 = make(width) * 2, make(width) * 2, make(width)
    b = make(n + (gate == "competitive"))
    return [x.to(dtype) for x in (y, s, w1, b, w2, w3)]


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("n,width", [(1, 1), (1, 7), (2, 3), (4, 5), (8, 16), (64, 3)])
def test_step_equals_the_equations(gate, with_update, n, width):
    y, s, w1, b, w2, w3 = draw((2, 3), n, width, gate)
    update = w3 if with_update else None
    h, new = functional.multi_gate_residual(y, s, w1, b, w2, gate=gate, update_weight=update)
    assert h.shape == y.shape and new.shape == s.shape
    for i in np.ndindex(2, 3):
        want_h, want_new, _ = np_step(
            y[i].numpy(), s[i].numpy(), w1.numpy(), b.numpy(), w2.numpy(), gate,
            w3.numpy() if with_update else None,
        )  # fmt: skip
        np.testing.assert_allclose(new[i].numpy(), want_new, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(h[i].numpy(), want_h, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize(
    "dtype,bound", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_low_precision_rounds_once(gate, dtype, bound):
    """Arithmetic is fp32: the error against float64 is that of rounding the result to the stream dtype."""
    tensors = draw((5,), 4, 32, gate, dtype)
    y, s, w1, b, w2, _ = tensors
    h, new = functional.multi_gate_residual(y, s, w1, b, w2, gate=gate)
    assert h.dtype == new.dtype == dtype
    for i in range(5):
        _, want_new, _ = np_step(*(x.double().numpy() for x in (y[i], s[i], w1, b, w2)), gate)
        size = np.abs(want_new).max()
        assert np.abs(new[i].double().numpy() - want_new).max() <= bound * size
        # The pool reads the rounded streams.
        rounded = new[i].double().numpy()
        alpha = np_softmax(
            np.array([(w2.double().numpy() * np_rms(r, 1e-6)).sum() / math.sqrt(32) for r in rounded])
        )
        want_h = (alpha[:, None] * rounded).sum(0)
        assert np.abs(h[i].double().numpy() - want_h).max() <= bound * np.abs(want_h).max() + bound * 0.1


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_step_gradcheck(gate, with_update, n):
    tensors = [x.requires_grad_() for x in draw((3,), n, 5, gate)]

    def step(y, s, w1, b, w2, w3):
        return functional.multi_gate_residual(
            y, s, w1, b, w2, gate=gate, update_weight=w3 if with_update else None
        )

    assert torch.autograd.gradcheck(step, tensors)


def test_pool_gradcheck_and_forms_agree():
    sources = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for scale in (None, 1.0):
        streams = torch.stack(sources, -2).detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda w, *v, c=scale: functional.source_pool(v, w, scale=c), (weight, *sources)
        )
        assert torch.autograd.gradcheck(
            lambda w, s, c=scale: functional.attention_pool(s, w, scale=c), (weight, streams)
        )
        stacked = functional.attention_pool(torch.stack(sources, -2), weight, scale=scale)
        torch.testing.assert_close(
            functional.source_pool(sources, weight, scale=scale), stacked, rtol=0, atol=1e-14
        )
        # Against the equation.
        for t in range(4):
            v = np.stack([x[t].detach().numpy() for x in sources])
            a = (np_rms(v, 1e-6) * weight.detach().numpy()).sum(-1) * (6**-0.5 if scale is None else scale)
            np.testing.assert_allclose(
                stacked[t].detach().numpy(), (np_softmax(a)[:, None] * v).sum(0), rtol=1e-12
            )


def test_compiled_pool_and_step_equal_eager():
    y, s, w1, b, w2, w3 = draw((2, 3), 4, 8, "competitive", torch.float32)

    def both(y, s, w1, b, w2, w3):
        h, new = functional.multi_gate_residual(y, s, w1, b, w2, update_weight=w3)
        return h, new, functional.attention_pool(s, w2), functional.source_pool([y, h], w2, scale=1.0)

    for got, want in zip(torch.compile(both, fullgraph=True)(y, s, w1, b, w2, w3),
                         both(y, s, w1, b, w2, w3), strict=True):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Norms (Eq. 8, 9). Magnitudes reach where the mean square overflows or vanishes in fp32.
magnitudes = st.sampled_from([0.0, 1e-38, 1e-30, 1e-6, 1.0, 1e4, 1e15, 1e18, 1e25, 1e37])


@settings(max_examples=150)
@given(
    gate=st.sampled_from(["competitive", "independent"]),
    n=st.integers(1, 9),
    width=st.integers(1, 33),
    stream_size=magnitudes,
    output_size=magnitudes,
    weight_size=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    bias=st.floats(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_norms_never_grow(gate, n, width, stream_size, output_size, weight_size, bias, seed):
    torch.manual_seed(seed)
    y, s = torch.randn(3, width) * output_size, torch.randn(3, n, width) * stream_size
    w1, w2 = torch.randn(width) * weight_size, torch.randn(width) * weight_size
    b = torch.full((n + (gate == "competitive"),), bias)
    h, new = functional.multi_gate_residual(y, s, w1, b, w2, gate=gate)
    assert torch.isfinite(h).all() and torch.isfinite(new).all()
    norm = lambda x: x.double().norm(dim=-1)  # noqa: E731
    bound = torch.maximum(norm(s), norm(y).unsqueeze(-1))
    # A convex sum of fp32 numbers is rounded three times; an underflowing product loses 1e-45 per entry.
    slack = 1 + 4 * torch.finfo(torch.float32).eps
    assert (norm(new) <= bound * slack + 1e-44 * width).all()
    assert (
        norm(h) <= norm(new).amax(-1) * (1 + (n + 3) * torch.finfo(torch.float32).eps) + 1e-44 * width * n
    ).all()


@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_gradients_stay_finite_for_huge_and_tiny_streams(gate):
    for size in (1e-38, 1e-20, 1e15, 1e25):
        y, s, w1, b, w2, w3 = (x.requires_grad_() for x in draw((4,), 3, 8, gate, torch.float32))
        h, new = functional.multi_gate_residual(y * size, s * size, w1, b, w2, gate=gate, update_weight=w3)
        ((h / size).sum() + (new / size).sum()).backward()
        for name, x in dict(y=y, s=s, w1=w1, b=b, w2=w2, w3=w3).items():
            assert torch.isfinite(x.grad).all(), (name, size)


# The table of spec section 1: blocks, n, M, b_init, competitive beta, independent beta as printed.
TABLE = [
    (12, 4, 21, 2.8382, 0.0474, 0.0553),
    (12, 8, 17, 2.3953, 0.0527, 0.0835),
    (24, 8, 41, 3.0663, 0.0339, 0.0445),
    (36, 8, 65, 3.3706, 0.0270, 0.0332),
]


@pytest.mark.parametrize("blocks,n,depth,bias,competitive,independent", TABLE)
def test_bias_init_table(blocks, n, depth, bias, competitive, independent):
    assert 2 * blocks - (n - 1) == depth
    assert depthmix.gate_bias_init(depth, n) == pytest.approx(bias, abs=5e-5)
    for name, want in (("mgr-competitive", competitive), ("mgr-independent", independent)):
        config = GPTConfig(16, blocks, 4, 1, 8, residual=name, n_streams=n)
        residual = build_residual(config)
        site = residual.site(n)
        # Scores start at zero whatever the streams; from zeros to ones the new streams are beta itself.
        y, s = torch.ones(2, 4), torch.zeros(2, n, 4)
        _, beta = functional.multi_gate_residual(
            y, s, site.gate_weight, site.gate_bias, site.pool_weight, gate=residual.gate
        )
        torch.testing.assert_close(beta, torch.full_like(beta, want), rtol=0, atol=6e-5)
        assert residual.gate_summary()["initial_beta"] == pytest.approx(want, abs=5e-5)
        assert residual.gate_summary()["lerp"] == depth


def test_bias_init_is_sigmoid_at_the_reference_depth():
    sigmoid = 1 / (1 + math.exp(3))
    for n in (1, 2, 4, 8, 16):
        bias = depthmix.gate_bias_init(21, n)
        assert 1 / (math.exp(bias) + n) == pytest.approx(sigmoid, rel=1e-12)
    config = GPTConfig(16, 12, 4, 1, 8, residual="mgr-independent", n_streams=4, independent_init="sigmoid")
    assert build_residual(config).init_bias == pytest.approx(-3.0, abs=1e-12)


def test_bias_init_refuses_what_has_no_logarithm():
    largest = max(n for n in range(1, 64) if math.sqrt(5 / 21) * (math.exp(3) + 1) - n > 0)
    assert math.isfinite(depthmix.gate_bias_init(5, largest))
    with pytest.raises(ValueError, match=rf"M = 5 .* n = {largest + 1} .*largest n for this M is {largest}"):
        depthmix.gate_bias_init(5, largest + 1)
    with pytest.raises(ValueError, match="No n works"):
        depthmix.gate_bias_init(1, 1, base_depth=10**6)
    with pytest.raises(ValueError, match="lerp_depth must be at least 1, got 0"):
        depthmix.gate_bias_init(0, 1)


def run_trunk(config, length, width, seed=0):
    """The verbs with random sublayer outputs; returns (residual, sites, x, outputs, inputs, trunk output)."""
    g = torch.Generator().manual_seed(seed)
    residual = build_residual(config)
    sites = [residual.site(i) for i in range(1, length + 1)]
    for site in sites:
        for p in site.parameters():
            torch.nn.init.normal_(p, generator=g)
    residual.double(), [site.double() for site in sites]
    x, *outputs = (torch.randn(2, 3, width, generator=g, dtype=torch.float64) for _ in range(length + 1))
    h, state = residual.begin(x)
    inputs = [h]
    for y, site in zip(outputs, sites, strict=True):
        h, state = site(y, state)
        inputs.append(h)
    return residual, sites, x, outputs, inputs, residual.finish(h, state)


@pytest.mark.parametrize("name", ["mgr-independent", "mgr-competitive"])
@pytest.mark.parametrize(
    "n,stream_memory", [(1, "store"), (2, "replay"), (4, "store"), (4, "replay"), (8, "store")]
)
def test_ramp_and_lerp_follow_the_paper(name, n, stream_memory):
    """Embedding first, then append until n, then lerp, written as a loop over a growing list."""
    config = GPTConfig(
        16, 6, 8, 1, 8, residual=name, n_streams=n, stream_memory=stream_memory, replay_window=3
    )
    residual, sites, x, outputs, inputs, out = run_trunk(config, 12, 8)
    assert torch.equal(inputs[0], x)
    for t in np.ndindex(2, 3):
        streams = [x[t].numpy()]
        for site, y, h in zip(sites, outputs, inputs[1:], strict=True):
            if len(streams) < n:
                assert not hasattr(site, "gate_weight")
                streams.append(y[t].numpy())
                pool = site.pool_weight.detach().numpy()
                a = np.array([(pool * np_rms(s, 1e-6)).sum() / math.sqrt(8) for s in streams])
                want = (np_softmax(a)[:, None] * np.stack(streams)).sum(0)
            else:
                pool = np.zeros(8) if n == 1 else site.pool_weight.detach().numpy()
                want, new, _ = np_step(
                    y[t].numpy(), np.stack(streams), site.gate_weight.detach().numpy(),
                    site.gate_bias.detach().numpy(), pool, residual.gate,
                )  # fmt: skip
                streams = list(new)
            np.testing.assert_allclose(h[t].detach().numpy(), want, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(out[t].detach().numpy(), want, rtol=1e-11, atol=1e-13)


def test_streams_differ_from_the_start():
    """Filling up with copies is a symmetry that training never breaks: no two streams may be equal."""
    config = GPTConfig(16, 6, 8, 1, 8, n_streams=4, stream_memory="store")
    residual = build_residual(config)
    sites = [residual.site(i) for i in range(1, 13)]
    _, state = residual.begin(torch.randn(2, 3, 8))
    for site in sites:
        _, state = site(torch.randn(2, 3, 8), state)
    streams = state[0]
    distance = torch.cdist(streams, streams) + 1e9 * torch.eye(4)
    assert distance.min() > 0.1


def test_fewer_sublayers_than_streams_warns_and_works():
    config = GPTConfig(16, 2, 8, 1, 8, n_streams=8)
    with pytest.warns(UserWarning, match="4 sublayers never fill n = 8"):
        model = depthmix.GPT(config, seed=0)
    _, loss = model(torch.randint(0, 16, (2, 8)), torch.randint(0, 16, (2, 8)))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_module_matches_listing_and_signature():
    module = depthmix.MultiGateResidual(16, 4, gate="competitive", init_bias=2.5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "gate_weight": (16,),
        "gate_bias": (5,),
        "pool_weight": (16,),
    }
    assert module.gate_bias.tolist() == [2.5, 0, 0, 0, 0]
    assert (
        depthmix.MultiGateResidual(16, 4, gate="independent", init_bias=-2.0).gate_bias.tolist() == [-2.0] * 4
    )
    y, s = torch.randn(2, 3, 16), torch.randn(2, 3, 4, 16)
    h, new = module(y, s)
    # Zero weights: the mean of the new streams, every gate 1 / (exp(b0) + n).
    beta = 1 / (math.exp(2.5) + 4)
    torch.testing.assert_close(new, s + beta * (y.unsqueeze(2) - s), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h, new.mean(2), rtol=1e-5, atol=1e-6)


def test_any_leading_shape_and_strides():
    module = depthmix.MultiGateResidual(6, 3, init_bias=1.0)
    torch.nn.init.normal_(module.gate_weight), torch.nn.init.normal_(module.pool_weight)
    y, s = torch.randn(2, 5, 6), torch.randn(2, 5, 3, 6)
    h, new = module(y, s)
    strided_s = s.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided_y = y.transpose(0, 2).contiguous().transpose(0, 2)
    for got_h, got_new in (
        module(strided_y, strided_s),
        [torch.stack(z) for z in zip(*(module(y[i], s[i]) for i in range(2)), strict=True)],
    ):
        torch.testing.assert_close(got_h, h, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_new, new, rtol=1e-6, atol=1e-6)
    h0, new0 = module(y[0, 0], s[0, 0])
    torch.testing.assert_close(h0, h[0, 0]), torch.testing.assert_close(new0, new[0, 0])
    empty_h, empty_new = module(y[:, :0], s[:, :0])
    assert empty_h.shape == (2, 0, 6) and empty_new.shape == (2, 0, 3, 6)


def test_norm_weight_returns_the_next_sublayers_input():
    y, s, w1, b, w2, weight = draw((3,), 4, 8, "competitive")
    h, new = functional.multi_gate_residual(y, s, w1, b, w2)
    normed, same = functional.multi_gate_residual(y, s, w1, b, w2, norm_weight=weight, norm_eps=1e-3)
    assert torch.equal(new, same)
    np.testing.assert_allclose(normed.numpy(), np_rms(h.numpy(), 1e-3) * weight.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(layer_output=torch.randn(2, 7)), r"layer_output .* \[2, 7\] and streams \[2, 4, 8\]"),
        (
            dict(layer_output=torch.ones(2, 8, dtype=torch.long)),
            "layer_output must be floating point, got torch.int64",
        ),
        (dict(streams=torch.randn(8)), r"streams must have shape \[..., n, D\], got \[8\]"),
        (dict(streams=torch.randn(2, 65, 8)), "1 to 64 streams in dimension -2, got 65"),
        (dict(streams=torch.randn(2, 0, 8)), "1 to 64 streams in dimension -2, got 0"),
        (dict(streams=torch.randn(2, 4, 0)), "at least one feature"),
        (dict(gate_weight=torch.randn(7)), r"gate_weight must have shape \[8\].* got \[7\]"),
        (dict(pool_weight=torch.randn(1, 8)), r"pool_weight must have shape \[8\].* got \[1, 8\]"),
        (dict(gate_bias=torch.randn(4)), r"gate_bias must have shape \[5\].*competitive.* got \[4\]"),
        (dict(gate="independant"), "Did you mean 'independent'"),
        (dict(update_weight=torch.randn(9)), r"update_weight must have shape \[8\]"),
        (dict(norm_weight=torch.randn(9)), r"norm_weight must have shape \[8\]"),
        (dict(gate_weight=torch.randn(8, device="meta")), "gate_weight is on meta but streams is on cpu"),
        (dict(layer_output=[1.0]), "layer_output must be a tensor, got list"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(layer_output=torch.randn(2, 8), streams=torch.randn(2, 4, 8), gate_weight=torch.randn(8),
                     gate_bias=torch.randn(5), pool_weight=torch.randn(8))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        functional.multi_gate_residual(**(arguments | change))


def test_module_and_pool_name_bad_arguments():
    with pytest.raises(ValueError, match="n_streams must be between 1 and 64, got 0"):
        depthmix.MultiGateResidual(8, 0)
    with pytest.raises(ValueError, match="n = 4 streams in dimension -2"):
        depthmix.MultiGateResidual(8, 4)(torch.randn(2, 8), torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="sources must hold at least one"):
        functional.source_pool([], torch.randn(8))
    with pytest.raises(ValueError, match=r"sources\[1\]"):
        functional.source_pool([torch.randn(2, 8), torch.randn(3, 8)], torch.randn(8))
    with pytest.raises(ValueError, match=r"pool_weight must have shape \[8\]"):
        functional.attention_pool(torch.randn(2, 3, 8), torch.randn(3))


def test_score_scale_unit_removes_the_root():
    base = dict(residual="mgr-competitive", n_streams=3, stream_memory="store")
    paper = build_residual(GPTConfig(16, 4, 16, 1, 8, **base)).site(5)
    unit = build_residual(GPTConfig(16, 4, 16, 1, 8, score_scale="unit", **base)).site(5)
    weight = torch.randn(16)
    y, s = torch.randn(2, 16), torch.randn(2, 3, 16)
    with torch.no_grad(), warnings.catch_warnings():
        paper.gate_weight.copy_(weight * 4), paper.pool_weight.copy_(weight * 4)  # sqrt(16) = 4
        unit.gate_weight.copy_(weight), unit.pool_weight.copy_(weight)
        for a, b in zip(paper(y, (s,)), unit(y, (s,)), strict=True):
            torch.testing.assert_close(a, b)


def test_norm_and_activation_gradcheck():
    x, w = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    np.testing.assert_allclose(
        functional.rms_norm(x, w, 1e-3).numpy(), np_rms(x.numpy(), 1e-3) * w.numpy(), rtol=1e-12
    )
    np.testing.assert_array_equal(functional.relu_squared(x).numpy(), np.maximum(x.numpy(), 0) ** 2)
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: functional.rms_norm(x, w, 1e-3), (x, w))
    assert torch.autograd.gradcheck(functional.relu_squared, (x,))
