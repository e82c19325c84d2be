"""The C++ MGR step against float64 autograd of the equations, against torch in the same precision, and bit by bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.ops import mgr_eager, native, reference
from depthmix.ops.native import mgr

pytestmark = pytest.mark.skipif(native.plan()[0] is None, reason="no C++ compiler: " + native.plan()[1])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {"eps": 1e-6, "norm_eps": 1e-5}
GRADIENTS = (
    "layer_output",
    "streams",
    "gate_weight",
    "gate_bias",
    "pool_weight",
    "update_weight",
    "norm_weight",
)

# Relative to the largest entry: what a result may be off where torch happens to hit it exactly. In fp32 the roundings
# of a few sums; in the others one rounding, as two neighbours may be equally near.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(
    n, width, tokens, *, gate="competitive", pool=True, update=False, norm=False, dtype=torch.float32,
    output_dtype=None, seed=0, bias=0.0,
):  # fmt: skip
    """Arguments of a step and gradients of its results, every number one of its dtype."""
    g = torch.Generator().manual_seed(seed + 1000 * n + width)
    make = lambda dtype, *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    single = torch.float32
    step = {
        "layer_output": make(output_dtype or dtype, tokens, width),
        "streams": make(dtype, tokens, n, width),
        "gate_weight": make(single, width),
        "gate_bias": make(single, n + (gate == "competitive")) + bias,
        "pool_weight": make(single, width) if pool else None,
        "update_weight": make(single, width) if update else None,
        "norm_weight": make(single, width) if norm else None,
    }
    grads = make(dtype, tokens, width), make(dtype, tokens, n, width)
    return step, grads, {"gate": gate, "scale": width**-0.5, **EPS}


def window(step, k, seed=1):
    """``k`` earlier outputs and gates."""
    g = torch.Generator().manual_seed(seed)
    y, (tokens, n, _) = step["layer_output"], step["streams"].shape
    outputs = [torch.randn(y.shape, generator=g).to(y.dtype) for _ in range(k)]
    return outputs, [torch.rand(tokens, n, generator=g) for _ in range(k)]


def native_step(step, grads, options, outputs=(), gates=(), write=True):
    """``(h, new streams, beta), gradients``"""
    y, streams, *weights = step.values()
    outputs, gates = list(outputs), list(gates)
    results = mgr.step_forward(y, streams, outputs, gates, *weights, **options, write=write)
    gradients = mgr.step_backward(*grads, y, streams, outputs, gates, results[2], *weights, **options)
    return results, gradients


def torch_step(step, grads, options, dtype=None):
    """The same by autograd of the reference; in float64 for ``dtype=torch.float64``."""
    leaves = {
        name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in step.items()
    }
    *arguments, norm_weight = leaves.values()
    y, streams, gate_weight, gate_bias, pool_weight, update_weight = arguments
    chosen = options["gate"], update_weight, options["scale"], options["eps"]
    beta = reference.gate_values(y, streams, gate_weight, gate_bias, *chosen)
    h, new = reference.multi_gate_residual(y, streams, gate_weight, gate_bias, pool_weight, *chosen)
    if norm_weight is not None:
        normed = reference.rms(h.to(reference.compute_dtype(h.dtype)), options["norm_eps"]) * norm_weight
        h = normed.to(h.dtype)
    given = [(x, grad) for x, grad in zip((h, new), grads, strict=True) if grad is not None]
    wanted = {name: x for name, x in leaves.items() if x is not None}
    found = torch.autograd.grad(
        [x for x, _ in given],
        list(wanted.values()),
        [grad.to(x.dtype) for x, grad in given],
        allow_unused=True,
    )
    gradients = dict(zip(wanted, found, strict=True))
    return (h.detach(), new.detach(), beta.detach()), tuple(gradients.get(name) for name in leaves)


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(step, grads, options):
    """Every result and gradient: right shape and dtype, and an error at most twice that of torch."""
    dtype = step["streams"].dtype
    results, gradients = native_step(step, grads, options)
    exact_results, exact_gradients = torch_step(step, grads, options, torch.float64)
    plain_results, plain_gradients = torch_step(step, grads, options)
    for a, b, truth in zip(results, plain_results, exact_results, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert error(a, truth) <= 2 * error(b, truth) + FLOOR[dtype]
    for name, a, b, truth in zip(GRADIENTS, gradients, plain_gradients, exact_gradients, strict=True):
        assert (a is None) == (step[name] is None), name
        if a is None:
            continue
        assert a.shape == step[name].shape and a.dtype == step[name].dtype, name
        if truth is None:  # a parameter that nothing came from
            assert (a == 0).all(), name
        else:
            assert error(a, truth) <= 2 * error(b, truth) + FLOOR[dtype], name


def same(a, b):
    """Bit for bit, tuples of tensors and ``None``."""
    return len(a) == len(b) and all(
        x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def test_it_takes_them():
    for dtype in DTYPES:
        assert mgr.usable(torch.zeros(1, 64, 3, dtype=dtype), torch.zeros(1, 3), None)


def test_what_it_does_not_take():
    x = torch.zeros(1, 2, 3)
    assert not mgr.usable(torch.zeros(1, 65, 3)) and not mgr.usable(torch.zeros(1, 0, 3))
    assert not mgr.usable(x.double()) and not mgr.usable(x, x.double()) and not mgr.usable(x.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert not mgr.usable(torch.zeros(1, 2, 3))


@settings(max_examples=120)
@given(
    n=st.one_of(st.integers(1, 9), st.just(33)),
    width=st.integers(2, 150),
    tokens=st.integers(1, 9),
    gate=st.sampled_from(["competitive", "independent"]),
    pool=st.booleans(),
    update=st.booleans(),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    output_dtype=st.sampled_from([None, *DTYPES]),
    missing=st.sampled_from([None, None, 0, 1]),
)
def test_error_is_at_most_twice_that_of_torch(
    n, width, tokens, gate, pool, update, norm, dtype, output_dtype, missing
):
    step, grads, options = draw(
        n,
        width,
        tokens,
        gate=gate,
        pool=pool,
        update=update,
        norm=norm,
        dtype=dtype,
        output_dtype=output_dtype,
    )
    check(step, tuple(None if i == missing else x for i, x in enumerate(grads)), options)


@pytest.mark.parametrize(
    "n,width,tokens", [(4, 768, 300), (8, 768, 130), (2, 100003, 6), (5, 1, 40), (1, 1, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(n, width, tokens, dtype):
    """Several chunks of tokens, rows that are large, rows of one number.

    No norm over one number, whose gradient is all cancellation, nor over a large row, where the six sums that make
    the gradient of b are thousands of times smaller than what they add up: too few to compare errors by.
    """
    norm = 1 < width < 1000
    check(*draw(n, width, tokens, update=True, norm=norm, dtype=dtype))


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("bias", [-12.0, 12.0])
def test_gates_near_zero_and_one(gate, bias):
    step, grads, options = draw(3, 40, 20, gate=gate, update=True, norm=True)
    if gate == "competitive":  # b_0 against one of the streams
        step["gate_bias"] = torch.tensor([-bias, bias, 0.0, 0.0])
    else:
        step["gate_bias"] = torch.tensor([bias, -bias, bias])
    beta = native_step(step, grads, options)[0][2]
    assert beta.min() < 1e-3 and (beta.max() > 0.999 or bias < 0)
    check(step, grads, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_lerp_is_that_of_torch_to_the_bit(dtype, gate):
    """Replay by torch operations and by this kernel are interchangeable."""
    step, grads, options = draw(5, 133, 70, gate=gate, dtype=dtype)
    (_, new, beta), _ = native_step(step, grads, options)
    y, s = step["layer_output"].float(), step["streams"].float()
    assert torch.equal(new, mgr_eager.lerp(y, s, beta, dtype))


@settings(max_examples=60)
@given(
    n=st.integers(1, 9),
    width=st.integers(1, 150),
    tokens=st.integers(1, 70),
    k=st.integers(1, 7),
    gate=st.sampled_from(["competitive", "independent"]),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    output_dtype=st.sampled_from([None, *DTYPES]),
    past=st.booleans(),
)
def test_a_window_gives_the_bits_of_separate_steps(
    n, width, tokens, k, gate, norm, dtype, output_dtype, past
):
    """With gates that the steps made, or any others, forward and backward, written or not."""
    step, grads, options = draw(
        n, width, tokens, gate=gate, norm=norm, dtype=dtype, output_dtype=output_dtype
    )
    outputs, gates = window(step, k)
    streams = step["streams"]
    for j in range(k):
        earlier = {**step, "layer_output": outputs[j], "streams": streams}
        if past:
            _, streams, gates[j] = native_step(earlier, grads, options)[0]
        else:
            streams = mgr_eager.lerp(outputs[j].float(), streams.float(), gates[j], dtype)
    separate = native_step({**step, "streams": streams}, grads, options)
    joined = native_step(step, grads, options, outputs, gates)
    assert same(separate[0], joined[0]) and same(separate[1], joined[1])
    unwritten = native_step(step, grads, options, outputs, gates, write=False)[0]
    assert same(unwritten, (joined[0][0], None, joined[0][2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_outputs_in_several_dtypes(dtype):
    step, grads, options = draw(4, 50, 6, dtype=dtype)
    outputs, gates = window(step, 3)
    outputs = [y.to(d) for y, d in zip(outputs, DTYPES, strict=True)]
    streams = step["streams"]
    for y, beta in zip(outputs, gates, strict=True):
        streams = mgr_eager.lerp(y.float(), streams.float(), beta, dtype)
    separate = native_step({**step, "streams": streams}, grads, options)
    joined = native_step(step, grads, options, outputs, gates)
    assert same(separate[0], joined[0]) and same(separate[1], joined[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_and_repeat(dtype):
    step, grads, options = draw(4, 100, 700, update=True, norm=True, dtype=dtype)
    outputs, gates = window(step, 2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results, gradients = native_step(step, grads, options, outputs, gates)
            found.append((*results, *gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize("width", [7, 64])
def test_everything_allocated_is_written(dtype, missing, width, monkeypatch):
    step, grads, options = draw(3, width, 130, update=True, norm=True, dtype=dtype)
    grads = tuple(None if i == missing else x for i, x in enumerate(grads))
    outputs, gates = window(step, 2)
    clean = native_step(step, grads, options, outputs, gates)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    poisoned = native_step(step, grads, options, outputs, gates)
    assert same(clean[0], poisoned[0]) and same(clean[1], poisoned[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_past_the_caches_are_the_same(dtype):
    """Large results are stored by other instructions, from aligned rows and from others."""
    for width in (256, 250):
        step, grads, options = draw(4, width, 9000, dtype=dtype)
        (h, new, beta), gradients = native_step(step, grads, options)
        assert new.numel() * new.element_size() > 16 << 20
        for part in (slice(0, 1000), slice(8500, None)):
            few = {**step, "layer_output": step["layer_output"][part], "streams": step["streams"][part]}
            results, d_few = native_step(few, [x[part] for x in grads], options)
            assert same(results, (h[part], new[part], beta[part]))
            assert same(d_few[:2], (gradients[0][part], gradients[1][part]))


def test_no_tokens():
    step, grads, options = draw(4, 8, 0, update=True, norm=True)
    (h, new, beta), gradients = native_step(step, grads, options, *window(step, 2))
    assert h.shape == (0, 8) and new.shape == (0, 4, 8) and beta.shape == (0, 4)
    assert gradients[0].shape == (0, 8) and gradients[1].shape == (0, 4, 8)
    assert all(
        (d == 0).all() and d.shape == step[name].shape
        for name, d in zip(GRADIENTS[2:], gradients[2:], strict=True)
    )


def test_strided_window():
    step, grads, options = draw(4, 24, 10)
    outputs, gates = window(step, 2)
    strided = lambda x: torch.stack([x, x], -1)[..., 0]  # noqa: E731
    plain = native_step(step, grads, options, outputs, gates)
    turned = native_step(step, grads, options, [strided(x) for x in outputs], [strided(x) for x in gates])
    assert same(plain[0], turned[0]) and same(plain[1], turned[1])


def test_weights_in_other_dtypes():
    """Gradients in the weights' own; what is computed is what their fp32 copies give."""
    step, grads, options = draw(4, 24, 10, update=True, norm=True)
    low = {k: x if k in GRADIENTS[:2] else x.bfloat16() for k, x in step.items()}
    high = {k: x if k in GRADIENTS[:2] else x.float() for k, x in low.items()}
    (found, d_found), (want, d_want) = native_step(low, grads, options), native_step(high, grads, options)
    assert same(found, want) and same(
        d_found, [d.to(low[k].dtype) for k, d in zip(GRADIENTS, d_want, strict=True)]
    )


@pytest.mark.parametrize("update", [False, True])
def test_a_mean_square_that_overflows_scores_zero(update):
    step, grads, options = draw(3, 40, 5, update=update, norm=True)
    step["streams"][1:3, 0] *= 1e30
    step["layer_output"][3] *= 1e30
    results, gradients = native_step(step, grads, options)
    for a, b in zip(results, torch_step(step, grads, options)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(d is None or d.isfinite().all() for d in gradients)
    # Such a stream has no say in its gate: beta is that of a score of 0.
    zero = {**step, "streams": step["streams"].clone()}
    zero["streams"][1:3, 0] = 0
    assert same((results[2],), (native_step(zero, grads, options)[0][2],))


@settings(max_examples=40)
@given(
    n=st.integers(1, 8), width=st.integers(1, 40), gate=st.sampled_from(["competitive", "independent"]),
    size=st.sampled_from([1e-20, 1.0, 1e4, 1e18, 1e37]), bias=st.sampled_from([-20.0, 0.0, 20.0]), k=st.integers(0, 2),
)  # fmt: skip
def test_updates_are_convex(n, width, gate, size, bias, k):
    """Eq. 8 and 9, entry by entry: nothing leaves the range of what it is mixed from."""
    step, grads, options = draw(n, width, 7, gate=gate, bias=bias)
    step["streams"] *= size
    outputs, gates = window(step, k)
    h, new, _ = native_step(step, grads, options, outputs, gates)[0]
    mixed_from = torch.cat([step["streams"], *(y.unsqueeze(1) for y in (*outputs, step["layer_output"]))], 1)
    slack = 1 + 1e-5
    assert (new.abs().amax(1) <= mixed_from.abs().amax(1) * slack).all()
    assert (h.abs() <= new.abs().amax(1) * slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype):
    """Also one whose payload would round away."""
    step, grads, options = draw(2, 20, 3, dtype=dtype, output_dtype=torch.float32)
    step["layer_output"][1, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    h, new, beta = native_step(step, grads, options)[0]
    assert new[1, :, 3].isnan().all() and h[1].isnan().any()
    assert new[::2].isfinite().all() and h[::2].isfinite().all() and beta.isfinite().all()


def test_autocast_does_not_reach_inside():
    step, grads, options = draw(3, 20, 4, output_dtype=torch.bfloat16)
    plain = native_step(step, grads, options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = native_step(step, grads, options)
    assert same(plain[0], cast[0]) and same(plain[1], cast[1])
