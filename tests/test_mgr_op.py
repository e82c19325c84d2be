"""The MGR step as a registered operation: what torch.library asks of it, its gradient, its windows, its errors."""

import itertools

import pytest
import torch
from torch.library import opcheck

from depthmix import functional
from depthmix.errors import UserError
from depthmix.ops import backend, mgr, native, reference

REST = ("competitive", 0.5, 1e-6, 1e-5)
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not native.plan()[0], reason=native.plan()[1])),
]


def draw(tokens=6, n=3, width=5, gate="competitive", dtype=torch.float32, missing=(), seed=0):
    """``(y, streams, w1, b, w2, w3, norm weight)``, requiring gradients; those named in ``missing`` are None."""
    g = torch.Generator().manual_seed(seed)
    shapes = dict(
        y=(tokens, width), streams=(tokens, n, width), w1=(width,), b=(n + (gate == "competitive"),)
    )
    shapes |= dict(w2=(width,), w3=(width,), norm=(width,))
    return [
        None
        if name in missing
        else torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    ]


@pytest.fixture(params=BACKENDS)
def kernels(request, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("missing", [(), ("w3",), ("w2", "w3", "norm")])
@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernels, gate, missing, dtype):
    opcheck(mgr.mgr_step.operation, (*draw(gate=gate, missing=missing, dtype=dtype), gate, *REST[1:]))


@pytest.mark.parametrize("since,write", [(0, True), (0, False), (2, False), (1, True)])
def test_opcheck_of_a_window(kernels, since, write, monkeypatch):
    monkeypatch.setattr(mgr, "HANDLE_VALUE", 0.0)  # a NaN equals nothing, not even in opcheck
    y, streams, *parameters = draw()
    written, anchor = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    outputs, gates = [torch.randn(6, 5) for _ in range(2)], [torch.rand(6, 3) for _ in range(2)]
    window = streams, written, since, anchor, outputs, gates, write
    opcheck(mgr.mgr_window_step.operation, (y, *window, *parameters, *REST))


def test_opcheck_of_the_backward(kernels):
    y, streams, *parameters = (x.detach() for x in draw())
    for grad_h, grad_streams in ((torch.randn(6, 5), None), (None, torch.randn(6, 3, 5)), (None, None)):
        args = (
            grad_h,
            grad_streams,
            y,
            streams,
            [y],
            [torch.rand(6, 3)],
            torch.rand(6, 3),
            *parameters,
            *REST,
        )
        opcheck(mgr.mgr_step_backward, args)


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("missing", [(), ("w2", "w3"), ("norm",)])
def test_gradcheck(gate, missing):
    inputs = draw(gate=gate, missing=missing, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: mgr.mgr_step(*args, gate, *REST[1:])[:2], inputs)


def exact(inputs, gate, norm_eps=1e-6):
    """``h``, new streams and all gradients by autograd through the equations in float64."""
    y, streams, w1, b, w2, w3, norm = inputs
    h, new = reference.multi_gate_residual(y, streams, w1, b, w2, gate, w3, streams.shape[-1] ** -0.5, 1e-6)
    if norm is not None:
        h = reference.rms(h, norm_eps) * norm
    return h, new


def with_gradients(outputs, inputs):
    g = torch.Generator().manual_seed(9)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in outputs
    )
    return [*outputs, *torch.autograd.grad(total, [x for x in inputs if x is not None])]


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@pytest.mark.parametrize("missing", [(), ("norm",), ("w2", "w3")])
def test_public_function_against_float64(kernels, gate, missing):
    """With the next norm and without; any leading shape, inputs that are not contiguous."""
    wide = draw(tokens=24, n=4, width=33, gate=gate, missing=missing, dtype=torch.float64)
    wide = [None if x is None else x.detach().float().double().requires_grad_() for x in wide]
    truth = with_gradients(exact(wide, gate), wide)
    inputs = [None if x is None else x.detach().float().requires_grad_() for x in wide]
    plain = with_gradients(exact(inputs, gate), inputs)
    y, streams, w1, b, w2, w3, norm = inputs

    def shaped(x, *shape):  # [2, 12, ...] with the first two dimensions laid out the other way round
        return x.view(2, 12, *shape).transpose(0, 1).contiguous().transpose(0, 1)

    h, new = functional.multi_gate_residual(
        shaped(y, 33), shaped(streams, 4, 33), w1, b, w2, gate=gate, update_weight=w3, norm_weight=norm
    )
    found = with_gradients((h.reshape(24, 33), new.reshape(24, 4, 33)), inputs)
    for name, a, b_, want in zip(itertools.count(), found, plain, truth, strict=False):
        scale = want.abs().max()
        error = (a.double() - want).abs().max() / scale
        # Where autograd's float32 happens to be exact, rounding of a float32 sum is still allowed.
        assert error <= 2 * (b_.double() - want).abs().max() / scale + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_window_is_its_steps(kernels, n, dtype):
    """Written or not, to the last bit: outputs and all gradients, for windows that write seldom."""
    steps, g = 7, torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    ys, streams = [make(5, 16) for _ in range(steps)], make(5, n, 16)
    parameters = [make(16), make(n + 1), make(16) if n > 1 else None]
    weights = [make(5, 16) for _ in range(steps + 1)]

    def run(windowed, between=3):
        leaves = [
            x.clone().requires_grad_() for x in (*ys, streams, *(p for p in parameters if p is not None))
        ]
        *outputs, s = leaves[: steps + 1]
        w1, b, *w2 = leaves[steps + 1 :]
        w2, reads, window = (w2[0] if w2 else None), [], None
        window = (s, s)
        for j, y in enumerate(outputs):
            if windowed:
                since, write = j % between, j == steps - 1 or j % between == between - 1
                h, s, beta = functional.multi_gate_window_step(
                    y, s, window, since, write, w1, b, w2, norm_weight=w1
                )
                assert s.isnan().all() != write
                window = (s if write else window[0], *window[1:], y, beta)
            else:
                h, s = functional.multi_gate_residual(y, s, w1, b, w2, norm_weight=w1)
            reads.append(h)
        total = sum((h * weight).sum() for h, weight in zip(reads, weights, strict=False)) + s.square().sum()
        return [*reads, s, *torch.autograd.grad(total, leaves)]

    want = run(False)
    for between in (1, 3, 7):
        for a, b in zip(run(True, between), want, strict=True):
            assert torch.equal(a, b)


def test_a_handle_has_no_storage_and_no_numbers():
    y, streams, *parameters = draw()
    _, new, _ = mgr.mgr_window_step(
        y, streams, streams.detach(), 0, streams.detach(), [], [], False, *parameters, *REST
    )
    assert new.shape == streams.shape and new.untyped_storage().nbytes() == 4 and new.isnan().all()
    (gradient,) = torch.autograd.grad(new, streams, torch.ones_like(streams))
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 64])
def test_streams_are_written_when_it_moves_least(n):
    def moved(between, steps=5040):
        total = 0
        for step in range(steps):
            since = step % between
            total += n + since + 1 + 1 + n * (since == between - 1)  # streams, outputs; h; new streams
        return total

    best = moved(mgr.steps_between_writes(n))
    # 5040 is a whole number of most windows; the rest is left out.
    assert all(best <= moved(b) for b in range(1, 22) if 5040 % b == 0)
    assert best <= 5040 * (2 * n + 2)


@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_no_tokens(kernels, gate):
    inputs = draw(tokens=0, gate=gate)
    y, streams, w1, b, w2, w3, norm = inputs
    h, new = functional.multi_gate_residual(
        y, streams, w1, b, w2, gate=gate, update_weight=w3, norm_weight=norm
    )
    assert h.shape == (0, 5) and new.shape == (0, 3, 5)
    (h.sum() + new.sum()).backward()
    assert all((x.grad == 0).all() for x in inputs)


def test_gradients_of_one_output_alone(kernels):
    inputs = draw(missing=("norm",))
    double = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    for which in (0, 1):
        y, streams, w1, b, w2, w3, _ = inputs
        found = functional.multi_gate_residual(y, streams, w1, b, w2, update_weight=w3)[which]
        want = exact(double, "competitive")[which]
        given, given_double = ([x for x in xs if x is not None] for xs in (inputs, double))
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), given, allow_unused=True),
            torch.autograd.grad(want.square().sum(), given_double, allow_unused=True),
            strict=True,
        ):
            a = torch.zeros_like(b) if a is None else a.double()
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused():
    y, streams, *parameters = draw(dtype=torch.float64)
    h, *_ = mgr.mgr_step(y, streams, *parameters, *REST)
    (gradient,) = torch.autograd.grad(h.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(streams=torch.zeros(6, 0, 5)), "1 to 64 streams"),
        (dict(streams=torch.zeros(6, 3, 0), y=torch.zeros(6, 0)), "at least one feature"),
        (
            dict(y=torch.zeros(6, 5, dtype=torch.int32)),
            "layer_output must be floating point, got torch.int32",
        ),
        (dict(y=torch.zeros(6, 5, device="meta")), "layer_output is on meta but streams is on cpu"),
        (dict(norm=torch.zeros(4)), r"norm_weight must have shape \[5\]"),
        (dict(y=torch.zeros(7, 5)), "layer_output must have the shape of streams without"),
    ],
)
def test_bad_input(change, message):
    names = ("y", "streams", "w1", "b", "w2", "w3", "norm")
    y, streams, w1, b, w2, w3, norm = (dict(zip(names, draw(), strict=True)) | change).values()
    with pytest.raises(ValueError, match=message):
        functional.multi_gate_residual(y, streams, w1, b, w2, update_weight=w3, norm_weight=norm)


# --- which implementation runs --------------------------------------------------------------------


def test_choice_of_kernels(monkeypatch):
    x = torch.zeros(1)
    for wanted in ("torch", *(["native"] if native.available() else [])):
        monkeypatch.setenv("DEPTHMIX_KERNELS", wanted)
        assert backend.choose(x) == wanted
    monkeypatch.setenv("DEPTHMIX_KERNELS", "auto")
    assert backend.choose(x) == ("native" if native.available() else "torch")
    assert backend.choose(x.to("meta")) == "torch"
    with torch._subclasses.FakeTensorMode():
        assert backend.choose(torch.zeros(1)) == "torch"


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.setenv("DEPTHMIX_KERNELS", "nativ")
    with pytest.raises(UserError, match="Did you mean 'native'"):
        backend.choose(torch.zeros(1))
    monkeypatch.setenv("DEPTHMIX_KERNELS", "native")
    with pytest.raises(UserError, match="for CPU tensors"):
        backend.choose(torch.zeros(1, device="meta"))


def test_a_million_tokens(kernels):
    """A row does not depend on how many there are: the last of 2^20 tokens get what they get alone."""
    tokens, last = 2**20, 200
    y, streams, *parameters = draw(tokens=tokens, n=2, width=3, missing=("w3",))
    found = [x.detach() for x in mgr.mgr_step(y, streams, *parameters, *REST)]
    alone = [x.detach()[-last:] for x in (y, streams)]
    few = mgr.mgr_step(*alone, *parameters, *REST)
    for a, b in zip(found, few, strict=True):
        assert a.shape[0] == tokens
        torch.testing.assert_close(a[-last:], b.detach(), rtol=1e-6, atol=1e-6)
