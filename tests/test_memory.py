"""Replay repeats store to the last bit, inversion keeps its tolerance; saved bytes are counted exactly."""

import dataclasses
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from depthmix import GPT, GPTConfig
from depthmix.memory import reconstruction_error, saved_bytes
from depthmix.ops import inversion
from depthmix.ops.mgr import step_values


def run(config, dtype, steps=1, seed=0):
    torch.manual_seed(seed)
    model = GPT(config, seed=seed)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_site." in name:
                p.add_(torch.randn(p.shape, generator=g))
    model.to(dtype)
    ids, targets = (torch.randint(0, config.vocab_size, (2, config.seq_len), generator=g) for _ in range(2))
    _, loss = model(ids, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["mgr-independent", "mgr-competitive"])
@pytest.mark.parametrize("blocks,n,window", [(36, 4, 8), (6, 1, 5), (6, 4, 1), (5, 3, 100), (2, 4, 8)])
def test_replay_is_bit_identical_to_store(dtype, residual, blocks, n, window):
    config = GPTConfig(
        64, blocks, 32, 2, 16, residual=residual, n_streams=n, replay_window=window, stream_memory="store"
    )
    loss, gradients = run(config, dtype)
    same_loss, same_gradients = run(dataclasses.replace(config, stream_memory="replay"), dtype)
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


def test_interleaved_passes_with_replay():
    """Windows live in the state: two forward passes before two backward passes do not mix."""
    model = GPT(GPTConfig(64, 6, 32, 2, 16, n_streams=3, replay_window=4), seed=0)
    batches = [torch.randint(0, 64, (2, 16)) for _ in range(2)]

    def gradients(losses):
        model.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    first = gradients([model(batches[0], batches[0])[1]])
    losses = [model(x, x)[1] for x in batches]
    both = gradients(losses[::-1])
    second = gradients([model(batches[1], batches[1])[1]])
    for a, b, c in zip(first, second, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-7)


def test_what_a_handle_stands_for():
    anchor = torch.randn(5, 3, 8)
    steps = [(torch.randn(5, 8), torch.rand(5, 3)) for _ in range(4)]
    s = anchor.double()
    for y, beta in steps:
        s = s + beta.double().unsqueeze(-1) * (y.double().unsqueeze(1) - s)
    found = step_values(anchor, *map(list, zip(*steps, strict=True)))
    torch.testing.assert_close(found.double(), s, rtol=1e-6, atol=1e-6)


def test_a_window_may_be_left_anywhere():
    """Every step goes back to the anchor by itself: what is read inside a window has its gradient."""
    results = []
    for stream_memory in ("store", "replay"):
        config = GPTConfig(64, 4, 32, 2, 16, n_streams=2, replay_window=4, stream_memory=stream_memory)
        model = GPT(config, seed=0)
        h, state = model.residual.begin(model.embed(torch.arange(16).unsqueeze(0)))
        for block in model.blocks[:2]:
            h, state = block(h, state, model.rope_cos, model.rope_sin)
        h.square().sum().backward()
        results.append([p.grad for block in model.blocks[:2] for p in block.parameters()])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_a_window_may_be_cut_between_write_and_read():
    """As a pipeline may: the streams are written there, and values and gradients are the same to rounding."""
    model = GPT(small("replay"), seed=0)
    sites = [site for block in model.blocks for site in (block.attn_site, block.mlp_site)]
    g = torch.Generator().manual_seed(0)
    start = model.residual.begin(torch.randn(1, 16, 32, generator=g))[1]
    outputs = [torch.randn(1, 16, 32, generator=g, requires_grad=True) for _ in sites]

    def run(cut):
        state, total = start, 0.0
        for i, (site, y) in enumerate(zip(sites, outputs, strict=True)):
            if i == cut:
                state = site.write(y, state)
                h = site.read(state)
            else:
                h, state = site(y, state)
            found = torch.stack(site.streams(state))
            assert found.isfinite().all()
            total = total + h.square().sum() + found.detach().square().sum()
        return total, *torch.autograd.grad(total, outputs)

    want = run(None)
    for cut in range(len(sites)):
        for a, b in zip(run(cut), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- inversion ------------------------------------------------------------------------------------


def relative(found, exact):
    """Of all gradients as one vector."""
    exact = torch.cat([g.double().flatten() for g in exact.values()])
    return ((torch.cat([g.double().flatten() for g in found.values()]) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("residual", ["mgr-independent", "mgr-competitive", "mgr-review"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_inversion_of_36_blocks_in_bf16(residual, n):
    config = GPTConfig(64, 36, 32, 2, 16, residual=residual, n_streams=n, stream_memory="store")
    loss, gradients = run(config, torch.bfloat16)
    same_loss, found = run(dataclasses.replace(config, stream_memory="inversion"), torch.bfloat16)
    assert torch.equal(loss, same_loss)  # the forward pass is the same
    assert relative(found, gradients) < 0.01


def test_inversion_in_fp32_is_close_to_store():
    config = GPTConfig(64, 12, 32, 2, 16, stream_memory="store")
    _, gradients = run(config, torch.float32)
    _, found = run(dataclasses.replace(config, stream_memory="inversion"), torch.float32)
    assert relative(found, gradients) < 1e-5


def chain(gates, dtype, sizes=None, width=24, tokens=6):
    """Streams, outputs and gates of lerps in a row: ``gates`` makes ``beta [tokens, n]`` of step j."""
    g = torch.Generator().manual_seed(5)
    beta = [gates(j, g) for j in range(40)]
    n = beta[0].shape[1]
    streams = [torch.randn(tokens, n, width, generator=g).to(dtype)]
    outputs = []
    for j, b in enumerate(beta):
        size = 1.0 if sizes is None else sizes[j % len(sizes)]
        outputs.append((size * torch.randn(tokens, width, generator=g)).to(dtype))
        streams.append(step_values(streams[-1], [outputs[-1]], [b]))
    return streams, outputs, beta


def walk_back(streams, outputs, beta, fallback):
    """Largest relative error of any row on the way down, and how many steps keep everything."""
    budget, kept = inversion.first_budget(streams[0]), []
    for j, b in enumerate(beta):
        anchored = j in (0, len(beta) - 1)
        found, budget = inversion.choose(streams[j], streams[j + 1], b, budget, fallback, anchored)
        kept.append(found)
    worst, s = 0.0, None
    for j in reversed(range(len(beta))):
        s = inversion.undo(s, outputs[j], beta[j], kept[j])
        exact = streams[j].double()
        error = (s.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst = max(worst, error.nan_to_num(nan=float("inf")).max().item())
    return worst, sum(x.anchor is not None for x in kept)


ADVERSARIES = {
    "spread": lambda j, g: torch.sigmoid(torch.randn(6, 4, generator=g) - 3),
    "half": lambda j, g: torch.full((6, 4), 0.5),
    "near 1 in every layer": lambda j, g: 1 - 1e-4 * torch.rand(6, 4, generator=g),
    "one": lambda j, g: torch.ones(6, 4),
    "one row alone": lambda j, g: torch.tensor([0.02] * 23 + [0.7]).view(6, 4),
    "near 1 now and then": lambda j, g: torch.full((6, 4), 0.999 if j % 7 == 3 else 0.01),
    "zero": lambda j, g: torch.zeros(6, 4),
}


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.01), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("sizes", [None, (1.0, 100.0, 0.01)], ids=["even", "uneven"])
@pytest.mark.parametrize("gates", ADVERSARIES)
def test_the_tolerance_holds_for_any_gates(gates, sizes, dtype, tolerance):
    steps = chain(ADVERSARIES[gates], dtype, sizes)
    worst, _ = walk_back(*steps, inversion.Fallback(0.05, tolerance))
    assert worst <= tolerance
    if gates == "zero":
        assert worst == 0


def test_anchors_are_few_where_gates_are_small():
    steps = chain(ADVERSARIES["spread"], torch.float32)
    assert walk_back(*steps, inversion.Fallback(0.01, 0.02))[1] == 2


@pytest.mark.parametrize("gates", ["half", "near 1 in every layer"])
def test_the_papers_scheme_breaks(gates):
    """Rows with the largest gates alone: the error grows with the product of 1 / (1 - beta)."""
    steps = chain(ADVERSARIES[gates], torch.bfloat16)
    worst, anchors = walk_back(*steps, inversion.Fallback(0.01, None))
    assert anchors == 2 and worst > 1


def test_the_papers_scheme_breaks_a_gradient():
    config = GPTConfig(
        64, 36, 32, 2, 16, n_streams=2, stream_memory="store", score_scale="unit", gate_base_bias=-1.0
    )
    _, gradients = run(config, torch.bfloat16)
    change = lambda **kw: dataclasses.replace(config, stream_memory="inversion", **kw)  # noqa: E731
    _, paper = run(change(inversion="paper"), torch.bfloat16)
    _, anchored = run(change(), torch.bfloat16)
    assert relative(paper, gradients) > 0.05 and relative(anchored, gradients) < 0.01


@pytest.mark.parametrize("scheme", ["anchored", "paper"])
def test_the_reconstruction_error_is_reported(scheme):
    """As a walk through the saved streams of a backward pass finds it."""
    config = small("inversion", inversion=scheme, inversion_top_p=0.1, gate_base_bias=-2.0)
    model = GPT(config, seed=0).to(torch.bfloat16)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    report = reconstruction_error(model, ids)
    assert [row["sublayer"] for row in report] == list(range(3, 11))
    assert report[0]["anchor"] and report[-1]["anchor"] and report[0]["measured"] == 0
    assert all(row["kept"] == 1 or row["kept"] == pytest.approx(10 / 96) for row in report)
    if scheme == "anchored":
        assert all(row["measured"] <= config.inversion_tolerance for row in report)

    # The streams that a backward pass hands down, seen from outside.
    undone, true = [], []
    original = inversion.undo
    inversion.undo = lambda *args: undone.append(original(*args)) or undone[-1]
    hooks = [
        site.register_forward_pre_hook(lambda _, args: true.append(args[1][0].detach()))
        for block in model.blocks
        for site in (block.attn_site, block.mlp_site)
    ]
    try:
        model(ids, ids)[1].backward()
    finally:
        inversion.undo = original
        for hook in hooks:
            hook.remove()
    for row, found, exact in zip(report, reversed(undone), true[2:], strict=True):
        exact = exact.reshape(found.shape).float()
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert row["measured"] == pytest.approx(error.max().item(), rel=1e-5)


def test_reconstruction_needs_lerps():
    model = GPT(GPTConfig(64, 2, 32, 2, 16, residual="prenorm"), seed=0)
    with pytest.raises(ValueError, match="'prenorm' has no lerping sublayers"):
        reconstruction_error(model, torch.zeros(1, 4, dtype=torch.long))


def test_leaving_an_inverted_stretch_is_an_error_not_a_wrong_gradient():
    model = GPT(GPTConfig(64, 4, 32, 2, 16, n_streams=2, stream_memory="inversion"), seed=0)
    h, state = model.residual.begin(model.embed(torch.randint(0, 64, (1, 16))))
    for block in model.blocks[:2]:
        h, state = block(h, state, model.rope_cos, model.rope_sin)
    with pytest.raises(RuntimeError, match="left before its last step"):
        h.sum().backward()


# --- whole models under what users put around them -------------------------------------------------

STRATEGIES = ("store", "replay", "inversion")


def small(stream_memory, **options):
    return GPTConfig(64, 5, 32, 2, 16, n_streams=3, replay_window=5, stream_memory=stream_memory, **options)


def losses_and_gradients(model, around=lambda model, ids: model(ids, ids.roll(1))[1]):
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    loss = around(model, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stream_memory", STRATEGIES)
def test_activation_checkpointing(stream_memory):
    """Block by block, in the form that saves by hooks: every saved tensor is read once."""
    model = GPT(small(stream_memory), seed=0)
    loss, gradients = losses_and_gradients(model)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again, found = losses_and_gradients(model)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("stream_memory", STRATEGIES)
def test_autocast(stream_memory):
    """Streams stay fp32 and outputs come in bf16; strategies agree as without."""

    def around(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, ids.roll(1))[1]

    loss, gradients = losses_and_gradients(GPT(small("store"), seed=0), around)
    again, found = losses_and_gradients(GPT(small(stream_memory), seed=0), around)
    assert torch.equal(loss, again)
    if stream_memory == "inversion":
        assert relative(found, gradients) < 1e-5
    else:
        assert all(torch.equal(gradients[name], found[name]) for name in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("stream_memory", STRATEGIES)
def test_compiled(stream_memory):
    """As one graph where what is kept does not depend on values; what is kept is the same."""
    model = GPT(small(stream_memory), seed=0)
    loss, gradients = losses_and_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=stream_memory != "inversion")
    again, found = losses_and_gradients(compiled)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-6)
    ids = torch.zeros(2, 16, dtype=torch.long)
    assert saved_bytes(compiled, ids, ids) <= 1.01 * saved_bytes(model, ids, ids)


# --- counting -------------------------------------------------------------------------------------


class Kept(torch.nn.Module):
    """Saves what is known by hand: x and exp(x) are one tensor each, whoever saves them again."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x, _):
        e = (x * self.weight).exp()  # mul keeps x (the weight is a parameter), exp keeps its result
        return None, (e * e).sum()  # keeps e twice: once


def test_saved_bytes_by_hand():
    x = torch.randn(3, 4)
    assert saved_bytes(Kept(), x, None) == 2 * 3 * 4 * 4


def test_saved_bytes_of_the_strategies():
    """Per lerp: store adds the new streams (n D), replay adds them once a window."""
    n, width, tokens = 4, 64, 32
    config = GPTConfig(64, 12, width, 2, 16, n_streams=n, stream_memory="store")
    ids = torch.randint(0, 64, (2, 16)), torch.randint(0, 64, (2, 16))
    store = saved_bytes(GPT(config, seed=0), *ids)
    kept = {}
    for window in (3, 7, 21):
        changed = dataclasses.replace(config, stream_memory="replay", replay_window=window)
        kept[window] = saved_bytes(GPT(changed, seed=0), *ids)
    lerps = 24 - (n - 1)
    for window, value in kept.items():
        # store: the streams entering every lerp; replay: those entering a window.
        # The ramp's pool keeps the first of them in both.
        assert store - value == (lerps - -(-lerps // window)) * n * width * tokens * 4
