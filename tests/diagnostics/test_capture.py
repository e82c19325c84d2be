"""Points by name: what is captured is what passes, for every connection, and nothing is left behind."""

import pytest
import torch

import depthmix
from depthmix import GPT, GPTConfig, available_residuals
from depthmix.diagnostics.capture import BLOCK_POINTS, point_names
from depthmix.errors import UserError

LAYERS, WIDTH = 4, 16


def model(residual, seed=0, **config):
    """Of random weights everywhere, gates included."""
    made = GPT(
        GPTConfig(
            vocab_size=40, n_layer=LAYERS, d_model=WIDTH, n_head=2, seq_len=24, residual=residual, **config
        ),
        seed=seed,
    ).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return made


IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", available_residuals())
def test_what_is_captured_is_what_the_model_computes(residual):
    """Every sublayer's output is that of the sublayer on what is read, and what is left behind feeds the head."""
    made = model(residual)
    with torch.no_grad():
        plain = made.hidden(IDS)
        with depthmix.capture(made, "*") as c:
            watched = made.hidden(IDS)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    cos, sin = made.rotary(IDS)
    torch.testing.assert_close(c["hook_embed"], made.embed(IDS).detach())
    for i, block in enumerate(made.blocks):
        if residual != "moda":  # its attention also reads a memory
            again = block.attn(block.attn.norm(c[f"blocks.{i}.hook_resid_pre"]), cos, sin).detach()
            torch.testing.assert_close(c[f"blocks.{i}.hook_attn_out"], again, rtol=1e-4, atol=1e-5)
        again = block.mlp(block.mlp.norm(c[f"blocks.{i}.hook_resid_mid"])).detach()
        torch.testing.assert_close(c[f"blocks.{i}.hook_mlp_out"], again, rtol=1e-4, atol=1e-5)
        if i:
            assert torch.equal(c[f"blocks.{i}.hook_resid_pre"], c[f"blocks.{i - 1}.hook_resid_post"])
    last = c[f"blocks.{LAYERS - 1}.hook_resid_post"]
    torch.testing.assert_close(made.norm(last).detach(), plain, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


@pytest.mark.parametrize("residual", ["mgr-independent", "mgr-competitive", "mgr-review"])
def test_streams_are_lerped_by_the_gates_and_read_by_the_pools(residual):
    made = model(residual, n_streams=3)
    with torch.no_grad(), depthmix.capture(made, "blocks.*") as c:
        made.hidden(IDS)
    for i in range(1, LAYERS):  # the ramp ends behind block 0
        before = c[f"blocks.{i - 1}.hook_streams"]
        for suffix, output, read in (("_mid", "attn_out", "resid_mid"), ("", "mlp_out", "resid_post")):
            beta, alpha = (c[f"blocks.{i}.hook_{k}{suffix}"].unsqueeze(-1) for k in ("gate", "pool"))
            streams = c[f"blocks.{i}.hook_streams{suffix}"]
            y = c[f"blocks.{i}.hook_{output}"].unsqueeze(-2)
            torch.testing.assert_close(streams, (1 - beta) * before + beta * y, rtol=1e-4, atol=1e-5)
            pooled = (alpha * streams).sum(-2)
            torch.testing.assert_close(c[f"blocks.{i}.hook_{read}"], pooled, rtol=1e-4, atol=1e-5)
            before = streams


def test_prenorm_adds():
    made = model("prenorm")
    with torch.no_grad(), depthmix.capture(made, "blocks.*") as c:
        made.hidden(IDS)
    for i in range(LAYERS):
        x, attn, mid, mlp, post = (
            c[f"blocks.{i}.hook_{p}"] for p in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        assert torch.equal(x + attn, mid) and torch.equal(mid + mlp, post)


@pytest.mark.parametrize("memory", ["store", "replay", "inversion"])
def test_under_gradients_values_are_those_without(memory):
    """Replay writes its streams now and then only: what is shown is what they would be."""
    made = model("mgr-competitive", n_streams=2, stream_memory=memory)
    patterns = ["*hook_streams*", "*hook_gate*", "*hook_pool*"]
    with torch.no_grad(), depthmix.capture(made, patterns) as plain:
        made.hidden(IDS)
    with depthmix.capture(made, patterns) as c:
        made(IDS, IDS)[1].backward()
    assert [*c] == [*plain]
    for name in plain:
        torch.testing.assert_close(c[name], plain[name], rtol=1e-4, atol=1e-5)
        assert not c[name].requires_grad


def test_gradients_flow_through_what_is_not_detached():
    made = model("prenorm")
    with depthmix.capture(made, "blocks.1.hook_mlp_out", detach=False) as c:
        loss = made(IDS, IDS)[1]
    (grad,) = torch.autograd.grad(loss, c["blocks.1.hook_mlp_out"])
    assert grad.abs().sum() > 0


def test_compiled_blocks_are_seen():
    made = model("prenorm")
    with torch.no_grad(), depthmix.capture(made, "blocks.*.hook_mlp_out") as plain:
        made.hidden(IDS)
    torch._dynamo.reset()
    for block in made.blocks:
        block.compile(backend="aot_eager")
    with torch.no_grad():
        made.hidden(IDS)
        with depthmix.capture(made, "blocks.*.hook_mlp_out") as c:
            made.hidden(IDS)
    assert len(c) == LAYERS
    for name in plain:
        torch.testing.assert_close(c[name], plain[name], rtol=1e-4, atol=1e-5)


def test_values_are_given_away_in_the_order_of_depth():
    made, seen = model("mgr-independent"), []
    with torch.no_grad(), depthmix.capture(made, "*", lambda name, value: seen.append(name)) as c:
        made.hidden(IDS)
        made.hidden(IDS)
    assert not c and len(seen) == 2 * len(set(seen))
    order = point_names(LAYERS)
    outputs = [name for name in seen[: len(seen) // 2] if name.endswith("_out")]
    assert outputs == [name for name in order if name.endswith("_out")]


def test_names():
    names = point_names(2)
    assert len(names) == 1 + 2 * len(BLOCK_POINTS) == len(set(names))
    with depthmix.capture(model("prenorm"), "blocks.*.hook_gate") as c:
        pass
    with pytest.raises(KeyError, match="prenorm has nothing there"):
        c["blocks.0.hook_gate"]
    with pytest.raises(KeyError, match="unknown point"):
        c["blocks.0.gate"]


@pytest.mark.parametrize(
    "patterns,message",
    [
        ("blocks.9.hook_gate", "unknown point"),
        ([], "needs the names"),
        (["hook_embed", "hook_gat"], "hook_gat"),
    ],
)
def test_wrong_patterns(patterns, message):
    with (
        pytest.raises(UserError, match=message),
        depthmix.capture(model("prenorm"), patterns),
    ):
        pass


def test_wrong_model():
    with (
        pytest.raises(UserError, match="got Linear"),
        depthmix.capture(torch.nn.Linear(2, 2), "*"),
    ):
        pass


def test_an_error_inside_leaves_no_hook():
    made = model("hc")
    with pytest.raises(RuntimeError), depthmix.capture(made, "*"):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
