"""A list of modules joined by a connection: against the GPT that has it built in, and against plain loops."""

import copy

import pytest
import torch
from torch import nn

from depthmix import GPT, GPTConfig, available_residuals, wrap
from depthmix.config import OptimConfig
from depthmix.errors import UserError
from depthmix.optim import build_optimizer, decay_groups, parameter_groups

JOINED = [name for name in available_residuals() if name != "moda"]
every = pytest.mark.parametrize("residual", JOINED)
D, L = 8, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(width=D, bias=True):
    return nn.Sequential(
        nn.RMSNorm(width, eps=1e-6),
        nn.Linear(width, 2 * width, bias),
        nn.GELU(),
        nn.Linear(2 * width, width, bias),
    )


def mlps(length=L, width=D):
    return [mlp(width) for _ in range(length)]


def moved(trunk, size=0.3):
    with torch.no_grad():
        for p in [*trunk.sites.parameters(), *trunk.connection.parameters()]:
            p.add_(torch.randn_like(p) * size)
    return trunk


class Attention(nn.Module):
    """The attention of a GPT, norm first."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, cos, sin):
        return self.attention(self.attention.norm(x), cos, sin)


class MLP(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(self.mlp.norm(x))


@every
def test_the_sublayers_of_a_gpt_make_that_gpt(residual):
    """And every parameter gets the same gradient."""
    model = GPT(GPTConfig(16, 3, D, 2, 5, residual=residual, n_streams=3, replay_window=2), seed=0)
    sublayers = [module for b in copy.deepcopy(model).blocks for module in (Attention(b.attn), MLP(b.mlp))]
    trunk = moved(wrap(sublayers, residual, n_streams=3, replay_window=2) if "mgr" in residual
                  else wrap(sublayers, residual, n_streams=3))  # fmt: skip
    model.residual.load_state_dict(trunk.connection.state_dict())
    sites = [site for block in model.blocks for site in (block.attn_site, block.mlp_site)]
    for ours, theirs in zip(trunk.sites, sites, strict=True):
        theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 16, (2, 5))
    cos, sin = model.rotary(ids)
    expected = model.hidden(ids)
    found = model.norm(trunk(model.embed(ids), cos=cos, sin=sin))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    wanted = [p.grad.clone() for site in sites for p in site.parameters()]
    (found * weight).sum().backward()
    for p, gradient in zip(trunk.sites.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_prenorm_is_the_loop_one_writes():
    sublayers = mlps()
    trunk = wrap(sublayers, "prenorm")
    x = torch.randn(2, 5, D)
    expected = x
    for sublayer in sublayers:
        expected = expected + sublayer(expected)
    assert torch.equal(trunk(x), expected)


@every
def test_any_leading_shape(residual):
    trunk = moved(wrap(mlps(), residual, n_streams=2)).double()
    x = torch.randn(2, 3, 4, D, dtype=torch.float64)
    expected = trunk(x.view(1, 24, D)).view(x.shape)
    torch.testing.assert_close(trunk(x), expected)
    torch.testing.assert_close(trunk(x.view(24, D)), expected.view(24, D))
    torch.testing.assert_close(trunk(x[0, 0, 0]), expected[0, 0, 0])
    assert trunk(x[:0]).shape == (0, 3, 4, D)


class Pointwise(nn.Module):
    """A 1 x 1 convolution on ``[B, D, H, W]`` is a matrix on ``[B, H, W, D]``."""

    def __init__(self, linear):
        super().__init__()
        self.conv = nn.Conv2d(D, D, 1)
        with torch.no_grad():
            self.conv.weight.copy_(linear.weight[:, :, None, None])
            self.conv.bias.copy_(linear.bias)

    def forward(self, x):
        return self.conv(x)


@every
def test_channels_in_another_dimension(residual):
    linears = [nn.Linear(D, D) for _ in range(L)]
    last = moved(wrap(linears, residual, n_streams=2))
    second = wrap([Pointwise(linear) for linear in linears], residual, n_streams=2, channel_dim=1)
    second.sites.load_state_dict(last.sites.state_dict())
    second.connection.load_state_dict(last.connection.state_dict())
    x = torch.randn(2, D, 3, 5)
    expected = last(x.movedim(1, -1)).movedim(-1, 1)
    found = second(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Mixer(nn.Module):
    """An MLP over tokens."""

    def __init__(self, length):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(length, length)

    def forward(self, x):
        return self.mix(self.norm(x).mT).mT


def test_a_mixer_a_resnet_and_a_vector_learn():
    for sublayers, shape, dim in (
        ([m for _ in range(3) for m in (Mixer(5), mlp())], (2, 5, D), -1),
        ([nn.Sequential(nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1)) for _ in range(5)],
         (2, D, 6, 6), 1),
        ([nn.Sequential(nn.GroupNorm(2, D), nn.Conv1d(D, D, 3, padding=1)) for _ in range(5)], (2, D, 7), 1),
        (mlps(5), (D,), -1),
    ):  # fmt: skip
        trunk = wrap(sublayers, "mgr-competitive", n_streams=3, channel_dim=dim, sublayers_per_block=1)
        assert trunk.d_model == D
        x, target = torch.randn(shape), torch.randn(shape)
        optimizer = torch.optim.AdamW(decay_groups(nn.ModuleList([trunk]), 0.1), 1e-2)
        losses = []
        for _ in range(8):
            loss = (trunk(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.grad is not None for p in trunk.parameters())


class Shifted(nn.Module):
    """Adds what it is told to."""

    def __init__(self, *names):
        super().__init__()
        self.linear, self.names = nn.Linear(D, D), names

    def forward(self, x, **keywords):
        assert set(keywords) == set(self.names), (keywords, self.names)
        return self.linear(x) + sum(keywords.values())


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, shift=0.0, *, scale=1.0):
        return self.linear(x) * scale + shift


def test_arguments_reach_the_sublayers_that_take_them():
    sublayers = [Conditioned(), nn.Linear(D, D), Conditioned(), Shifted("shift", "own")]
    trunk = wrap(sublayers, "prenorm", takes=None)
    x, shift = torch.randn(3, D), torch.randn(3, D)
    h = x + sublayers[0](x, shift)
    h = h + sublayers[1](h)
    h = h + sublayers[2](h, shift, scale=2.0)
    h = h + sublayers[3](h, shift=shift, own=1.0)
    assert torch.equal(trunk(x, shift=shift, each=[None, {}, {"scale": 2.0}, {"own": 1.0}]), h)
    narrowed = wrap(sublayers, "prenorm", takes=[["scale"], (), (), ["shift"]])
    sublayers[3].names = ("shift",)
    h = x + sublayers[0](x, scale=3.0)
    for i in (1, 2):
        h = h + sublayers[i](h)
    h = h + sublayers[3](h, shift=shift)
    assert torch.equal(narrowed(x, shift=shift, scale=3.0), h)
    with pytest.raises(UserError, match=r"'mask'.*takes"):
        narrowed(x, mask=x)
    with pytest.raises(UserError, match="each must have one entry for each of 4"):
        trunk(x, each=[{}])
    with pytest.raises(UserError, match="takes must have one entry"):
        wrap(sublayers, "prenorm", takes=[()])


@pytest.mark.parametrize("residual", ["mgr-competitive", "mgr-review:gate=independent"])
def test_stream_memory_changes_no_bit(residual):
    sublayers, x = mlps(9), torch.randn(2, 5, D)
    results = []
    for memory in ("store", "replay"):
        torch.manual_seed(1)
        options = {"replay_window": 3} if memory == "replay" else {}
        trunk = moved(wrap(copy.deepcopy(sublayers), residual, n_streams=3, stream_memory=memory, **options))
        y = trunk(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in trunk.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", JOINED)
def test_checkpointing_changes_no_bit(residual):
    trunk = moved(wrap([nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(L)], residual, n_streams=2))
    x = torch.randn(2, 5, D)

    def gradients():
        trunk.zero_grad()
        torch.manual_seed(3)  # of the dropout
        y = trunk(x)
        y.square().sum().backward()
        return [y, *(p.grad.clone() for p in trunk.parameters())]

    expected = gradients()
    trunk.checkpointing = True
    for a, b in zip(gradients(), expected, strict=True):
        assert torch.equal(a, b)


@every
def test_copied_saved_loaded_evaluated(residual):
    trunk = moved(wrap([nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(L)], residual, n_streams=2))
    x = torch.randn(2, 5, D)
    assert not torch.equal(trunk(x), trunk(x))
    trunk.eval()
    y = trunk(x)
    assert torch.equal(trunk(x), y)
    assert torch.equal(copy.deepcopy(trunk)(x), y)
    fresh = wrap([nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(L)], residual, n_streams=2).eval()
    fresh.load_state_dict(trunk.state_dict())
    assert torch.equal(fresh(x), y)
    # No state stays on modules: two forward passes before two backward passes give what each gives alone.
    inputs = x, torch.randn(3, 5, D)

    def gradients(*results):
        trunk.zero_grad()
        for y in results:
            y.square().sum().backward()
        return [p.grad.clone() for p in trunk.parameters()]

    alone = [gradients(trunk(x)) for x in inputs]
    together = gradients(*reversed([trunk(x) for x in inputs]))
    for a, b, both in zip(*alone, together, strict=True):
        torch.testing.assert_close(both, a + b, rtol=0, atol=1e-4 * both.abs().max().item())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(residual, dtype):
    trunk = wrap(mlps(), residual, n_streams=2)
    x = torch.randn(2, 5, D)
    exact = copy.deepcopy(trunk).double()(x.double())
    with torch.autocast("cpu", dtype):
        y = trunk(x)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 0.05 * exact.abs().max()
    y.sum().backward()
    half = trunk.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert (half.double() - exact).abs().max() <= 0.1 * exact.abs().max()
    assert {p.dtype for p in wrap([mlp().to(dtype), mlp().to(dtype)], "prenorm").parameters()} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["mgr-competitive", "hc", "attnres"])
def test_compiled_in_one_graph(residual):
    trunk = moved(wrap(mlps(), residual, n_streams=2))
    x = torch.randn(2, 5, D)
    y = trunk(x)
    y.sum().backward()
    gradients = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    found = torch.compile(trunk, fullgraph=True)(x)
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    for p, gradient in zip(trunk.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [name for name in JOINED if name != "siamese"])
def test_pretrained_sublayers_go_on_where_they_are(residual):
    sublayers = [m.double() for m in mlps(8)]
    x = torch.randn(2, 5, D, dtype=torch.float64)
    expected = x
    for sublayer in sublayers:
        expected = expected + sublayer(expected)
    trunk = wrap(sublayers, residual, n_streams=4, start="prenorm-scaled")
    torch.testing.assert_close(trunk(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    trunk(x).square().sum().backward()
    own = [*trunk.sites.named_parameters(), *trunk.connection.named_parameters()]
    assert residual == "prenorm" or any(p.grad.abs().max() > 0 for _, p in own)


def test_what_a_start_as_prenorm_needs_is_said():
    for residual, message in (
        ("mgr-competitive", "weights sum to 1"),
        ("highway", "weights sum to 1"),
        ("attnres", "weights sum to 1"),
        ("review", "multiplied by 2"),
        ("hc", "4 times PreNorm's output: set merge=mean"),
        ("siamese", "post-norm"),
    ):
        with pytest.raises(UserError, match=message):
            wrap(mlps(), residual, start="prenorm")
    with pytest.raises(UserError, match="at least 2"):
        wrap(mlps(), "mhc", n_streams=1, start="prenorm-scaled")


def test_optimiser_groups():
    model = nn.Sequential(nn.Embedding(7, D), wrap(mlps(), "hc", n_streams=2), nn.Linear(D, 7))
    groups = {kind: [name for name, _ in named] for kind, named in parameter_groups(model).items()}
    assert set(groups["muon"]) == {f"1.sublayers.{i}.{j}.weight" for i in range(L) for j in (1, 3)}
    assert {"0.weight", "2.weight", "1.connection.first.projection"} <= set(groups["adamw"])
    assert {"1.sites.0.following.static", "1.sublayers.0.0.weight", "2.bias"} <= set(groups["adamw_no_decay"])
    decayed, others = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == len(groups["muon"]) + len(groups["adamw"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    optimizer, ids = build_optimizer(model, OptimConfig()), torch.randint(0, 7, (4, 5))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).view(-1, 7), ids.view(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"none of depthmix\.wrap"):
        parameter_groups(nn.Linear(2, 2))


class Wrong(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(D, D), make

    def forward(self, x):
        return self.make(self.linear(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda y: (y, None), r"sublayer 2 \(Wrong\) returned a tuple"),
        (lambda y: y[..., :4], r"sublayer 2 \(Wrong\) turned shape \[2, 5, 8\] into \[2, 5, 4\]"),
        (lambda y: y.mT, r"sublayer 2 \(Wrong\) turned shape"),
        (lambda y: y.double(), r"sublayer 2 \(Wrong\) turned torch.float32 into torch.float64"),
        (lambda y: y.long(), r"sublayer 2 \(Wrong\) turned torch.float32 into torch.int64"),
    ],
)
def test_a_sublayer_that_is_wrong_is_named(make, message):
    trunk = wrap([*mlps(2), Wrong(make), *mlps(2)], "mgr-competitive", n_streams=2)
    with pytest.raises(UserError, match=message):
        trunk(torch.randn(2, 5, D))


def test_an_error_inside_a_sublayer_names_it():
    trunk = wrap([*mlps(2), mlp().double()], "mgr-competitive", n_streams=2)
    with pytest.raises(RuntimeError) as caught:
        trunk(torch.randn(2, 5, D))
    assert caught.value.__notes__ == ["in sublayer 2 (Sequential), given torch.float32 [2, 5, 8]"]


def test_requests_that_cannot_be_met():
    for arguments, message in (
        (dict(sublayers=[]), "cannot be told|no sublayers"),
        (dict(sublayers=[len]), "sublayer 0 is a builtin_function_or_method"),
        (dict(sublayers=[mlp()] * 2), "sublayers 0 and 1 are one module"),
        (dict(sublayers=[mlp(8), mlp(16)]), "begin with 8, 16 features; give d_model"),
        (dict(sublayers=[nn.Identity()]), "give d_model"),
        (dict(residual="mgr"), "Did you mean"),
        (dict(residual="moda"), "depthmix.GPT has such attentions"),
        (dict(residual="hc", stream_memory="store"), "no option 'stream_memory'"),
        (dict(residual="mgr-competitive:bias=1", bias=2), "both set it"),
        (dict(residual="mgr-competitive", n_streams=0), "n_streams"),
        (dict(residual="mgr-competitive", n_streams=6), "Eq. 14 has no bias"),
        (dict(residual="denseformer", sublayers_per_block=4), "no whole blocks"),
        (dict(residual="siamese", sublayers_per_block=4), "no whole blocks"),
        (dict(sublayers_per_block=0), "sublayers_per_block"),
        (dict(start="other"), "unknown start"),
    ):
        with pytest.raises(UserError, match=message):
            wrap(**({"sublayers": mlps()} | arguments))
    trunk = wrap(mlps(), "prenorm")
    for x, message in (
        (torch.randn(2, 7), r"D = 8 features in dimension -1, got shape \[2, 7\]"),
        (torch.tensor(1.0), "got shape"),
        (torch.ones(2, D, dtype=torch.long), "floating point"),
    ):
        with pytest.raises(UserError, match=message):
            trunk(x)


def test_blocks_of_any_size():
    """DenseFormer averages behind every third sublayer, and SiameseNorm divides by the root of the sublayers so far."""
    trunk = wrap(mlps(), "denseformer", sublayers_per_block=3)
    assert [hasattr(site, "depth_weight") for site in trunk.sites] == [False, False, True] * 2
    trunk = wrap(mlps(), "siamese", sublayers_per_block=3)
    assert [site.scale**-2 for site in trunk.sites] == pytest.approx([3, 3, 3, 6, 6, 6])
