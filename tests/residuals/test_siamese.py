"""SiameseNorm against its equations, with the sublayers' own norms and by themselves."""

import math

import numpy as np
import pytest
import torch

import depthmix
from depthmix.config import GPTConfig
from depthmix.residuals import build_residual


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def np_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean() + eps) * weight


def config(n_layer=3, d_model=8, **changes):
    return GPTConfig(16, n_layer, d_model, 1, 8, residual="siamese", **changes)


def perturbed(config, seed=0):
    model = depthmix.GPT(config, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model


@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_trunk_follows_the_equations(blocks):
    g = torch.Generator().manual_seed(0)
    residual = build_residual(config(n_layer=blocks, norm_eps=1e-2)).double()
    sites = [residual.site(i).double() for i in range(1, 2 * blocks + 1)]
    for module in (residual, *sites):
        for p in module.parameters():
            torch.nn.init.normal_(p, generator=g)
    e, *outputs = (torch.randn(2, 3, 8, generator=g, dtype=torch.float64) for _ in range(2 * blocks + 1))
    h, state = residual.begin(e)
    inputs = [h]
    for z, site in zip(outputs, sites, strict=True):
        h, state = site(z, state)
        inputs.append(h)
    end = residual.finish(h, state)

    norms = [tuple(p.detach().numpy() for p in (m.post_weight, m.pre_weight)) for m in (residual, *sites)]
    for t in np.ndindex(2, 3):
        x = y = e[t].numpy()
        for sublayer, z in enumerate(outputs):
            post, pre = norms[sublayer]
            x = np_norm(x, post, 1e-2)
            want = x + np_norm(y, pre, 1e-2)
            np.testing.assert_allclose(inputs[sublayer][t].detach().numpy(), want, rtol=1e-10, atol=1e-12)
            block = sublayer // 2
            x = x + z[t].numpy() / math.sqrt(2 * (block + 1))
            y = y + z[t].numpy()
        post, pre = norms[-1]
        want = np_norm(x, post, 1e-2) + np_norm(y, pre, 1e-2)
        np.testing.assert_allclose(end[t].detach().numpy(), want, rtol=1e-10, atol=1e-12)


def test_model_is_the_published_block_with_its_three_norms():
    """norm1 to norm3 of a sublayer: post on x, pre on y, and the sublayer's own in front of their sum."""
    model = perturbed(config()).double()
    ids = torch.randint(0, 16, (2, 8))
    calls = []
    for block in model.blocks:
        for sublayer in (block.attn, block.mlp):
            sublayer.norm.register_forward_hook(lambda module, args, out: calls.append(args[0]))

    def norm(x, weight):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    with torch.no_grad():
        logits = model(ids)
        seen = list(calls)
        cos, sin = model.rope_cos[:8], model.rope_sin[:8]
        x = y = model.embed(ids)
        before, wanted = model.residual, []
        for i, block in enumerate(model.blocks):
            for run, site in (
                (lambda h, f=block.attn: f(f.norm(h), cos, sin), block.attn_site),
                (lambda h, f=block.mlp: f(f.norm(h)), block.mlp_site),
            ):
                x = norm(x, before.post_weight)
                wanted.append(x + norm(y, before.pre_weight))
                z = run(wanted[-1])
                x, y = x + z / (2 * (i + 1)) ** 0.5, y + z
                before = site
        end = norm(norm(x, before.post_weight) + norm(y, before.pre_weight), model.norm.weight)
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(logits, end @ model.embed.weight.t(), rtol=1e-10, atol=1e-10)


def test_norms_start_at_one_and_none_is_idle():
    """Two norms in front of each of L sublayers and two at the end, none more; each changes the output."""
    model = depthmix.GPT(config(n_layer=4), seed=0)
    weights = {n: p for n, p in model.named_parameters() if "_site." in n or n.startswith("residual.")}
    assert len(weights) == 2 * (8 + 1)
    assert all(p.shape == (8,) and p.eq(1).all() for p in weights.values())
    ids = torch.randint(0, 16, (2, 8))
    model(ids, ids.roll(1))[1].backward()
    for name, p in weights.items():
        assert p.grad.abs().sum() > 0, name


def test_post_norm_stream_has_the_size_of_its_weight():
    """Whatever is added, the x stream that a sublayer reads has root mean square 1 (weights one); y grows."""
    residual = build_residual(config(n_layer=6))
    _, state = residual.begin(torch.randn(2, 3, 8) * 5)
    sizes = []
    for i in range(1, 13):
        _, state = residual.site(i)(torch.randn(2, 3, 8) * 10, state)
        x, y = residual.site(i).streams(state)
        torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 3), rtol=1e-4, atol=0)
        sizes.append(y.square().mean().item())
    assert sizes[-1] > 5 * sizes[0]


def test_streams_stay_fp32_under_autocast():
    residual = build_residual(config())
    with torch.autocast("cpu", torch.bfloat16):
        _, state = residual.begin(torch.randn(2, 3, 8))
        h, state = residual.site(1)(torch.randn(2, 3, 8).bfloat16(), state)
    assert h.dtype == torch.float32 and all(s.dtype == torch.float32 for s in state)


def test_says_why_it_is_no_linear_mixture():
    residual = build_residual(config())
    assert "linear" in residual.not_linear
    # It is not: twice the embedding with the same outputs does not move the first read in proportion.
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(residual.begin(2 * x)[0], residual.begin(x)[0], rtol=1e-4, atol=1e-4)


def test_it_has_no_options():
    with pytest.raises(ValueError, match=r"siamese has no option 'n_streams'\. siamese has no options"):
        GPTConfig(16, 1, 8, 1, 8, residual="siamese:n_streams=2")
