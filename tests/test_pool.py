"""The pool as registered operations: gradients, schemas, shapes, and one softmax whatever is carried into it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from depthmix import functional
from depthmix.ops import native, pool, reference

SCALE, EPS, NORM_EPS = 0.7, 1e-6, 1e-5
BACKENDS = ["torch", *(["native"] if native.plan()[0] else [])]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", request.param)
    return request.param


def draw(*shape, seed=0, dtype=torch.float64, grad=True):
    g = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)


def sources_of(k, *shape, dtype=torch.float64, grad=True):
    return [((1 + i % 3) * draw(*shape, seed=i, grad=False)).to(dtype).requires_grad_(grad) for i in range(k)]


def as_written(sources, weight, norm_weight=None):
    """The equations, by the reference, and the norm of the mixture as it was rounded."""
    h = reference.attention_pool(torch.stack(sources, -2), weight, SCALE, EPS)
    if norm_weight is None:
        return h
    dtype = reference.compute_dtype(h.dtype)
    return (reference.rms(h.to(dtype), NORM_EPS) * norm_weight.to(dtype)).to(h.dtype)


def of_streams(sources, weight, norm_weight):
    return pool.pool_streams(
        torch.stack(sources, -2), weight, norm_weight, scale=SCALE, eps=EPS, norm_eps=NORM_EPS
    )


def of_list(sources, weight, norm_weight):
    return pool.pool(sources, weight, None, None, norm_weight, scale=SCALE, eps=EPS, norm_eps=NORM_EPS)


def in_two_phases(sources, weight, norm_weight, fresh=1, others=2):
    """All but the last ``fresh`` sources together with queries of other readers, then the rest."""
    finished = sources[: len(sources) - fresh]
    weights = torch.stack([*(weight.detach().flip(0) * (j + 1) for j in range(others)), weight])
    means, lses = pool.pool_many(finished, weights, scale=SCALE, eps=EPS)
    return pool.pool(
        sources[len(finished) :], weight, means[-1], lses[-1], norm_weight, scale=SCALE, eps=EPS,
        norm_eps=NORM_EPS,
    )  # fmt: skip


WAYS = {"list": of_list, "streams": of_streams, "two phases": in_two_phases}


def outputs_and_gradients(way, sources, weight, norm_weight, seed=3):
    h = way(sources, weight, norm_weight)
    inputs = [*sources, *(w for w in (weight, norm_weight) if w is not None)]
    grad = draw(*h.shape, seed=seed, grad=False).to(h.dtype)
    return [h.detach(), *torch.autograd.grad(h, inputs, grad)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_exact_in_float64(way, weighted, normed):
    if way == "two phases" and not weighted:
        return
    sources, weight, norm_weight = sources_of(5, 2, 3, 7), draw(7), draw(7, seed=9)
    arguments = sources, weight if weighted else None, norm_weight if normed else None
    found = outputs_and_gradients(WAYS[way], *arguments)
    want = outputs_and_gradients(as_written, *arguments)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def together(results):
    """The sources' gradients as one: which of them roundings hit, is chance."""
    h, *gradients = results
    sources = [g for g in gradients if g.shape == h.shape]
    return h, torch.stack(sources), *gradients[len(sources) :]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(data=st.data())
def test_error_is_at_most_twice_that_of_the_reference(way, data):
    """Any number of sources of any shape, in each dtype, with kernels and without."""
    k = data.draw(st.integers(2, 40), "k")
    shape = (data.draw(st.integers(1, 40), "N"), data.draw(st.integers(1, 90), "D"))
    # Of 16-bit sources in two phases, gradients come from the rounded mixture: see the test of that below.
    dtypes = [torch.float32] + ([torch.bfloat16, torch.float16] if way != "two phases" else [])
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    norm_weight = draw(shape[1], seed=9, dtype=torch.float32) if data.draw(st.booleans(), "normed") else None
    sources, weight = sources_of(k, *shape, dtype=dtype), draw(shape[1], dtype=torch.float32)
    wide = [x if x is None else x.detach().double().requires_grad_() for x in (*sources, weight, norm_weight)]
    exact = outputs_and_gradients(as_written, wide[:k], *wide[k:])
    plain = outputs_and_gradients(as_written, sources, weight, norm_weight)
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEPTHMIX_KERNELS", backend)
            found = outputs_and_gradients(WAYS[way], sources, weight, norm_weight)
        # Gradients of a norm are differences of large numbers: at D = 1, of equal ones. Of 16 bits, the reference may
        # be lucky in its last rounding: half a unit.
        floor = 1e-5 if norm_weight is None else 1e-4
        if dtype is not torch.float32:
            floor += torch.finfo(dtype).eps / 2
        for a, b, truth in zip(*map(together, (found, plain, exact)), strict=True):
            scale = max(1.0, exact[0].abs().max().item()) if shape[1] < 4 else 0.0
            bound = floor * (truth.abs().max().item() + scale)
            if way == "two phases":
                # Where one weight is nearly 1, the reference subtracts a product from itself, and here it is subtracted
                # from that of h: a rounding of |h . grad| where nothing is left.
                bound += 1e-6 * exact[0].abs().max().item() * shape[1]
            worst = (b.double() - truth).abs().max().item()
            assert (a.double() - truth).abs().max().item() <= 2 * worst + bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_phases_of_16_bits(dtype, backend):
    """The mixture is not kept twice, so its product with its gradient is that of the rounded one. Were everything else
    exact, that would be this error; the gradient itself, rounded, brings as much."""
    sources, weight = sources_of(9, 40, 64, dtype=dtype), draw(64, dtype=torch.float32)
    weight = (weight.detach() / 4).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (*sources, weight)]
    exact = outputs_and_gradients(as_written, wide[:9], wide[9], None)
    found = outputs_and_gradients(in_two_phases, sources, weight, None)
    once = outputs_and_gradients(of_list, sources, weight, None)
    assert error(found[0], exact[0]) <= 2 * error(once[0], exact[0])
    unit = torch.finfo(dtype).eps
    for a, truth in zip(found[1:], exact[1:], strict=True):
        assert error(a, truth) <= 8 * unit


@pytest.mark.parametrize("fresh", range(1, 12))
def test_one_softmax_however_it_is_divided(fresh, backend):
    sources, weight, norm_weight = (
        sources_of(12, 6, 16, dtype=torch.float32),
        draw(16, dtype=torch.float32),
        None,
    )

    def divided(*arguments):
        return in_two_phases(*arguments, fresh=fresh)

    whole = outputs_and_gradients(of_list, sources, weight, norm_weight)
    for a, b in zip(outputs_and_gradients(divided, sources, weight, norm_weight), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_mean_and_log_sum_exp_themselves(backend):
    """Each used alone and together, by something that is no pool."""
    wide = [*sources_of(4, 5, 6), draw(3, 6)]
    narrow = [x.detach().float().requires_grad_() for x in wide]

    def transcribed(*inputs):
        v, logits = torch.stack(inputs[:4]), []
        for w in inputs[4]:
            logits.append(SCALE * ((v / (v.square().mean(-1, keepdim=True) + EPS).sqrt()) @ w))
        a = torch.stack(logits)
        return (a.softmax(1).unsqueeze(-1) * v).sum(1), a.logsumexp(1)

    def computed(*inputs):
        return map(torch.stack, pool.pool_many(inputs[:4], inputs[4], scale=SCALE, eps=EPS))

    for used in ((0,), (1,), (0, 1)):
        losses = []
        for function, inputs in ((transcribed, wide), (computed, wide), (computed, narrow)):
            out = [x.pow(2) for x in function(*inputs)]
            losses.append(torch.autograd.grad(sum(out[i].sum() for i in used), inputs))
        for exact, a, b in zip(*losses, strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(b.double(), exact, rtol=1e-4, atol=1e-5)
    # One reader of three, its log-sum-exp alone.
    one = torch.autograd.grad(pool.pool_many(wide[:4], wide[4], scale=SCALE, eps=EPS)[1][1].sum(), wide)
    want = torch.autograd.grad(transcribed(*wide)[1][1].sum(), wide)
    for a, b in zip(one, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


REGISTERED = {
    "pool": lambda d: (
        pool.run_pool.operation,
        ([d(2, 3, 5), d(2, 3, 5)], d(5), None, None, d(5), SCALE, EPS, 1e-5),
    ),
    "equal": lambda d: (pool.run_pool.operation, ([d(4, 5)] * 1, None, None, None, None, SCALE, EPS, 1e-5)),
    "carried": lambda d: (
        pool.run_pool.operation,
        ([d(2, 3, 5), d(2, 3, 5)], d(5), d(2, 3, 5), d(2, 3), None, SCALE, EPS, 1e-5),
    ),
    "carried, normed": lambda d: (
        pool.run_pool.operation,
        ([d(4, 5), d(4, 5)], d(5), d(4, 5), d(4), d(5), SCALE, EPS, 1e-5),
    ),
    "streams": lambda d: (pool.run_pool_streams.operation, (d(2, 3, 4, 5), d(5), d(5), SCALE, EPS, 1e-5)),
    "many": lambda d: (pool.registered_pool_many, ([d(2, 3, 5), d(2, 3, 5)], d(4, 5), SCALE, EPS)),
}


def drawn_differently():
    count = iter(range(100))
    return lambda *shape, dtype=torch.float64: draw(*shape, seed=next(count), dtype=dtype)


@pytest.mark.parametrize("case", REGISTERED)
def test_opcheck(case, backend):
    make = drawn_differently()
    operation, arguments = REGISTERED[case](lambda *shape: make(*shape, dtype=torch.float32))
    opcheck(operation, arguments)


@pytest.mark.parametrize("case", REGISTERED)
def test_gradcheck(case):
    operation, arguments = REGISTERED[case](drawn_differently())
    many = isinstance(arguments[0], list)
    tensors = [*arguments[0], *arguments[1:]] if many else list(arguments)
    places = [i for i, x in enumerate(tensors) if isinstance(x, torch.Tensor)]
    count = len(arguments[0]) if many else 0
    direct = {f.operation: f.direct for f in (pool.run_pool, pool.run_pool_streams)}

    def run(function, *values):
        given = list(tensors)
        for i, x in zip(places, values, strict=True):
            given[i] = x
        return function(given[:count], *given[count:]) if many else function(*given)

    def registered(*values):
        return run(operation, *values)

    def by_hand(*values):
        if operation in direct:
            return run(direct[operation], *values)
        return run(lambda sources, *rest: pool.PoolMany.apply(*rest, *sources), *values)

    inputs = tuple(tensors[i] for i in places)
    # A mean of equal vectors has a log-sum-exp and a mean that belong together; any pair is as good here.
    for function in (registered, by_hand):
        assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("case", ["pool_backward", "streams_backward", "many_backward"])
def test_opcheck_of_backwards(case, backend):
    make = drawn_differently()
    d = lambda *shape: make(*shape, dtype=torch.float32).detach()  # noqa: E731
    tests = ("test_schema", "test_faketensor")
    if case == "pool_backward":
        shared = ([d(4, 5), d(4, 5)], d(5))
        numbers = (SCALE, EPS, 1e-5)
        operation = pool.registered_pool_backward
        opcheck(operation, (d(4, 5), *shared, None, None, None, d(5), *numbers), test_utils=tests)
        opcheck(operation, (d(4, 5), *shared, d(4, 5), None, d(4), None, *numbers), test_utils=tests)
        opcheck(operation, (d(4, 5), *shared, None, d(4, 5), d(4), d(5), *numbers), test_utils=tests)
    elif case == "streams_backward":
        arguments = (d(4, 5), d(4, 3, 5), d(5), None, SCALE, EPS, 1e-5)
        opcheck(pool.registered_streams_backward, arguments, test_utils=tests)
    else:
        arguments = (d(2, 4, 5), d(2, 4), [d(4, 5), d(4, 5)], d(2, 5), d(2, 4), SCALE, EPS)
        opcheck(pool.registered_pool_many_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_as_one_graph(way, backend):
    torch._dynamo.reset()
    sources, weight = sources_of(4, 2, 3, 8, dtype=torch.float32), draw(8, dtype=torch.float32)
    norm_weight = draw(8, seed=9, dtype=torch.float32)
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(WAYS[way], fullgraph=True, backend=look)(sources, weight, norm_weight)
    assert "depthmix.pool" in graphs[0].code
    torch._dynamo.reset()
    for norm in (None, norm_weight):
        found = outputs_and_gradients(torch.compile(WAYS[way], fullgraph=True), sources, weight, norm)
        for a, b in zip(found, outputs_and_gradients(WAYS[way], sources, weight, norm), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_shapes_without_storage(way):
    sources = [
        torch.empty(2, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(4)
    ]
    weight = torch.empty(8, device="meta", requires_grad=True)
    if way != "two phases":
        h = WAYS[way](sources, weight, None)
    else:
        means, lses = pool.pool_many(sources[:3], weight.unsqueeze(0), scale=1.0, eps=EPS)
        assert means[0].dtype == lses[0].dtype == torch.float32 and lses[0].shape == (2, 3)
        h = pool.pool(sources[3:], weight, means[0], lses[0], scale=1.0, eps=EPS)
    assert h.shape == (2, 3, 8) and h.dtype == torch.bfloat16 and h.is_meta
    gradients = torch.autograd.grad(h.sum(), [*sources, weight])
    assert [g.shape for g in gradients] == [x.shape for x in (*sources, weight)]


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens(way, backend):
    sources, weight = sources_of(3, 0, 5, dtype=torch.float32), draw(5, dtype=torch.float32)
    found = outputs_and_gradients(WAYS[way], sources, weight, draw(5, seed=9, dtype=torch.float32))
    assert found[0].shape == (0, 5) and not found[-1].any() and not found[-2].any()


def test_any_strides(backend):
    """Views, transposed and expanded sources, and streams that are a slice."""
    base = draw(6, 4, 10, dtype=torch.float32, grad=False)
    weight = draw(5, dtype=torch.float32)
    views = [base[:, 1, :5], base[:, 2, ::2], base[0].t()[:6, 1:2].expand(6, 5), base[:, 3, 5:]]
    sources = [v.detach().requires_grad_() for v in views]
    copies = [v.contiguous().detach().requires_grad_() for v in views]
    for a, b in zip(
        outputs_and_gradients(of_list, sources, weight, None),
        outputs_and_gradients(of_list, copies, weight, None),
        strict=True,
    ):
        assert torch.equal(a, b)
    streams = base.transpose(0, 1)[1:3, :, ::2].detach()  # [2, 6, 5] seen as [2 tokens, 6 streams, 5]
    found = pool.pool_streams(streams, weight, scale=SCALE, eps=EPS)
    assert torch.equal(found, pool.pool_streams(streams.contiguous(), weight, scale=SCALE, eps=EPS))


def test_a_source_that_overflows_its_mean_square_has_score_zero(backend):
    sources, weight = sources_of(3, 4, 8, dtype=torch.float32), draw(8, dtype=torch.float32)
    sources[1] = torch.full_like(sources[1], 1e30).requires_grad_()
    for way in (of_list, in_two_phases):
        h = way(sources, weight, None)
        alpha = torch.stack([functional.source_pool([v], None) for v in sources])  # themselves
        assert torch.isfinite(alpha).all() and torch.isfinite(h).all()
        gradients = torch.autograd.grad((h * 1e-30).sum(), [*sources, weight])
        assert all(torch.isfinite(g).all() for g in gradients)
    huge = functional.source_pool(
        [sources[1], torch.zeros_like(sources[1])], weight, scale=5.0
    )  # scores 0 and 0
    torch.testing.assert_close(huge, sources[1] / 2)


def test_first_order_only():
    sources, weight = sources_of(2, 3, 4), draw(4)
    (g,) = torch.autograd.grad(of_list(sources, weight, None).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), weight)


def test_autocast_does_not_reach_inside(backend):
    sources, weight = sources_of(4, 5, 16, dtype=torch.float32), draw(16, dtype=torch.float32)
    want = outputs_and_gradients(in_two_phases, sources, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(in_two_phases, sources, weight, None)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_functions_name_bad_arguments():
    v, w = [torch.randn(2, 8) for _ in range(2)], torch.randn(8)
    with pytest.raises(ValueError, match="sources must hold at least one"):
        functional.source_pool_many([], torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"weights must have shape \[Q, 8\], got \[8\]"):
        functional.source_pool_many(v, w)
    with pytest.raises(ValueError, match=r"pool_weight must have shape \[8\].* got \[7\]"):
        functional.source_pool(v, torch.randn(7))
    with pytest.raises(ValueError, match=r"norm_weight must have shape \[8\].* got \[7\]"):
        functional.source_pool(v, w, norm_weight=torch.randn(7))
    with pytest.raises(ValueError, match=r"norm_weight must have shape \[8\].* got \[7\]"):
        functional.attention_pool(torch.stack(v, -2), w, norm_weight=torch.randn(7))
    with pytest.raises(ValueError, match=r"carried must be a mean \[2, 8\] and a log-sum-exp.*got \[2, 8\]"):
        functional.source_pool(v, w, carried=(torch.randn(2, 8), torch.randn(2, 1)))
    with pytest.raises(ValueError, match=r"carried must be .*float32, got .*bfloat16"):
        functional.source_pool(v, w, carried=(torch.randn(2, 8).bfloat16(), torch.randn(2)))
    with pytest.raises(ValueError, match="at least one feature"):
        functional.source_pool([torch.randn(2, 0)], torch.randn(0))
    with pytest.raises(ValueError, match="weights must be floating point"):
        functional.source_pool_many(v, torch.ones(2, 8, dtype=torch.long))
