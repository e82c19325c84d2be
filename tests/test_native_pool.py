"""The pool's C++ kernels against float64, with every buffer they are given full of NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.ops import native, pool_eager
from depthmix.ops.native import pool as kernels

pytestmark = pytest.mark.skipif(native.plan()[0] is None, reason="no C++ compiler: " + native.plan()[1])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = dict(scale=0.6, eps=1e-6)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty

    def full_of_nan(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(torch.nan) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch, "empty", full_of_nan)


def draw(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def rows(k, N, width, dtype, padding=0):
    """k sources, of rows ``padding`` further apart than they are long."""
    return [draw(N, width + padding, seed=i, dtype=dtype)[:, padding // 2 :][:, :width] for i in range(k)]


def widened(value):
    if isinstance(value, list):
        return [widened(x) for x in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def pooled(module, sources, weight, carried, lse, norm_weight, grad, h=None):
    numbers = (0.6, 1e-6, 1e-5)
    out = module.pool_forward(sources, weight, carried, lse, norm_weight, *numbers)
    into = [torch.full(v.shape, torch.nan, dtype=v.dtype) for v in sources]
    found = module.pool_backward(
        grad, sources, weight, None if h is not None else carried, lse, norm_weight, *numbers, into, h
    )
    return [out, *into, *(x for x in found if x is not None)]


def pooled_many(module, sources, queries, grad_out, grad_lse):
    out, lse = module.pool_many_forward(sources, queries, 0.6, 1e-6)
    into = [torch.full(v.shape, torch.nan, dtype=v.dtype) for v in sources]
    d = module.pool_many_backward(list(grad_out), grad_lse, sources, queries, lse, 0.6, 1e-6, into)
    return [out, lse, *into, d]


def check(found, plain, exact, floor=3e-6):
    for a, b, truth in zip(found, plain, exact, strict=True):
        assert a.shape == truth.shape and a.dtype == b.dtype
        worst = (b.double() - truth).abs().max().item()
        assert (a.double() - truth).abs().max().item() <= 2 * worst + floor * truth.abs().max().item()


sizes = dict(
    k=st.integers(1, 40),
    N=st.integers(1, 70),
    width=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 200, 257])),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 3]),
)


@settings(max_examples=80)
@given(**sizes, carry=st.booleans(), normed=st.booleans(), weighted=st.booleans())
def test_pool(k, N, width, dtype, padding, carry, normed, weighted):
    sources, grad = rows(k, N, width, dtype, padding), draw(N, width, seed=50, dtype=dtype)
    weight = draw(width, seed=51) if weighted else None
    carried, lse = (draw(N, width, seed=52), 2 * draw(N, seed=53)) if carry else (None, None)
    norm_weight = draw(width, seed=54) if normed else None
    arguments = [sources, weight, carried, lse, norm_weight, grad]
    exact = pooled(pool_eager, *map(widened, arguments))
    # A norm over few numbers takes the difference of nearly equal ones.
    floor = 3e-6 if not normed else 3e-5 if width > 8 else 3e-3
    check(pooled(kernels, *arguments), pooled(pool_eager, *arguments), exact, floor)
    if carry and not normed and dtype is torch.float32:
        h = exact[0].float()
        found, plain = (pooled(m, *arguments, h=h) for m in (kernels, pool_eager))
        check(found, plain, exact, 2e-5)


@settings(max_examples=60)
@given(**sizes, Q=st.integers(1, 11))
def test_pool_many(k, N, width, dtype, padding, Q):
    sources, queries = rows(k, N, width, dtype, padding), draw(Q, width, seed=60)
    arguments = [sources, queries, draw(Q, N, width, seed=61), draw(Q, N, seed=62)]
    exact = pooled_many(pool_eager, *map(widened, arguments))
    check(pooled_many(kernels, *arguments), pooled_many(pool_eager, *arguments), exact, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,N,width", [(2, 3, 40001), (3, 9001, 3), (73, 5, 1280)])
def test_long_rows_many_tokens_many_sources(k, N, width, dtype):
    """Rows of several segments, more tokens than chunks of the smallest size hold, more than 64 sources."""
    sources, grad, weight = (
        rows(k, N, width, dtype),
        draw(N, width, seed=50, dtype=dtype),
        draw(width, seed=51),
    )
    weight = weight * min(1.0, 30 / width**0.5)
    arguments = [sources, weight, None, None, None, grad]
    exact = pooled(pool_eager, *map(widened, arguments))
    check(pooled(kernels, *arguments), pooled(pool_eager, *arguments), exact, 1e-5)
    arguments = [sources, weight.expand(2, -1), draw(2, N, width, seed=61), draw(2, N, seed=62)]
    exact = pooled_many(pool_eager, *map(widened, arguments))
    # A weight e^-a has relatively the error that its logit has absolutely, 2^-24 of the logit's size (hundreds here)
    # and more. How it comes out depends on the processor's vectors, which decide the order of the logit's sum.
    v = torch.stack(list(sources)).double()
    logits = 0.6 * (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight.double()
    floor = max(1e-5, 2.0**-24 * logits.abs().max().item())
    check(pooled_many(kernels, *arguments), pooled_many(pool_eager, *arguments), exact, floor)


def test_float64_of_the_torch_operations_is_the_truth():
    """They stand for float64 above; here they are held against autograd."""
    sources = [v.double().requires_grad_() for v in rows(4, 6, 9, torch.float64)]
    weight, norm_weight = (draw(9, seed=i, dtype=torch.float64).requires_grad_() for i in (51, 54))
    carried, lse = (draw(*s, seed=52, dtype=torch.float64).requires_grad_() for s in ((6, 9), (6,)))
    grad = draw(6, 9, seed=50, dtype=torch.float64)
    v = torch.stack(sources)
    logits = 0.6 * ((v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight)
    alpha = torch.cat([logits, lse.unsqueeze(0)]).softmax(0).unsqueeze(-1)
    h = (alpha * torch.cat([v, carried.unsqueeze(0)])).sum(0)
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight
    inputs = [*sources, weight, carried, lse, norm_weight]
    want = [normed, *torch.autograd.grad(normed, inputs, grad)]
    with torch.no_grad():
        found = pooled(pool_eager, sources, weight, carried, lse, norm_weight, grad)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_and_repeat(dtype):
    sources, grad = rows(7, 1000, 33, dtype), draw(1000, 33, seed=50, dtype=dtype)
    weight, norm_weight = draw(33, seed=51), draw(33, seed=54)
    many = [sources, draw(4, 33, seed=60), draw(4, 1000, 33, seed=61), draw(4, 1000, seed=62)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            once = pooled(kernels, sources, weight, None, None, norm_weight, grad)
            results.append([*once, *pooled_many(kernels, *many)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(dtype):
    """One source is its own mixture: every kind of number, ties, the largest, infinities."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[torch.isfinite(x)].view(1, -1)
    assert torch.equal(kernels.pool_forward([x], None, None, None, None, 1.0, 1e-6, 1e-6), x)
    # The mean of two neighbours lies between them: a tie.
    a, b = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    found = kernels.pool_forward([a, b], None, None, None, None, 1.0, 1e-6, 1e-6)
    assert torch.equal(found, (0.5 * a.float() + 0.5 * b.float()).to(dtype))


def test_nan_stays_where_it_is():
    sources = rows(3, 4, 5, torch.bfloat16)
    sources[1][2, 3] = torch.nan
    h = kernels.pool_forward(sources, draw(5), None, None, None, 1.0, 1e-6, 1e-6)
    assert h[2].isnan().all() and not h[[0, 1, 3]].isnan().any()


def test_what_it_takes():
    x = torch.zeros(2, 3)
    assert kernels.usable(x) and kernels.usable(x.bfloat16())
    assert not kernels.usable(x.double()) and not kernels.usable(x.to("meta"))
