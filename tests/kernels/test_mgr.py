"""The MGR step in Triton against float64 and, to the bit, against itself; see conftest for where it runs."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from depthmix.ops import reference
from depthmix.ops.triton import interpreting, mgr

pytestmark = pytest.mark.kernels

EPS, NORM_EPS = 1e-6, 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("h", "new_streams", "beta", "y", "streams", "w1", "bias", "w2", "w3", "norm")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel forgets to write is not a number."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))


@pytest.fixture(params=["resident", "tiled"])
def path(request, monkeypatch):
    """Both ways through a token, whatever its size."""
    if request.param == "tiled":
        small_tiles(monkeypatch)
    return request.param


def small_tiles(monkeypatch, size=128):
    monkeypatch.setattr(mgr, "RESIDENT_FORWARD", size)
    monkeypatch.setattr(mgr, "RESIDENT_BACKWARD", size)


def case(n, width, tokens, device, dtype=torch.float32, gate="competitive", k=0, absent=(), seed=0):
    """Arguments of a step with random numbers of every size that matters, and gradients for its outputs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)

    made = {
        "layer_output": normal(tokens, width, scale=2.0),
        "streams": normal(tokens, n, width),
        "outputs": [normal(tokens, width) for _ in range(k)],
        "gates": [torch.rand(tokens, n, generator=g).to(device) for _ in range(k)],
        "gate_weight": normal(width, scale=2.0, dtype=torch.float32),
        "gate_bias": normal(n + (gate == "competitive"), dtype=torch.float32),
        "pool_weight": normal(width, scale=2.0, dtype=torch.float32),
        "update_weight": normal(width, dtype=torch.float32),
        "norm_weight": 1 + normal(width, scale=0.3, dtype=torch.float32),
        "gate": gate,
        "scale": width**-0.5,
        "eps": EPS,
        "norm_eps": NORM_EPS,
    }
    grads = {"grad_h": normal(tokens, width), "grad_streams": normal(tokens, n, width)}
    for name in absent:
        (grads if name in grads else made)[name] = None
    return made, grads


def forward(made, write=True):
    return mgr.step_forward(**made, write=write)


def backward(made, grads, beta):
    return mgr.step_backward(**grads, **made, beta=beta)


def both(made, grads):
    """Three outputs and seven gradients, in the order of ``NAMES``."""
    h, new, beta = forward(made)
    return h, new, beta, *backward(made, grads, beta)


def by_autograd(made, grads, dtype=None):
    """The same from the reference, in ``dtype`` or as the arguments come."""
    leaves = {
        name: None if made[name] is None else made[name].detach().to(dtype or made[name].dtype).requires_grad_()
        for name in (
            "layer_output", "streams", "gate_weight", "gate_bias", "pool_weight", "update_weight", "norm_weight",
        )
    }  # fmt: skip
    y, streams, w1, bias, w2, w3, norm = leaves.values()
    beta = reference.gate_values(y, streams, w1, bias, made["gate"], w3, made["scale"], EPS)
    h, new = reference.multi_gate_residual(y, streams, w1, bias, w2, made["gate"], w3, made["scale"], EPS)
    if norm is not None:
        compute = reference.compute_dtype(h.dtype)
        h = (reference.rms(h.to(compute), NORM_EPS) * norm.to(compute)).to(h.dtype)
    total = 0
    for x, grad in ((h, grads["grad_h"]), (new, grads["grad_streams"])):
        if grad is not None:
            total = total + (x * grad.to(x.dtype)).sum()
    found = torch.autograd.grad(
        total, [x for x in leaves.values() if x is not None], allow_unused=True, materialize_grads=True
    )
    gradients = iter(found)
    return h, new, beta, *(None if x is None else next(gradients) for x in leaves.values())


def error(x, truth):
    """The largest difference, relative to the largest value or to the inputs, whose size is 1: with a single feature
    all directions are alike, and the gradient of a score is nothing but rounding."""
    return ((x.double() - truth).abs().max() / truth.abs().max().clamp(min=1)).item()


def assert_as_good_as_torch(made, grads):
    """At most twice the error of the reference in the same precision. The floor is what one rounding of a stream may
    do, and fp32 sums over up to a hundred features and streams: the error of the reference is made of few such
    roundings, and of them it may have a lucky draw."""
    found = both(made, grads)
    truth = by_autograd(made, grads, torch.float64)
    plain = by_autograd(made, grads)
    dtype = made["streams"].dtype
    floor = 4e-6 + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)
    for name, a, b, exact in zip(NAMES, found, plain, truth, strict=True):
        assert (a is None) == (exact is None), name
        if a is None or exact.numel() == 0:
            continue
        assert a.shape == exact.shape and a.dtype == b.dtype, name
        assert error(a, exact) <= 2 * error(b, exact) + floor, name


def assert_same_bits(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None and b is None) or torch.equal(a, b), i


optional = st.sets(st.sampled_from(["pool_weight", "update_weight", "norm_weight"]))


@settings(max_examples=25, phases=[Phase.generate])
@given(
    n=st.one_of(st.integers(1, 9), st.just(17)),
    width=st.sampled_from([1, 2, 3, 17, 33, 64, 100]),
    tokens=st.sampled_from([0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    gate=st.sampled_from(["competitive", "independent"]),
    absent=optional,
    missing=st.sampled_from([(), ("grad_h",), ("grad_streams",)]),
    tiled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, n, width, tokens, dtype, gate, absent, missing, tiled, seed):
    with pytest.MonkeyPatch.context() as patch:
        if tiled:
            small_tiles(patch, 32 * 2 ** (n - 1).bit_length())
        made, grads = case(n, width, tokens, device, dtype, gate, absent=(*absent, *missing), seed=seed)
        assert_as_good_as_torch(made, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_every_option_at_once(device, path, dtype, gate):
    assert_as_good_as_torch(*case(3, 45, 4, device, dtype, gate))


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_width_of_models(device, n, dtype):
    made, grads = case(n, 768, 3, device, dtype)
    assert_as_good_as_torch(made, grads)


def test_tiles_that_do_not_fit(device):
    """By the limits as they are: the widest features and the most streams."""
    assert not mgr.plan(8, 8192, backward=False).resident
    assert_as_good_as_torch(*case(8, 8192, 1, device, torch.bfloat16))
    assert_as_good_as_torch(*case(64, 1027, 1, device, absent=("norm_weight",)))


def test_more_features_than_fit_in_one_row(device):
    made, grads = case(1, 100_003, 1, device, absent=("norm_weight",))
    assert_as_good_as_torch(made, grads)


def test_weights_and_layer_output_of_other_dtypes(device, path):
    made, grads = case(3, 20, 5, device, torch.bfloat16)
    made["layer_output"] = made["layer_output"].float()
    for name in ("gate_weight", "gate_bias", "pool_weight", "update_weight", "norm_weight"):
        made[name] = made[name].to(torch.float16)
    grads["grad_h"] = grads["grad_h"].float()
    assert_as_good_as_torch(made, grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lerp_rounds_once(device, path, dtype):
    """``fma(beta, y, (1 - beta) s)``: the product is exact in float64, so the sum is rounded once, to fp32.

    So it is on a GPU and in the interpreter of Triton 3.9; that of 3.6 rounds the product too, and fails here in fp32.
    """
    made, _ = case(5, 40, 6, device, dtype)
    _, new, beta = forward(made)
    y, streams = made["layer_output"].float(), made["streams"].float()
    carried = (1 - beta)[:, :, None] * streams
    exact = beta[:, :, None].double() * y[:, None].double() + carried.double()
    assert torch.equal(new, exact.float().to(dtype))


@pytest.mark.parametrize(
    "dtype,gate",
    [(torch.float32, "independent"), (torch.bfloat16, "competitive"), (torch.float16, "competitive")],
)
def test_a_window_has_the_bits_of_its_steps(device, path, dtype, gate):
    """Outputs and gradients, whether the streams were kept or are lerped together again."""
    made, grads = case(3, 45, 2, device, dtype, gate)
    outputs, gates, streams = [], [], made["streams"]
    for step in range(3):
        y = case(3, 45, 2, device, dtype, seed=step + 1)[0]["layer_output"]
        alone = {**made, "layer_output": y, "streams": streams}
        window = {**made, "layer_output": y, "outputs": list(outputs), "gates": list(gates)}
        stepped = both(alone, grads)
        assert_same_bits(both(window, grads), stepped)
        _, streams, beta = stepped[:3]
        outputs.append(y)
        gates.append(beta)


def test_streams_that_are_not_written(device, path):
    made, _ = case(4, 30, 5, device, k=2)
    h, _, beta = forward(made)
    unwritten = forward(made, write=False)
    assert unwritten[1] is None
    assert_same_bits((unwritten[0], unwritten[2]), (h, beta))


def test_the_same_bits_again(device, path):
    made, grads = case(3, 40, 5, device, k=1)
    assert_same_bits(both(made, grads), both(made, grads))


def test_no_tokens(device):
    made, grads = case(4, 8, 0, device, k=1)
    h, new, beta, *gradients = both(made, grads)
    assert h.shape == (0, 8) and new.shape == (0, 4, 8) and beta.shape == (0, 4)
    assert gradients[1].shape == (0, 4, 8)
    assert all((x == 0).all() for x in gradients[2:])


def test_no_gradient_at_all(device):
    made, grads = case(2, 8, 3, device, absent=("grad_h", "grad_streams", "norm_weight"))
    *gradients, norm = backward(made, grads, forward(made)[2])
    assert norm is None and all((x == 0).all() for x in gradients)


def test_a_mean_square_that_overflows_scores_zero(device, path):
    """As RMSNorm has it: the normalised vector is 0. The streams beside it are not disturbed."""
    made, grads = case(3, 40, 2, device, absent=("update_weight", "norm_weight"))
    expected = case(3, 40, 2, device, absent=("update_weight", "norm_weight"))[0]
    made["streams"][:, 1] = 1e30
    expected["streams"][:, 1] = 0
    h, new, beta, *gradients = both(made, grads)
    assert_same_bits([beta], [forward(expected)[2]])
    assert all(x is None or x.isfinite().all() for x in (h, new, *gradients))
    made["layer_output"][:] = 1e30  # then every new stream overflows, and the pool is their mean
    h, new, _ = forward(made)
    torch.testing.assert_close(h, new.mean(1))


def test_streams_that_are_zero(device, path):
    """Padding is masked, not computed: with eps = 0 its reciprocal root mean square would be infinite."""
    made, grads = case(3, 45, 3, device, absent=("update_weight", "norm_weight"))
    made["eps"] = 0.0
    assert all(x is None or x.isfinite().all() for x in both(made, grads))


@pytest.mark.parametrize("n", [1, 3, 4, 8, 33, 64])
@pytest.mark.parametrize("width", [1, 33, 768, 1280, 8192, 100_003, 2**20])
def test_plans(n, width):
    for backward_too in (False, True):
        chosen = mgr.plan(n, width, backward_too)
        assert chosen.streams >= n and chosen.warps in (1, 2, 4, 8)
        assert not chosen.resident or chosen.features >= width
        tile = chosen.tokens * chosen.streams * chosen.features
        assert tile & (tile - 1) == 0
        assert tile <= (mgr.RESIDENT_BACKWARD if backward_too else mgr.RESIDENT_FORWARD)


def test_token_numbers_are_64_bit():
    """Forward and backward, resident and tiled: nothing is multiplied by a token before the cast."""
    source = inspect.getsource(inspect.getmodule(mgr.plan))
    assert len(re.findall(r"tl\.program_id\(0\)", source)) == 4
    assert len(re.findall(r"tl\.program_id\(0\)\.to\(tl\.int64\)", source)) == 4


@pytest.mark.skipif(
    not interpreting(), reason="pretends to be a late program, which only the interpreter allows"
)
def test_beyond_two_to_the_31_numbers(monkeypatch):
    """The last token of 4 GB of streams, of which no other is touched: pages that nobody writes cost nothing."""
    monkeypatch.undo()  # no poison
    from triton.runtime import interpreter

    n, width, tokens = 8, 4096, 2**16 + 1
    assert tokens * n * width > 2**31
    small, _ = case(n, width, 1, "cpu", torch.bfloat16)
    expected = forward(small, write=False)
    builder = interpreter.interpreter_builder
    launch = mgr._launch
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (tokens - 1, 0, 0))
    )
    monkeypatch.setattr(mgr, "_launch", lambda kernel, programs, *a, **k: launch(kernel, 1, *a, **k))
    large = dict(small)
    for name in ("layer_output", "streams"):
        large[name] = torch.empty(tokens, *small[name].shape[1:], dtype=torch.bfloat16)
        large[name][-1:] = small[name]
    h, _, beta = forward(large, write=False)
    assert_same_bits((h[-1:], beta[-1:]), (expected[0], expected[2]))


def test_the_compiler_takes_them():
    """For real, for Hopper, as far as that needs no GPU; at the sizes of models no register is spilt forward."""
    calls = "[m.step_forward(y(D), s(n, D), [y(D)] * k, [b(n)] * k, w(D), w(n + 1), w(D), w3, w(D), 'competitive', " \
        ".1, 1e-6, 1e-6, True) and m.step_backward(y(D), s(n, D), y(D), s(n, D), [y(D)] * k, [b(n)] * k, b(n), w(D), " \
        "w(n + 1), w(D), w3, w(D), 'competitive', .1, 1e-6, 1e-6) " \
        "for y in [lambda D: torch.zeros(2, D, dtype=torch.bfloat16)] " \
        "for s in [lambda n, D: torch.zeros(2, n, D, dtype=torch.bfloat16)] " \
        "for b in [lambda n: torch.zeros(2, n)] for w in [lambda D: torch.zeros(D)] " \
        "for n, D, k, w3 in [(4, 1024, 1, w(1024)), (8, 768, 0, None), (8, 8192, 0, None)]]"  # fmt: skip
    command = [sys.executable, str(Path(__file__).parent / "compile_for_hopper.py"), mgr.__name__, calls]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [
        "_forward_kernel", "_backward_kernel", "_forward_kernel", "_backward_kernel",
        "_forward_tiled_kernel", "_backward_tiled_kernel",
    ]  # fmt: skip
    for name, registers, spilt in lines:
        assert int(registers) <= 255
        # Some registers of hundreds may live in the L1 cache; a layout gone wrong spills many kilobytes.
        assert int(spilt) <= (0 if name == "_forward_kernel" else 1024), (name, registers, spilt)
