"""Truths from outside: torch.optim.Muon, torch.optim.AdamW, the SVD, and the polynomials themselves."""

import math

import pytest
import torch
from torch import nn

from depthmix import GPT, GPTConfig
from depthmix.config import OptimConfig
from depthmix.optim import POLAR_EXPRESS, MuonAdamW, build_optimizer, parameter_groups, polar_express

TRIPLE = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's default
SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (8, 1), (1, 8)]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors only wait for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrices_model(shapes=SHAPES, dtype=torch.float32, seed=0) -> nn.Module:
    """A model whose only parameters are trunk matrices of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    model.blocks = nn.ParameterList(
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    )
    return model


class Network(nn.Module):
    """The kinds of parameter a GPT here has: embedding, matrices, norms, biases, a scalar, a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for block in self.blocks:
            block.gate_weight = nn.Parameter(torch.zeros(8))
            block.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block.scale * torch.tanh(block(x)) * torch.sigmoid(block.gate_weight)
        return self.head(self.norm(x))


def give_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient * scale * 10.0 ** (step % 3)).to(parameter.dtype)


def test_every_parameter_is_in_exactly_one_group():
    model = Network()
    groups = parameter_groups(model)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, _ in groups["muon"]] == [f"blocks.{i}.weight" for i in range(3)]
    assert [name for name, _ in groups["adamw"]] == ["embed.weight"]
    assert all(p.ndim < 2 for _, p in groups["adamw_no_decay"])
    stepped = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))


def test_parameters_that_fit_no_group_or_two_are_refused():
    model = Network()
    model.blocks[0].extra = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.extra is torch\.int64"):
        parameter_groups(model)
    model = Network()
    model.shared = model.blocks[1].weight
    with pytest.raises(ValueError, match=r"both shared .* and blocks\.1\.weight|both blocks\.1\.weight"):
        parameter_groups(model)
    with pytest.raises(ValueError, match="no module named 'blocks'"):
        parameter_groups(nn.Linear(2, 2))


def polynomials(s: torch.Tensor, coefficients=POLAR_EXPRESS) -> torch.Tensor:
    """What Polar Express does to a singular value: the composed odd polynomials, on scalars."""
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (5, 12, 30), (2, 3, 30, 12), (1, 7), (7, 1)])
def test_polar_express_acts_on_singular_values_alone(shape):
    """In float64 the result is U p(S) V^T, with p evaluated on the singular values from an SVD."""
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    norm = torch.linalg.matrix_norm(matrices)[..., None]
    expected = U @ torch.diag_embed(polynomials(S / (1.01 * norm + 1e-7))) @ Vh
    torch.testing.assert_close(polar_express(matrices), expected, rtol=0, atol=1e-11)


def test_polar_express_is_near_the_polar_factor():
    """Singular values between 1e-3 and 1 of the norm end in the band of the composed polynomials.

    The band is the method's guarantee for five steps, about [0.85, 1.12]; it is taken from a fine
    grid. The result is then compared with the polar factor of the SVD.
    """
    grid = polynomials(torch.logspace(-3, 0, 200_001, dtype=torch.float64) / 1.01)
    low, high = grid.min().item(), grid.max().item()
    assert 0.84 < low < 0.85 and 1.12 < high < 1.13

    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(96, 64, dtype=torch.float64, generator=generator)).Q
    matrix = U @ torch.diag(torch.logspace(0, -2.3, 64, dtype=torch.float64)) @ V.T * 37.0
    singular = torch.linalg.svdvals(polar_express(matrix))
    assert low - 1e-9 <= singular.min() and singular.max() <= high + 1e-9
    distance = torch.linalg.matrix_norm(polar_express(matrix) - U @ V.T, ord=2).item()
    assert distance <= max(1 - low, high - 1) + 1e-9
    # fp32 rounding is enlarged by the first polynomial's slope; bf16 has 8 bits and no fixed point.
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        got = polar_express(matrix.float(), dtype=dtype)
        assert got.dtype == dtype
        assert torch.linalg.matrix_norm(got.double() - U @ V.T, ord=2) <= max(1 - low, high - 1) + tolerance


def test_polar_express_of_zeros_and_of_extreme_scales():
    assert polar_express(torch.zeros(4, 6)).abs().max() == 0
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(polar_express(matrix * 1e15), polar_express(matrix), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"torch\.int64 \(3,\)"):
        polar_express(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)],
)
def test_agrees_with_torch_muon(monkeypatch, dtype, tolerance):
    """With its one triple five times and no margin, six steps are those of torch.optim.Muon.

    torch iterates in bf16, fixed in its source by ``grad.bfloat16()``; that call is redirected to
    ``dtype`` to compare in fp64 and fp32, where the difference is a few roundings of weights near 3.
    (Gradients are large, so that torch's max(norm, 1e-7) and our norm + 1e-7 agree.) In bf16 torch
    also takes the norm in bf16, we in fp32: each entry of an update may be 5 % off, times the rate.
    """
    master = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = matrices_model(dtype=master), matrices_model(dtype=master)
    config = OptimConfig(muon_lr=0.02, weight_decay=0.1, muon_momentum=0.95)
    optimizer = MuonAdamW(parameter_groups(ours), config, coefficients=(TRIPLE,) * 5, margin=1.0, dtype=dtype)
    reference = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95)
    if dtype != torch.bfloat16:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype))
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(6):
        for model in (ours, theirs):
            give_gradients(model.parameters(), step, scale=1e8)
        optimizer.step()
        reference.step()
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (a - before).abs().max() > 0.02
        assert (a - b).abs().max().item() <= tolerance


def test_tall_matrices_move_further():
    """Spec section 4: the update is scaled by sqrt(max(1, rows / cols)), and decay is decoupled."""
    model = matrices_model([(64, 4), (4, 64)])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimConfig(muon_lr=0.5, weight_decay=0.2))
    give_gradients(model.parameters(), 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for parameter, old, gradient, scale in zip(
        model.parameters(), before, gradients, (4.0, 1.0), strict=True
    ):
        moved = parameter.detach() - old * (1 - 0.5 * 0.2)
        torch.testing.assert_close(moved, -0.5 * scale * polar_express(gradient), rtol=1e-4, atol=1e-5)


def test_a_stack_of_matrices_is_stepped_as_each_alone(monkeypatch):
    """Splitting the stacks (as a large model does) changes nothing beyond rounding."""
    together, alone = matrices_model(), matrices_model()
    optimizers = build_optimizer(together, OptimConfig()), build_optimizer(alone, OptimConfig())
    for step in range(3):
        for model in (together, alone):
            give_gradients(model.parameters(), step)
        optimizers[0].step()
        with monkeypatch.context() as patch:
            patch.setattr("depthmix.optim.BATCH_ELEMENTS", 1)
            optimizers[1].step()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fused", "ulps"), [(True, 0), (False, 4)])
def test_agrees_with_torch_adamw(fused, ulps):
    """Bit-identical to torch's fused AdamW, within four fp32 roundings of its plain one."""
    config = OptimConfig(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95)
    ours, theirs = Network(), Network()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config)
    groups = parameter_groups(theirs)
    reference = torch.optim.AdamW(
        [
            {"params": [p for _, p in groups["adamw"]], "weight_decay": 0.1},
            {"params": [p for _, p in groups["adamw_no_decay"]], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=fused,
    )
    for step in range(8):
        for model in (ours, theirs):
            give_gradients(model.parameters(), step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1) / 8
        optimizer.set_lr_fraction((step + 1) / 8)
        optimizer.step()
        reference.step()
        for name, parameter in ours.named_parameters():
            if name in dict(groups["muon"]):
                continue
            other = theirs.get_parameter(name)
            assert ((parameter - other).abs() <= ulps * 2**-23 * other.abs().clamp(min=0.1)).all(), name


@pytest.mark.parametrize("factor", [4.0, 0.0])
@pytest.mark.parametrize("residual", ["mgr-competitive", "hc", "moda"])
def test_the_connection_at_a_rate_of_its_own(residual, factor):
    """Gates, pools and mixing matrices as torch's AdamW of another rate steps them; all else as without."""
    model_config = GPTConfig(16, 4, 8, 2, 8, residual=residual, n_streams=2)
    ours, theirs, plain = (GPT(model_config, seed=0) for _ in range(3))
    optimizer = build_optimizer(ours, OptimConfig(lr=0.01, connection_lr=factor))
    usual = build_optimizer(plain, OptimConfig(lr=0.01))
    assert [g["kind"] for g in usual.param_groups] == ["muon", "adamw", "adamw_no_decay"]
    own = {
        f"{path}.{name}"
        for path, module in theirs.named_modules()
        if path.endswith("_site") or path == "residual"
        for name, _ in module.named_parameters()
    } - {name for name, _ in parameter_groups(theirs)["muon"]}
    groups = parameter_groups(ours, connection_apart=True)
    assert {n for kind in ("connection", "connection_no_decay") for n, _ in groups[kind]} == own
    assert sorted(n for named in groups.values() for n, _ in named) == sorted(dict(ours.named_parameters()))
    decayed = {n for n, _ in parameter_groups(theirs)["adamw"]}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.get_parameter(n) for n in sorted(own & decayed)], "weight_decay": 0.1},
            {"params": [theirs.get_parameter(n) for n in sorted(own - decayed)], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(4):
        for model in (ours, theirs, plain):
            give_gradients(model.parameters(), step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor * (step + 1) / 4
        for each in (optimizer, usual):
            each.set_lr_fraction((step + 1) / 4)
            each.step()
        reference.step()
    for name, parameter in ours.named_parameters():
        same = theirs if name in own else plain
        assert torch.equal(parameter, same.get_parameter(name)), name
        assert (name in own) == (not torch.equal(parameter, plain.get_parameter(name))), name


@pytest.mark.parametrize("factor", [-1.0, math.inf, math.nan])
def test_a_factor_that_is_none(factor):
    with pytest.raises(ValueError, match=f"connection_lr must be 0 or more and finite, got {factor}"):
        OptimConfig(connection_lr=factor)


def test_low_precision_weights_have_fp32_masters():
    """A step too small for bf16 still accumulates; the masters follow fp32 training bit for bit."""
    low, high = Network().bfloat16(), Network()
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    config = OptimConfig(lr=1e-6, muon_lr=1e-6, weight_decay=0.1)
    optimizer, reference = build_optimizer(low, config), build_optimizer(high, config)
    start = {name: p.detach().clone() for name, p in low.named_parameters()}
    for step in range(20):
        give_gradients(low.parameters(), step)
        for name, parameter in high.named_parameters():
            parameter.grad = low.get_parameter(name).grad.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    state = optimizer.named_state()
    for name, parameter in high.named_parameters():
        master = state[f"{name}:master"]
        assert master.dtype == torch.float32 and torch.equal(master, parameter)
        assert torch.equal(low.get_parameter(name), parameter.bfloat16())
    # Twenty such steps are below half a bf16 spacing of a weight of one: only the master shows them.
    ones = "blocks.0.scale"
    assert torch.equal(low.get_parameter(ones), start[ones]) and state[f"{ones}:master"] != start[ones]


def test_micro_batch_gradients_of_bf16_weights_add_up_in_fp32():
    model = matrices_model([(4, 4)], torch.bfloat16)
    optimizer = build_optimizer(model, OptimConfig())
    parameter = model.blocks[0]
    for value in [256.0] + [1.0] * 100:  # in bf16, 256 + 1 = 256
        parameter.grad = torch.full_like(parameter, value)
        optimizer.collect_gradients()
    assert parameter.grad is None
    assert optimizer.clip_grad_norm(0).item() == pytest.approx(356 * 4)
    optimizer.zero_grad()
    assert optimizer.clip_grad_norm(0).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_agrees_with_torch(dtype):
    ours, theirs = Network().to(dtype), Network().float()
    optimizer = build_optimizer(ours, OptimConfig())
    give_gradients(ours.parameters(), 0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.grad = a.grad.to(torch.float32, copy=True)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item()
    assert optimizer.clip_grad_norm(0).item() == pytest.approx(expected, rel=1e-6)  # 0 only measures
    assert optimizer.clip_grad_norm(1.0).item() == pytest.approx(expected, rel=1e-6)
    assert optimizer.clip_grad_norm(0).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_moves_to_another_optimiser_exactly(dtype):
    """Both ways of restoring, three steps later: torch's state_dict and the named tensors."""
    models = [Network().to(dtype) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, OptimConfig()) for model in models]
    for step in range(3):
        give_gradients(models[0].parameters(), step)
        optimizers[0].set_lr_fraction(0.5)
        optimizers[0].step()
        optimizers[0].zero_grad()
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for name, tensor in optimizers[2].named_state().items():
        tensor.copy_(optimizers[0].named_state()[name])
    optimizers[2].set_lr_fraction(0.5)
    for model, optimizer in zip(models, optimizers, strict=True):
        give_gradients(model.parameters(), 3)
        optimizer.step()
    for name, tensor in optimizers[0].named_state().items():
        assert torch.equal(tensor, optimizers[1].named_state()[name]), name
        assert torch.equal(tensor, optimizers[2].named_state()[name]), name
    for a, b, c in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_it_learns():
    """The whole optimiser on a small task: predicting the token that follows in a fixed permutation."""
    torch.manual_seed(0)
    model = Network()
    optimizer = build_optimizer(model, OptimConfig(lr=0.03, muon_lr=0.02))
    ids = torch.arange(20)
    targets = (ids * 7 + 3) % 20
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), targets)
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.set_lr_fraction(OptimConfig(warmup_steps=5).lr_fraction(step, 60))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
