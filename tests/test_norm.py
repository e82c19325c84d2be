"""RMSNorm with and without a sum before it, by every backend, against the equation by autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.functional import add_rms_norm, rms_norm
from depthmix.ops import native
from depthmix.ops import norm as ops

backends = pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("native", marks=pytest.mark.skipif(native.plan()[0] is None, reason="no compiler")),
    ],
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a backend leaves unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def draw(rows, width, dtype=torch.float32, update_dtype=None, seed=0):
    """``[x, update, weight]`` requiring gradients, and gradients of h and of the sum."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    tensors = [
        (3 * make(rows, width)).to(dtype),
        make(rows, width).to(update_dtype or dtype),
        1 + make(width) / 4,
    ]
    return [t.requires_grad_() for t in tensors], [make(rows, width).to(dtype) for _ in range(2)]


def plain(tensors, grads, dtype, eps=1e-6):
    """``[h, total, gradients]``, the sum rounded as the first tensor's dtype rounds."""
    x, update, weight = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    total = x + update
    total = total + (total.detach().to(tensors[0].dtype).to(dtype) - total.detach())
    h = total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    found = torch.autograd.grad([h, total], leaves, [g.to(dtype) for g in grads])
    return [h.detach(), total.detach(), *found]


def run(tensors, grads):
    h, total = add_rms_norm(*tensors)
    return [h.detach(), total.detach(), *torch.autograd.grad([h, total], tensors, grads)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(tensors, grads):
    exact, reference = (plain(tensors, grads, dtype) for dtype in (torch.float64, torch.float32))
    for a, b, truth, like in zip(
        run(tensors, grads), reference, exact, [tensors[0], tensors[0], *tensors], strict=True
    ):
        assert a.dtype == like.dtype and a.shape == like.shape and torch.isfinite(a).all()
        # What torch happens to hit exactly still has the rounding of fp32 sums, and results have their own.
        floor = 2e-6 if a.dtype is torch.float32 else torch.finfo(a.dtype).eps
        assert error(a, truth) <= 2 * error(b.to(a.dtype), truth) + floor


@backends
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 17), (130, 33), (2, 300), (64, 32)])
def test_error_is_at_most_twice_that_of_the_equation(backend, rows, width, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    check(*draw(rows, width))


@backends
@pytest.mark.parametrize(
    "dtype,update_dtype",
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)],
)
def test_low_precision(backend, dtype, update_dtype, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    check(*draw(5, 40, dtype, update_dtype))


@backends
@settings(max_examples=25)
@given(rows=st.integers(1, 140), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_shape(backend, rows, width, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPTHMIX_KERNELS", backend)
        check(*draw(rows, width, seed=seed))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_it_has_the_bits_of_two_operations(backend, dtype, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    (x, update, weight), grads = draw(70, 24, dtype)
    h, total = add_rms_norm(x, update, weight)
    assert torch.equal(total, x + update)
    assert torch.equal(h, rms_norm(total, weight))
    if dtype is torch.float32:
        fused = torch.autograd.grad([h, total], [x, update, weight], grads)
        total = x + update
        apart = torch.autograd.grad([rms_norm(total, weight), total], [x, update, weight], grads)
        for a, b in zip(fused, apart, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_wider_update_promotes_as_a_sum_does():
    (x, update, weight), _ = draw(3, 8, torch.bfloat16, torch.float32)
    h, total = add_rms_norm(x, update, weight)
    assert h.dtype == total.dtype == torch.float32


@backends
def test_what_is_not_used_needs_no_gradient(backend, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    tensors, grads = draw(7, 12)
    for k, (index, grad) in enumerate(zip((0, 1), grads, strict=True)):
        one = torch.autograd.grad(
            add_rms_norm(*tensors)[index], tensors, grad, allow_unused=True, materialize_grads=True
        )
        both = [torch.zeros_like(grad)] * 2
        both[k] = grad
        for a, b in zip(one, plain(tensors, both, torch.float64)[2:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.plan()[0] is None, reason="no compiler")
def test_bits_do_not_depend_on_threads():
    (x, update, weight), (grad, grad_total) = draw(200, 24)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            h, total, r = ops.native.forward(x, update, weight, 1e-6)
            results.append([h, total, r, *ops.native.backward(grad, grad_total, total, weight, r)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
def test_no_rows(backend, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    h, total, d_x, d_update, d_weight = run(*draw(0, 6))
    assert h.shape == total.shape == d_x.shape == d_update.shape == (0, 6)
    assert d_weight.eq(0).all()


@backends
def test_a_row_whose_mean_square_overflows_becomes_zero(backend, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    (x, update, weight), grads = draw(2, 8)
    huge = (x.detach() * 1e30).requires_grad_()
    h, total = add_rms_norm(huge, update, weight)
    assert (h == 0).all() and torch.isfinite(total).all()
    assert all(
        torch.isfinite(g).all() for g in torch.autograd.grad([h, total], [huge, update, weight], grads)
    )


def test_gradcheck(monkeypatch):
    monkeypatch.undo()
    tensors = [t.detach().double().requires_grad_() for t in draw(3, 5)[0]]
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, 1e-3), tensors)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (tensors[0], tensors[2]))


@backends
def test_any_leading_dimensions_and_strides(backend, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    (x, update, weight), _ = draw(12, 10)
    h, _ = add_rms_norm(x, update, weight)
    turned = x.detach().view(3, 4, 10).transpose(0, 1), update.detach().view(3, 4, 10).transpose(0, 1)
    found, total = add_rms_norm(*turned, weight)
    assert torch.equal(found, h.view(3, 4, 10).transpose(0, 1)) and total.shape == (4, 3, 10)


def test_compiled_it_is_what_it_is_eager(monkeypatch):
    monkeypatch.undo()
    tensors, grads = draw(6, 16)
    eager = run(tensors, grads)
    torch._dynamo.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    h, total = compiled(*tensors)
    for a, b in zip([h, total, *torch.autograd.grad([h, total], tensors, grads)], eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
