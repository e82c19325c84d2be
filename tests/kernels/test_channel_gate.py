"""The channel gate in Triton: the tests of the other backends, on the device of this machine."""

import pytest
import torch

pytest.importorskip("triton")

from depthmix.ops import channel_gate as gate
from depthmix.ops.triton import available, interpreting
from depthmix.ops.triton import channel_gate as kernels

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="no GPU and no interpreter")]

FORMS = [
    dict(convex=convex, normalise=normalise, see_update=see)
    for convex in (False, True)
    for normalise in (False, True)
    for see in (False, True)
]
forms = pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: "-".join(k for k, v in f.items() if v) or "plain"
)


@pytest.fixture(autouse=True)
def poisoned_and_forced(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN; Triton also for tensors of a CPU."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setenv("DEPTHMIX_KERNELS", "triton")


def draw(device, form, rows, width, dtype=torch.float32, size=1.0):
    g = torch.Generator().manual_seed(rows * width)
    make = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    columns = width * (1 + form["see_update"])
    tensors = [
        (3 * size * make(rows, width)).to(dtype), make(rows, width).to(dtype),
        make(width, columns) / columns**0.5, make(width),
    ]  # fmt: skip
    return [t.requires_grad_() for t in tensors], make(rows, width).to(dtype)


def plain(tensors, grad, form, dtype):
    """The equation taken apart by autograd, in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    g = gate.channel_gate(*leaves, form["normalise"], 1e-6)
    new = gate.admit(*leaves[:2], g, form["convex"])
    return [new.detach(), *torch.autograd.grad(new, leaves, grad.to(dtype))]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(tensors, grad, form):
    arguments = form["convex"], form["normalise"]
    new = gate.gated_update(*tensors, convex=arguments[0], normalise=arguments[1])
    found = [new.detach(), *torch.autograd.grad(new, tensors, grad)]
    exact, reference = (plain(tensors, grad, form, dtype) for dtype in (torch.float64, torch.float32))
    for a, b, truth in zip(found, reference, exact, strict=True):
        assert torch.isfinite(a).all()
        # What torch happens to hit exactly still has the rounding of fp32 sums, and results have their own, which
        # the interpreter replaces by cutting off where they are bf16.
        floor = 2e-6 if a.dtype is torch.float32 else torch.finfo(a.dtype).eps / 2
        if a.dtype is torch.bfloat16 and interpreting():
            floor *= 2
        assert error(a, truth) <= 2 * error(b.to(a.dtype), truth) + floor


@forms
@pytest.mark.parametrize("rows,width", [(1, 1), (5, 33)])
def test_error_is_at_most_twice_that_of_the_equation(device, form, rows, width):
    check(*draw(device, form, rows, width), form)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, form, dtype):
    check(*draw(device, form, 3, 40, dtype), form)


@forms
def test_rows_in_tiles(device, form, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16)
    check(*draw(device, form, 3, 45), form)


def test_more_rows_than_programs(device, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(*draw(device, FORMS[-1], 7, 12), FORMS[-1])


@pytest.mark.parametrize("form", [f for f in FORMS if f["normalise"]])
def test_a_row_whose_mean_square_overflows_is_not_read(device, form):
    tensors, grad = draw(device, form, 2, 8, size=1e30)
    new = gate.gated_update(*tensors, convex=form["convex"], normalise=True)
    assert torch.isfinite(new).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(new, tensors, grad))


@forms
def test_no_rows(device, form):
    tensors, grad = draw(device, form, 0, 6)
    new = gate.gated_update(*tensors, convex=form["convex"], normalise=form["normalise"])
    grads = torch.autograd.grad(new, tensors, grad)
    assert new.shape == (0, 6) and all((g == 0).all() for g in grads)


def test_registered(device):
    tensors, grad = draw(device, FORMS[-1], 2, 6)
    new, *kept = gate.run_gate.operation(*tensors, True, True, 1e-6)
    by_op = torch.autograd.grad(new, tensors, grad)
    direct = gate.gated_update(*tensors, convex=True)
    assert torch.equal(new, direct)
    assert all(
        torch.equal(a, b) for a, b in zip(by_op, torch.autograd.grad(direct, tensors, grad), strict=True)
    )
    assert [k.shape for k in kept] == [(2, 6), (2,), (2,)]
