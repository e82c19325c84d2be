"""Highway, convex and additive, against its equations transcribed per token; and the op under every channel gate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import depthmix
from depthmix.config import GPTConfig
from depthmix.memory import saved_bytes
from depthmix.ops.channel_gate import admit, channel_gate, gated_update, run_gate
from depthmix.optim import parameter_groups
from depthmix.residuals import build_residual


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def np_rms(x, eps):
    return x / np.sqrt((x**2).mean() + eps)


def np_sigmoid(z):
    return 1 / (1 + np.exp(-z))


def config(residual, n_layer=3, d_model=8, **changes):
    return GPTConfig(16, n_layer, d_model, 1, 8, residual=residual, **changes)


def run_trunk(config, seed=0):
    """The verbs in float64 with random parameters and outputs: ``(sites, x, outputs, inputs, trunk output)``."""
    g = torch.Generator().manual_seed(seed)
    residual = build_residual(config).double()
    sites = [residual.site(i).double() for i in range(1, config.n_sublayers + 1)]
    for site in sites:
        for p in site.parameters():
            torch.nn.init.normal_(p, generator=g)
    draw = lambda: torch.randn(2, 3, config.d_model, generator=g, dtype=torch.float64)  # noqa: E731
    x, outputs = draw(), [draw() for _ in sites]
    h, state = residual.begin(x)
    inputs = [h]
    for y, site in zip(outputs, sites, strict=True):
        h, state = site(y, state)
        inputs.append(h)
    return sites, x, outputs, inputs, residual.finish(h, state)


@pytest.mark.parametrize("name", ["highway", "highway-additive"])
def test_trunk_follows_the_equations(name):
    sites, x, outputs, inputs, out = run_trunk(config(name, norm_eps=1e-2))
    assert torch.equal(inputs[0], x)
    for t in np.ndindex(2, 3):
        state = x[t].numpy()
        for site, y, h in zip(sites, outputs, inputs[1:], strict=True):
            W, b = site.gate_weight.detach().numpy(), site.gate_bias.detach().numpy()
            if name == "highway":
                gate = np_sigmoid(W @ np_rms(state, 1e-2) + b)
                state = (1 - gate) * state + gate * y[t].numpy()
            else:
                gate = np_sigmoid(W @ state + b)
                state = state + gate * y[t].numpy()
            np.testing.assert_allclose(h[t].detach().numpy(), state, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(out[t].detach().numpy(), state, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("blocks", [1, 4, 12, 36, 64])
def test_carry_bias_falls_with_depth(blocks):
    """-ln(sqrt(L / 21) (e^3 + 1) - 1), written out; and what every gate is before training."""
    length = 2 * blocks
    want = -math.log(math.sqrt(length / 21) * (math.exp(3) + 1) - 1)
    site = build_residual(config("highway", n_layer=blocks)).site(1)
    assert want < 0 and site.gate_bias.tolist() == pytest.approx([want] * 8, rel=1e-6)
    assert want == pytest.approx(-0.5 * math.log(length) - 1.5, abs=0.15)
    x, y = torch.randn(5, 8) * 10, torch.randn(5, 8)
    (gate,) = site.gates(y, (x,))
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / (1 + math.exp(-want))))


def test_bias_options():
    scaled = build_residual(config("highway:gate_base_depth=6:gate_base_bias=-2")).site(1)
    assert scaled.gate_bias.tolist() == pytest.approx([-2] * 8)
    assert build_residual(config("highway:bias=-1.5")).site(2).gate_bias.tolist() == [-1.5] * 8
    assert build_residual(config("highway:bias=0")).site(2).gate_bias.tolist() == [0.0] * 8
    assert build_residual(config("highway-additive:bias=2")).site(2).gate_bias.tolist() == [2.0] * 8
    with pytest.raises(ValueError, match=r"highway: bias must be a number or none, got 'low'"):
        config("highway:bias=low")
    with pytest.raises(ValueError, match=r"highway-additive: bias must be a number, got 'none'"):
        config("highway-additive:bias=none")
    with pytest.raises(ValueError, match=r"highway-additive: init must be zero or normal, got 'uniform'"):
        config("highway-additive:init=uniform")
    with pytest.raises(ValueError, match=r"highway has no option 'init'.*gate_base_depth"):
        config("highway:init=normal")


def test_additive_starts_by_admitting_half():
    connection = build_residual(config("highway-additive"))
    x, y = torch.randn(5, 8) * 30, torch.randn(5, 8)
    torch.testing.assert_close(connection.site(1)(y, (x,))[0], x + y / 2)


def test_normal_init_leaves_the_models_draws_alone():
    zero = dict(depthmix.GPT(config("highway-additive", d_model=64), seed=3).named_parameters())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    drawn = depthmix.GPT(config("highway-additive:init=normal", d_model=64), seed=3)
    assert torch.equal(torch.get_rng_state(), after)
    weights = []
    for name, p in drawn.named_parameters():
        if name.endswith("gate_weight"):
            assert abs(p.mean().item()) < 0.002 and p.std().item() == pytest.approx(0.02, rel=0.05)
            assert zero[name].abs().max() == 0
            weights.append(p)
        else:
            assert torch.equal(p, zero[name]), name
    assert len(weights) == 6 and not torch.equal(weights[0], weights[1])


def test_convex_gradient_of_the_identity_path():
    """With the outputs held, dx_L / dx_0 starts at (1 - sigmoid(b))^L: 2^-L at b = 0, most of it at b = -3."""
    for name, bias in (("highway", 0.0), ("highway", -3.0), ("review-convex", 0.0), ("review-convex", -3.0)):
        connection = build_residual(config(f"{name}:bias={bias}", n_layer=10))
        x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
        state = (x,)
        for i in range(1, 21):
            state = connection.site(i).double().write(torch.zeros(2, 8, dtype=torch.float64), state)
        state[0].sum().backward()
        kept = (1 - 1 / (1 + math.exp(-bias))) ** 20
        torch.testing.assert_close(x.grad, torch.full_like(x, kept), rtol=1e-10, atol=0)


def test_matrices_of_gates_are_adamws():
    for name in ("highway", "highway-additive", "review", "review-convex"):
        groups = parameter_groups(depthmix.GPT(config(name), seed=0))
        names = {group: {n for n, _ in members} for group, members in groups.items()}
        gates = [f"blocks.{b}.{s}_site.gate_" for b in range(3) for s in ("attn", "mlp")]
        assert {g + "weight" for g in gates} <= names["adamw"], name
        assert {g + "bias" for g in gates} <= names["adamw_no_decay"], name


# The op under all four.
FORMS = [
    dict(convex=convex, normalise=normalise, see_update=see_update)
    for convex in (False, True)
    for normalise in (False, True)
    for see_update in (False, True)
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(k for k in f if f[k]) or "plain")


def arguments(form, width, leading=(3,), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (*leading, width), (*leading, width), (width, width * (1 + form["see_update"])), (width,)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def options(form):
    return dict(convex=form["convex"], normalise=form["normalise"])


def plainly(x, u, weight, bias, *, convex, normalise, eps):
    """The differentiable form, which autograd takes apart."""
    gate = channel_gate(x, u, weight, bias, normalise, eps)
    return admit(x.to(gate.dtype), u.to(gate.dtype), gate, convex).to(x.dtype)


@forms
@pytest.mark.parametrize("width", [1, 5, 8])
def test_op_gradcheck(form, width):
    tensors = [t.requires_grad_() for t in arguments(form, width)]
    assert torch.autograd.gradcheck(lambda *t: gated_update(*t, **options(form), eps=1e-3), tensors)


@forms
def test_op_equals_the_equation_and_autograd(form):
    x, u, weight, bias = tensors = [t.requires_grad_() for t in arguments(form, 7, leading=(2, 3))]
    out = gated_update(*tensors, **options(form), eps=1e-2)
    for t in np.ndindex(2, 3):
        xt, ut = x[t].detach().numpy(), u[t].detach().numpy()
        seen = [xt, ut] if form["see_update"] else [xt]
        seen = np.concatenate([np_rms(s, 1e-2) if form["normalise"] else s for s in seen])
        gate = np_sigmoid(weight.detach().numpy() @ seen + bias.detach().numpy())
        want = (1 - gate) * xt + gate * ut if form["convex"] else xt + gate * ut
        np.testing.assert_allclose(out[t].detach().numpy(), want, rtol=1e-12)
    upstream = torch.randn_like(out)
    by_hand = torch.autograd.grad(out, tensors, upstream)
    by_autograd = torch.autograd.grad(plainly(*tensors, **options(form), eps=1e-2), tensors, upstream)
    for a, b in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@forms
@pytest.mark.parametrize(
    "dtype,ulp", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_low_precision_rounds_once(form, dtype, ulp):
    """Arithmetic is fp32: against float64 on the same inputs, the error is that of rounding the result."""
    tensors = arguments(form, 33, leading=(9,), dtype=dtype)
    got = gated_update(*tensors, **options(form))
    want = gated_update(*(t.double() for t in tensors), **options(form))
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= ulp * want.abs() + 4e-6).all()


@pytest.mark.parametrize("form,compiled", [*((f, False) for f in FORMS), (FORMS[0], True), (FORMS[-1], True)])
def test_autocast_does_not_reach_the_gate(form, compiled):
    tensors = arguments(form, 16, leading=(4,), dtype=torch.float32)
    run = lambda *t: gated_update(*t, **options(form))  # noqa: E731
    plain = run(*tensors)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(*tensors)
    # bf16 would miss by some 1e-2.
    torch.testing.assert_close(got, plain, rtol=2e-6, atol=2e-6)
    assert got.dtype == torch.float32


magnitudes = st.sampled_from([0.0, 1e-38, 1e-30, 1e-6, 1.0, 1e4, 1e15, 1e18, 1e25, 1e37])


@settings(max_examples=150)
@given(
    see_update=st.booleans(),
    width=st.integers(1, 33),
    state_size=magnitudes,
    update_size=magnitudes,
    weight_size=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    bias=st.floats(-40, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_convex_form_stays_between_state_and_update(
    see_update, width, state_size, update_size, weight_size, bias, dtype, seed
):
    torch.manual_seed(seed)
    x, u = (torch.randn(3, width) * state_size).to(dtype), (torch.randn(3, width) * update_size).to(dtype)
    weight = torch.randn(width, width * (1 + see_update)) * weight_size
    new = gated_update(x, u, weight, torch.full((width,), bias), convex=True)
    assert torch.isfinite(new).all()
    low, high = torch.minimum(x, u).double(), torch.maximum(x, u).double()
    # Three roundings, each of a product or sum no larger than the larger end.
    slack = 4 * torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs()) + 1e-44
    assert ((new.double() >= low - slack) & (new.double() <= high + slack)).all()
    assert (new.double().abs() <= torch.maximum(low.abs(), high.abs()) + slack).all()


@forms
def test_gradients_stay_finite_for_huge_and_tiny_streams(form):
    for size in (1e-38, 1e-20, 1e15, 1e25) if form["normalise"] else (1e-38, 1e-20, 1e15):
        x, u, weight, bias = tensors = [t.requires_grad_() for t in arguments(form, 8, dtype=torch.float32)]
        out = gated_update(x * size, u * size, weight, bias, **options(form))
        (out / size).sum().backward()
        for name, t in zip(("x", "update", "weight", "bias"), tensors, strict=True):
            assert torch.isfinite(t.grad).all(), (name, size)


@forms
def test_op_takes_any_strides_and_no_rows(form):
    x, u, weight, bias = arguments(form, 6, leading=(2, 5))
    want = gated_update(x, u, weight, bias, **options(form))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, u, weight)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(gated_update(*strided, bias, **options(form)), want)
    assert gated_update(x[:, :0], u[:, :0], weight, bias, **options(form)).shape == (2, 0, 6)


def test_only_state_update_and_gate_are_kept():
    """Beyond PreNorm, which keeps the state: the update, the gate and one number per normed row."""
    ids = torch.randint(0, 16, (2, 8))
    kept = {}
    for name in ("prenorm", "highway", "highway-additive", "review", "review-convex"):
        kept[name] = saved_bytes(depthmix.GPT(config(name), seed=0), ids, ids)
    length, tokens, width = 6, 16, 8
    for name, normed in (("highway", 1), ("highway-additive", 0), ("review", 2), ("review-convex", 2)):
        assert kept[name] - kept["prenorm"] == 4 * length * tokens * (2 * width + normed), name


def test_an_input_is_never_returned():
    """An autograd function that returns its input itself can be asked for its gradient twice."""
    x, u, weight, bias = (t.requires_grad_() for t in arguments(FORMS[0], 4))
    out, *_ = run_gate.direct(x, u, weight, bias, False, True, 1e-6)
    assert out.data_ptr() not in (x.data_ptr(), u.data_ptr())
