"""The pool in Triton against float64 autograd of its equation, and against the same formula in its own precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from depthmix.ops import pool_eager, reference
from depthmix.ops.triton import available, interpreting, pool

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="no GPU and no interpreter")]

SCALE, EPS, NORM_EPS = 0.3, 1e-6, 1e-5


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def draw(device, k, tokens, width, dtype=torch.float32, weight=True, carried=False, norm=False, seed=0):
    """``(grad_h, [sources, weight, carried, carried_lse, norm_weight])``; every other source a strided view."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    stacked = make(tokens, k, width).to(device, dtype)
    sources = [stacked[:, i] if i % 2 else stacked[:, i].contiguous() for i in range(k)]
    rest = [make(width) if weight else None]
    rest += [make(tokens, width), make(tokens)] if carried else [None, None]
    rest += [make(width)] if norm else [None]
    return make(tokens, width).to(device, dtype), [
        sources,
        *(None if x is None else x.to(device) for x in rest),
    ]


def equation(sources, weight, carried, carried_lse, norm_weight, dtype):
    """The pool in ``dtype``, by autograd."""
    streams = torch.stack([v.to(dtype) for v in sources], 1)
    a = streams.new_zeros(streams.shape[:2])
    if weight is not None:
        a = reference.score(streams, weight.to(dtype), SCALE, EPS)
    if carried is not None:
        streams = torch.cat([streams, carried.to(dtype).unsqueeze(1)], 1)
        a = torch.cat([a, carried_lse.to(dtype).unsqueeze(1)], 1)
    h = (torch.softmax(a, 1).unsqueeze(-1) * streams).sum(1)
    if norm_weight is not None:
        rounded = h.to(sources[0].dtype).to(dtype) if dtype is torch.float32 else h
        h = reference.rms(rounded, NORM_EPS) * norm_weight.to(dtype)
    return h


def by_autograd(grad_h, arguments, dtype):
    """``[h, gradients of the sources, of the rest]``; rounded as the kernel's are unless ``dtype`` is fp64."""
    sources, *rest = arguments
    leaves = [x.detach().to(dtype).requires_grad_() for x in sources]
    others = [None if x is None else x.detach().to(dtype).requires_grad_() for x in rest]
    if dtype is not torch.float64:
        leaves = [x.detach().clone().requires_grad_() for x in sources]
    h = equation(leaves, *others, dtype)
    grads = torch.autograd.grad(h, [*leaves, *(x for x in others if x is not None)], grad_h.to(dtype))
    return [h.detach() if dtype is torch.float64 else h.detach().to(sources[0].dtype), *grads]


def backward(module, grad_h, arguments, h=None):
    """Gradients of the sources and of the rest; with ``h`` the mean that was carried is not given."""
    sources, weight, carried, *rest = arguments
    stacked = torch.empty(
        len(grad_h), len(sources), grad_h.shape[1], dtype=grad_h.dtype, device=grad_h.device
    )
    into = [stacked[:, i] if i % 2 == 0 else torch.empty_like(v) for i, v in enumerate(sources)]
    kept = weight, carried if h is None else None, *rest
    grads = module.pool_backward(grad_h, sources, *kept, SCALE, EPS, NORM_EPS, into, h)
    assert [g is None for g in grads] == [x is None for x in arguments[1:]]
    return [*into, *(g for g in grads if g is not None)]


def by_kernel(grad_h, arguments):
    return [pool.pool_forward(*arguments, SCALE, EPS, NORM_EPS), *backward(pool, grad_h, arguments)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def floor(dtype):
    """Beside twice the error of torch: what fp32 sums round where torch happens to be exact, and the rounding of the
    result, where torch's may happen to be small. Triton's interpreter cuts bf16 off instead of rounding it."""
    if dtype is torch.float32:
        return 2e-6
    return torch.finfo(dtype).eps * (2 if dtype is torch.bfloat16 and interpreting() else 0.5)


def check(grad_h, arguments):
    exact = by_autograd(grad_h, arguments, torch.float64)
    plain = by_autograd(grad_h, arguments, torch.float32)
    found = by_kernel(grad_h, arguments)
    for a, b, truth in zip(found, plain, exact, strict=True):
        assert torch.isfinite(a).all()
        if truth.abs().max() > 1e-6:
            assert error(a, truth) <= 2 * error(b, truth) + floor(grad_h.dtype)
        else:  # the score of a single source has no gradient but for rounding
            assert a.abs().max() <= 2e-5


@pytest.mark.parametrize(
    "k,width,tokens", [(1, 5, 3), (2, 33, 2), (3, 64, 4), (4, 7, 2), (5, 1, 3), (6, 130, 2)]
)
@pytest.mark.parametrize("carried,norm", [(False, False), (True, True)])
def test_error_is_at_most_twice_that_of_torch(device, k, width, tokens, carried, norm):
    check(*draw(device, k, tokens, width, carried=carried, norm=norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_low_precision(device, dtype, norm):
    check(*draw(device, 3, 4, 40, dtype=dtype, norm=norm))


@pytest.mark.parametrize(
    "weight,carried,norm", [(False, False, False), (False, True, False), (False, False, True)]
)
def test_without_a_weight(device, weight, carried, norm):
    check(*draw(device, 3, 2, 20, weight=weight, carried=carried, norm=norm))


@settings(max_examples=4)
@given(k=st.integers(1, 6), width=st.integers(1, 90), tokens=st.integers(1, 4), use=st.integers(0, 7))
def test_any_shape(device, k, width, tokens, use):
    check(*draw(device, k, tokens, width, weight=use & 1, carried=use & 2, norm=use & 4, seed=width))


def test_a_row_in_several_pieces(device):
    """D = 700 is three pieces of 256."""
    assert pool.pieces(700) == (256, 3)
    check(*draw(device, 3, 1, 700, carried=True, norm=True))


@pytest.mark.parametrize("k", [33, 49])
def test_more_sources_than_a_launch_takes(device, k):
    check(*draw(device, k, 1, 6, dtype=torch.bfloat16))


def test_a_chain_with_all_that_goes_with_it(device, monkeypatch):
    """Nine sources at four a launch; the tiled backward."""
    monkeypatch.setattr(pool, "SOURCES", 4)
    check(*draw(device, 9, 2, 12, carried=True, norm=True))


@pytest.mark.parametrize(
    "weight,carried,norm", [(True, False, False), (True, True, True), (False, True, False)]
)
def test_rows_in_tiles(device, monkeypatch, weight, carried, norm):
    monkeypatch.setattr(pool, "LONGEST_ROW", 8)
    tiles = pool._Tiles(1, 16)
    monkeypatch.setattr(pool, "_tiles", lambda *a: tiles)
    check(*draw(device, 3, 3, 50, weight=weight, carried=carried, norm=norm))


def test_a_row_longer_than_any_register_file(device, monkeypatch):
    """100003 numbers: prime, and far beyond LONGEST_ROW. Large tiles, since the interpreter counts operations."""
    if interpreting():
        monkeypatch.setattr(pool, "_tiles", lambda *a: pool._Tiles(1, 65536))
    check(*draw(device, 2, 1, 100003, dtype=torch.bfloat16))


@pytest.mark.parametrize("tiled", [False, True])
def test_a_mean_square_that_overflows_scores_zero(device, monkeypatch, tiled):
    if tiled:
        monkeypatch.setattr(pool, "LONGEST_ROW", 1)
    grad_h, (sources, weight, *rest) = draw(device, 2, 2, 8)
    sources = [sources[0] * 1e25, sources[1]]
    h, *grads = by_kernel(grad_h, [sources, weight, *rest])
    a = reference.score(sources[1], weight, SCALE, EPS)
    alpha = torch.softmax(torch.stack([torch.zeros_like(a), a]), 0).unsqueeze(-1)
    torch.testing.assert_close(h, (alpha * torch.stack(sources)).sum(0))
    assert all(torch.isfinite(g).all() for g in grads)


def test_carried_merges_into_one_softmax(device):
    """Pool over two sources, carried into a pool over three: the pool over all five."""
    _, (sources, weight, *_) = draw(device, 5, 3, 21)
    out, lse = pool.pool_many_forward(sources[:2], weight.unsqueeze(0), SCALE, EPS)
    merged = pool.pool_forward(sources[2:], weight, out[0], lse[0], None, SCALE, EPS, NORM_EPS)
    once = pool.pool_forward(sources, weight, None, None, None, SCALE, EPS, NORM_EPS)
    torch.testing.assert_close(merged, once, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "k,width,weight,dtype,tiled",
    [
        (1, 5, True, torch.float32, False),
        (5, 130, True, torch.float32, False),
        (3, 20, False, torch.float32, False),
        (3, 40, True, torch.bfloat16, False),
        (3, 50, True, torch.float32, True),
        (3, 50, False, torch.bfloat16, True),
        (32, 6, True, torch.float32, True),
    ],
)
def test_the_result_in_place_of_what_was_carried(device, monkeypatch, k, width, weight, dtype, tiled):
    """In tiles h is one more source: beside 32 of them it makes a second launch necessary."""
    if tiled:
        monkeypatch.setattr(pool, "LONGEST_ROW", 4)
    grad_h, arguments = draw(device, k, 3, width, dtype=dtype, weight=weight, carried=True)
    h, *exact = by_autograd(grad_h, arguments, torch.float64)
    h = h.to(dtype)
    found, plain = (backward(module, grad_h, arguments, h) for module in (pool, pool_eager))
    *others, of_lse = zip(found, plain, exact, strict=True)
    for a, b, truth in others:
        assert error(a, truth) <= 2 * error(b, truth) + floor(a.dtype)
    # However small, it is a difference of h . grad_h: no better than that is summed in fp32.
    a, b, truth = of_lse
    summed = torch.finfo(torch.float32).eps * (h * grad_h).abs().sum(-1).max() / truth.abs().max()
    assert error(a, truth) <= 2 * error(b, truth) + summed


def test_bits_repeat(device):
    grad_h, arguments = draw(device, 3, 7, 20, carried=True, norm=True)
    for a, b in zip(by_kernel(grad_h, arguments), by_kernel(grad_h, arguments), strict=True):
        assert torch.equal(a, b)


def test_no_tokens(device):
    grad_h, arguments = draw(device, 3, 0, 4, carried=True, norm=True)
    h, *grads = by_kernel(grad_h, arguments)
    assert h.shape == (0, 4) and [g.shape for g in grads[:3]] == [(0, 4)] * 3
    assert grads[3].eq(0).all() and grads[-1].eq(0).all()
    out, lse = pool.pool_many_forward(arguments[0], torch.ones(2, 4, device=device), SCALE, EPS)
    assert out.shape == (2, 0, 4) and lse.shape == (2, 0)


def many_by_autograd(grad_out, grad_lse, sources, queries, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*sources, queries)]
    streams = torch.stack(leaves[:-1], 1)
    a = torch.stack([reference.score(streams, q, SCALE, EPS) for q in leaves[-1]])
    out, lse = torch.einsum("qnk,nkd->qnd", torch.softmax(a, -1), streams), torch.logsumexp(a, -1)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out.to(dtype), grad_lse.to(dtype)))
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize(
    "k,count,width,dtype",
    [
        (1, 1, 5, torch.float32),
        (3, 5, 40, torch.float32),
        (4, 9, 16, torch.bfloat16),
        (33, 2, 6, torch.float32),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_several_queries(device, monkeypatch, k, count, width, dtype, kept):
    if not kept:
        monkeypatch.setattr(pool, "plan", lambda *a: None)
    g = torch.Generator().manual_seed(k)
    _, (sources, *_) = draw(device, k, 2, width, dtype=dtype)
    queries = torch.randn(count, width, generator=g).to(device)
    grad_out = torch.randn(count, 2, width, generator=g).to(device)
    grad_lse = torch.randn(count, 2, generator=g).to(device)
    out, lse = pool.pool_many_forward(sources, queries, SCALE, EPS)
    into = [torch.empty_like(v) for v in sources]
    rows = [x if q % 2 else torch.stack([x, x], 1)[:, 0] for q, x in enumerate(grad_out)]
    d_queries = pool.pool_many_backward(rows, grad_lse, sources, queries, lse, SCALE, EPS, into)
    exact = many_by_autograd(grad_out, grad_lse, sources, queries, torch.float64)
    plain = many_by_autograd(grad_out, grad_lse, sources, queries, torch.float32)
    for a, b, truth in zip([out, lse, *into, d_queries], plain, exact, strict=True):
        assert error(a, truth) <= 2 * error(b.to(a.dtype), truth) + floor(a.dtype)


@pytest.mark.parametrize("width", [1, 5, 257, 768, 1000, 1024, 1280, 5120, 7168, 8192])
@pytest.mark.parametrize("kernel", ["forward", "backward", "many"])
def test_plans_waste_little_and_fit(width, kernel):
    for k in (1, 4, 9, 32):
        launch = pool.plan(kernel, width, k, 2)
        if launch is None:
            # The number of sources and the row are held as powers of two, or nearly: up to 4 times as many numbers.
            assert kernel == "many" and k * width > 2048
            continue
        held = launch.block * launch.sub
        assert width <= held and (held <= 1.125 * width or width <= 257)
        assert launch.warps <= (32 if kernel == "many" else 16) and held <= 41 * 32 * launch.warps


def test_tuned_launches_go_first(monkeypatch):
    launch = pool.Launch(64, 2, 4, 1)
    monkeypatch.setitem(pool.TUNED, ("forward", 2, 3, 100), launch)
    assert pool.plan("forward", 100, 3, 2) is launch and pool.plan("forward", 100, 4, 2) is not launch
