"""The channel gate by every backend: against its plain differentiable form in float64, and as registered operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.ops import channel_gate as gate
from depthmix.ops import native

FORMS = [
    dict(convex=convex, normalise=normalise, see_update=see)
    for convex in (False, True)
    for normalise in (False, True)
    for see in (False, True)
]
forms = pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: "-".join(k for k, v in f.items() if v) or "plain"
)
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


def draw(form, rows, width, dtype=torch.float32, update_dtype=None, seed=0):
    """``[x, update, weight, bias]`` requiring gradients, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    columns = width * (1 + form["see_update"])
    tensors = [
        (3 * make(rows, width)).to(dtype), make(rows, width).to(update_dtype or dtype),
        make(width, columns) / columns**0.5, make(width),
    ]  # fmt: skip
    return [t.requires_grad_() for t in tensors], make(rows, width).to(dtype)


def plain(tensors, grad, form, dtype):
    """The equation taken apart by autograd, in ``dtype``: ``[x', gradients]``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    x, u, weight, bias = leaves
    g = gate.channel_gate(x, u, weight, bias, form["normalise"], 1e-6)
    new = gate.admit(x, u, g, form["convex"])
    return [new.detach(), *torch.autograd.grad(new, leaves, grad.to(dtype))]


def run(tensors, grad, form):
    new = gate.gated_update(*tensors, convex=form["convex"], normalise=form["normalise"])
    return [new.detach(), *torch.autograd.grad(new, tensors, grad)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(tensors, grad, form):
    exact = plain(tensors, grad, form, torch.float64)
    reference = plain(tensors, grad, form, torch.float32)
    found = run(tensors, grad, form)
    for a, b, truth, like in zip(found, reference, exact, [tensors[0], *tensors], strict=True):
        assert a.dtype == like.dtype and torch.isfinite(a).all()
        # What torch happens to hit exactly still has the rounding of fp32 sums, and results have their own.
        floor = 2e-6 if a.dtype is torch.float32 else torch.finfo(a.dtype).eps / 2
        assert error(a, truth) <= 2 * error(b.to(a.dtype), truth) + floor


@backends
@forms
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 17), (130, 33), (2, 300)])
def test_error_is_at_most_twice_that_of_the_equation(form, backend, rows, width, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    check(*draw(form, rows, width), form)


@backends
@forms
@pytest.mark.parametrize(
    "dtype,update_dtype",
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_low_precision(form, backend, dtype, update_dtype, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    check(*draw(form, 5, 40, dtype, update_dtype), form)


@backends
@settings(max_examples=25)
@given(
    form=st.sampled_from(FORMS), rows=st.integers(1, 140), width=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_any_shape(backend, form, rows, width, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPTHMIX_KERNELS", backend)
        check(*draw(form, rows, width, seed=seed), form)


@pytest.mark.skipif(native.plan()[0] is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_is_rounded_as_torch_rounds(dtype):
    """Every number of 16 bits widened and narrowed again; and fp32 numbers between them, ties, overflow, NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    some = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(
        -28, 36
    ).repeat(256)
    ties = (every.float() + torch.nextafter(every, every + 1).float()) / 2
    for update in (torch.cat([some, ties, torch.tensor([65519.0, 65520.0, 3.4e38])]), every.float()):
        update = update.view(1, -1)
        zero, none = torch.zeros_like(update, dtype=dtype), torch.empty(0)
        # A gate of exactly 1: the additive form gives 0 + u, rounded to the dtype of x.
        new, *_ = gate.native.forward(
            torch.full_like(update, 100.0),
            None,
            torch.zeros(update.shape[1]),
            zero,
            update,
            False,
            False,
            1e-6,
        )
        assert torch.equal(new.nan_to_num(7), update.to(dtype).nan_to_num(7)), none
        same = every.view(1, -1)
        wide, *_ = gate.native.forward(
            torch.full(same.shape, 100.0), None, torch.zeros(same.shape[1]), torch.zeros(same.shape), same,
            False, False, 1e-6,
        )  # fmt: skip
        assert torch.equal(wide.nan_to_num(7, 8, 9), same.float().nan_to_num(7, 8, 9))


@pytest.mark.skipif(native.plan()[0] is None, reason="no compiler")
def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", "native")
    tensors, grad = draw(FORMS[-1], 200, 24)
    threads, results = torch.get_num_threads(), []
    x, u, _, bias = (t.detach() for t in tensors)
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            logit, product_u = torch.ones(200, 24), torch.ones(200, 24)
            new, r_x, r_u = gate.native.forward(logit, product_u, bias, x, u, True, True, 1e-6)
            made = gate.native.logits(grad, logit, x, u, r_x, r_u, True, True)
            results.append(
                [new, r_x, r_u, *made, *gate.native.inputs(grad, logit, x, u, r_x, r_u, x, u, True)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
@forms
def test_no_rows(form, backend, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    tensors, grad = draw(form, 0, 6)
    new, d_x, d_u, d_weight, d_bias = run(tensors, grad, form)
    assert new.shape == d_x.shape == d_u.shape == (0, 6)
    assert d_weight.eq(0).all() and d_bias.eq(0).all()


@backends
@pytest.mark.parametrize("form", [f for f in FORMS if f["normalise"]])
def test_a_row_whose_mean_square_overflows_is_not_read(form, backend, monkeypatch):
    """Its product with W is infinite here; the gate is that of the bias, of the other source at most."""
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    (x, u, weight, bias), grad = draw(form, 2, 8)
    huge = [x.detach() * 1e30, u.detach(), weight.detach() * 1e15, bias.detach()]
    new, *grads = run([t.requires_grad_() for t in huge], grad, form)
    assert torch.isfinite(new).all() and all(torch.isfinite(g).all() for g in grads)


@forms
def test_gradcheck(form, monkeypatch):
    monkeypatch.undo()
    tensors = [t.detach().double().requires_grad_() for t in draw(form, 3, 5)[0]]
    arguments = form["convex"], form["normalise"], 1e-3
    assert torch.autograd.gradcheck(lambda *t: gate.run_gate.operation(*t, *arguments)[0], tensors)
    assert torch.autograd.gradcheck(lambda *t: gate.run_gate.direct(*t, *arguments), tensors)


@backends
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[6]])
def test_opcheck(form, backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    tensors, grad = draw(form, 4, 6)
    torch.library.opcheck(gate.run_gate.operation, (*tensors, form["convex"], form["normalise"], 1e-6))
    detached = [t.detach() for t in tensors]
    kept = gate.run_gate.operation(*detached, form["convex"], form["normalise"], 1e-6)[1:]
    torch.library.opcheck(gate.registered_backward, (grad, *detached, *kept, form["convex"]))


@backends
def test_compiled_it_is_the_same_operation(backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("DEPTHMIX_KERNELS", backend)
    form = FORMS[-1]
    tensors, grad = draw(form, 6, 16)
    eager = run(tensors, grad, form)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: gate.gated_update(*t, convex=True, normalise=True), fullgraph=True, backend="aot_eager"
    )
    new = compiled(*tensors)
    for a, b in zip([new, *torch.autograd.grad(new, tensors, grad)], eager, strict=True):
        assert torch.equal(a, b)


def test_meta_tensors():
    tensors = [t.detach().to("meta").requires_grad_() for t in draw(FORMS[-1], 3, 4)[0]]
    new = gate.gated_update(*tensors, convex=True)
    new.sum().backward()
    assert new.is_meta and new.shape == (3, 4) and tensors[2].grad.shape == (4, 8)
