"""The compiled CPU kernels against the torch operations they stand for, and against float64."""

import os
import subprocess
import sys

import pytest
import torch

from depthmix.ops import hyper, native, sinkhorn

pytestmark = pytest.mark.skipif(native.plan()[0] is None, reason="no C++ compiler: " + native.plan()[1])

FAMILIES = {
    "layer": lambda n: hyper.HyperDynamic(n, "layer", True, 1e-6),
    "rms": lambda n: hyper.HyperDynamic(n, "rms", False, 1e-6),
    "sinkhorn": lambda n: hyper.Manifold(n, 20, 1e-6),
    "permutations": lambda n: hyper.Manifold(n, None, 1e-6),
}


@pytest.fixture
def without(monkeypatch):
    """A call runs its argument with torch operations alone."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(native, "usable", lambda *tensors, n: False)
            return function()

    return run


def draw(n, width, family, tokens, dtype=torch.float64):
    """``(y, H, C, *parameters)``, drawn in float64 and rounded, requiring gradients."""
    g = torch.Generator().manual_seed(n * width)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = [make(tokens, width), make(tokens, n, width), make(tokens, n + 2, n)]
    if isinstance(family, hyper.HyperDynamic):
        inputs += [make(width, n + 2) / width**0.5, make(n, n + 2), make(2), make(width)]
        inputs += [make(width)] if family.norm == "layer" else [None]
    else:
        size = 2 * n + family.residual_size
        inputs += [make(n * width, size) / (n * width) ** 0.5, make(size), make(2 if n == 1 else 3)]
    return [x if x is None else x.float().to(dtype).requires_grad_() for x in inputs]


def outputs_and_gradients(inputs, family, used=(0, 1, 2, 3, 4, 5)):
    y, streams, coefficients, *parameters = inputs
    outputs = (
        *hyper.step(y, streams, coefficients, family, parameters),
        *hyper.begin(streams, family, parameters),
        hyper.write(y, streams, coefficients),
    )
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    total = sum((outputs[i] * weights[i]).sum() for i in used)
    given = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(total, given, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def test_it_is_in_use():
    assert native.status().startswith("on, ")
    assert native.usable(torch.zeros(2), n=8)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "n,width,tokens", [(1, 3, 1), (2, 7, 3), (3, 16, 17), (4, 64, 40), (5, 33, 16), (6, 5, 9)]
)
def test_error_is_at_most_twice_that_of_torch(kind, n, width, tokens, without):
    family = FAMILIES[kind](n)
    exact = outputs_and_gradients(draw(n, width, family, tokens), family)
    inputs = draw(n, width, family, tokens, torch.float32)
    found = outputs_and_gradients(inputs, family)
    plain = without(lambda: outputs_and_gradients(inputs, family))
    assert len(found) == len(exact) == len(plain)
    for a, b, truth in zip(found, plain, exact, strict=True):
        # A thing that torch happens to hit exactly still has the rounding of fp32 sums.
        assert error(a, truth) <= 2 * error(b, truth) + 2e-6


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_weight_too_large_for_the_kernel(kind, monkeypatch):
    """The product with it is torch's then."""
    family = FAMILIES[kind](3)
    inputs = draw(3, 10, family, 5, torch.float32)
    fused = outputs_and_gradients(inputs, family)
    monkeypatch.setattr(hyper, "FUSED_WEIGHT", 1)
    for a, b in zip(outputs_and_gradients(inputs, family), fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 8])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (4,), (5,)])
def test_any_output_alone(n, used, without):
    """Gradients that are missing, of the read, of the streams or of the coefficients, count as zero."""
    family = FAMILIES["sinkhorn"](n)
    inputs = draw(n, 12, family, 5, torch.float32)
    found = outputs_and_gradients(inputs, family, used)
    plain = without(lambda: outputs_and_gradients(inputs, family, used))
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("tokens", [1, 15, 33])
def test_sinkhorn(n, iterations, tokens):
    logits = 3 * torch.randn(n, n, tokens, generator=torch.Generator().manual_seed(n))
    exact = logits.double().permute(2, 0, 1).requires_grad_()
    want = sinkhorn.sinkhorn_reference(exact, iterations)
    grad = torch.randn(n, n, tokens, generator=torch.Generator().manual_seed(1))
    (d_exact,) = torch.autograd.grad(want, exact, grad.double().permute(2, 0, 1))
    found = sinkhorn.sinkhorn_forward(logits, iterations).permute(2, 0, 1)
    torch.testing.assert_close(found.double(), want.detach(), rtol=2e-5, atol=1e-6)
    d_found = sinkhorn.sinkhorn_backward(grad, logits, iterations).permute(2, 0, 1)
    torch.testing.assert_close(d_found.double(), d_exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bits_do_not_depend_on_threads_and_repeat(kind):
    """No sum runs over tokens in a kernel; the matrix products around them are torch's."""
    family = FAMILIES[kind](4)
    y, streams, coefficients, *_ = draw(4, 64, family, 100, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            new = hyper.write(y, streams, coefficients)
            results.append((new, *torch.autograd.grad((new * new).sum(), (y, streams, coefficients))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_tokens(kind):
    family = FAMILIES[kind](4)
    inputs = draw(4, 8, family, 1, torch.float32)
    y, streams, coefficients = (x.detach()[:0].requires_grad_() for x in inputs[:3])
    h, new, made = hyper.step(y, streams, coefficients, family, inputs[3:])
    (h.sum() + new.sum() + made.sum()).backward()
    assert h.shape == (0, 8) and streams.grad.shape == (0, 4, 8)
    assert all((p.grad == 0).all() for p in inputs[3:] if p is not None)


def test_strided_inputs(without):
    """A gradient that is a slice or an expanded number, streams that are a transposed view."""
    family = FAMILIES["layer"](4)
    y, streams, coefficients, *parameters = draw(4, 8, family, 6, torch.float32)
    turned = streams.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    def run(s):
        h, new, made = hyper.step(y, s, coefficients, family, parameters)
        total = h.sum() + new[:, 1:3].sum() + torch.cat([new, new], 1)[:, 2:6].square().sum() + made.sum()
        return h, new, made, *torch.autograd.grad(total, (y, s, coefficients))

    for a, b in zip(run(turned), without(lambda: run(streams)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_take():
    x = torch.zeros(2, 2)
    assert not native.usable(x, n=9) and not native.usable(x.double(), n=2)
    assert not native.usable(x.bfloat16(), n=2) and not native.usable(x.to("meta"), n=2)
    with torch._subclasses.FakeTensorMode():
        assert not native.usable(torch.zeros(2), n=2)


def ask(code="from depthmix.ops import native; print(native.status())", **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_it_uses_the_threads_of_torch():
    """Two OpenMP libraries in one process spin against each other."""
    code = (
        "from depthmix.ops import native; print(native.status())\n"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if '/libgomp' in l or 'omp.so' in l}))"
    )
    status, libraries = ask(code).stdout.splitlines()
    assert status.startswith("on") and libraries == "1"


def test_switched_off():
    assert ask(DEPTHMIX_NATIVE="0").stdout.strip() == "off: DEPTHMIX_NATIVE=0"


def test_without_a_compiler(tmp_path):
    assert "off: no C++ compiler found" in ask(CXX=str(tmp_path / "none")).stdout


def test_a_compiler_that_fails_is_reported_and_torch_is_used(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such flag" >&2\nexit 1\n')
    broken.chmod(0o755)
    code = (
        "import torch; from depthmix.ops import native, sinkhorn\n"
        "print(sinkhorn.sinkhorn_forward(torch.zeros(2, 2, 1), 3).flatten().tolist()); print(native.status())"
    )
    result = ask(code, CXX=str(broken), DEPTHMIX_CACHE=str(tmp_path))
    assert result.returncode == 0
    assert result.stdout.splitlines() == ["[0.5, 0.5, 0.5, 0.5]", f"off: {broken} failed: no such flag"]
    assert "slower" in result.stderr
    assert not [p for p in (tmp_path / "native").iterdir()]


def test_what_was_compiled_is_kept_and_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    assert ask(DEPTHMIX_CACHE=str(tmp_path)).stdout.startswith("on")
    kept = list((tmp_path / "native").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".so"
    before = kept[0].stat().st_mtime_ns
    assert ask(DEPTHMIX_CACHE=str(tmp_path)).stdout.startswith("on")
    assert kept[0].stat().st_mtime_ns == before
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert ask(DEPTHMIX_CACHE=str(blocked)).stdout.startswith("on")
