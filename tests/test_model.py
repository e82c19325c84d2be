"""The GPT itself: rotary embedding, cache, initial weights, presets, errors."""

import cmath
import math

import pytest
import torch

from depthmix import GPT, GPTConfig, KVCache
from depthmix.model import MLP, Attention, rotary_tables, rotate
from depthmix.presets import PRESETS


def config(**changes):
    return GPTConfig(**(dict(vocab_size=40, n_layer=3, d_model=16, n_head=2, seq_len=20) | changes))


def test_rotation_is_a_complex_product():
    cos, sin = rotary_tables(8, 5, 10000.0)
    x = torch.randn(5, 8, dtype=torch.float64)
    turned = rotate(x, cos.double(), sin.double())
    for t in range(5):
        for i in range(4):
            z = complex(x[t, i], x[t, i + 4]) * cmath.exp(1j * t * 10000.0 ** (-2 * i / 8))
            assert complex(turned[t, i], turned[t, i + 4]) == pytest.approx(z, abs=1e-6)


def test_attention_against_a_loop():
    torch.manual_seed(0)
    c = config()
    attention = Attention(c).double()
    torch.nn.init.normal_(attention.norm.weight)
    h = torch.randn(2, 6, 16, dtype=torch.float64)
    cos, sin = (x.double() for x in rotary_tables(c.head_dim, 6, c.rope_theta))
    got = attention(attention.norm(h), cos, sin)
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm.weight
    rows = attention.qkv.weight.view(2, 3, 8, 16)  # head, (q, k, v), feature
    out = torch.zeros(2, 6, 2, 8, dtype=torch.float64)
    for b in range(2):
        for head in range(2):
            q, k, v = (normed[b] @ rows[head, j].T for j in range(3))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            for t in range(6):
                weight = torch.softmax(torch.stack([q[t] @ k[u] / math.sqrt(8) for u in range(t + 1)]), 0)
                out[b, t, head] = weight @ v[: t + 1]
    torch.testing.assert_close(got, out.view(2, 6, 16) @ attention.proj.weight.T, rtol=1e-9, atol=1e-12)


def test_mlp_is_relu_squared():
    mlp = MLP(config()).double()
    h = torch.randn(4, 16, dtype=torch.float64)
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden = normed @ mlp.fc.weight.T
    want = (torch.where(hidden > 0, hidden, 0.0) ** 2) @ mlp.proj.weight.T
    torch.testing.assert_close(mlp(mlp.norm(h)), want, rtol=1e-9, atol=1e-12)


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model = GPT(config(), seed=0)
    ids, targets = torch.randint(0, 40, (2, 20)), torch.randint(0, 40, (2, 20))
    targets[0, :5] = -100
    none, loss = model(ids, targets)
    assert none is None
    log_p = model(ids).double().log_softmax(-1)
    kept = targets != -100
    want = -log_p[kept].gather(1, targets[kept].unsqueeze(1)).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("residual", ["prenorm", "mgr-independent", "mgr-competitive"])
@pytest.mark.parametrize("chunks", [[1] * 20, [20], [7, 1, 5, 1, 1, 5]])
def test_cached_logits_equal_uncached(residual, chunks):
    model = GPT(config(residual=residual), seed=0).double()
    ids = torch.randint(0, 40, (2, 20))
    cache = KVCache.empty(model.config, 2, 20, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-10, atol=1e-12)
    assert cache.length == 20


def test_initial_weights():
    model = GPT(config(d_model=128, n_head=1, n_layer=8, vocab_size=2000), seed=0)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for block in model.blocks:
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(16 sublayers)
        assert (block.mlp.norm.weight == 1).all()
    again = GPT(model.config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_built_on_meta_then_initialised_equals_built_at_once():
    with torch.device("meta"):
        model = GPT(config(), seed=0)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    model.init_weights(0)
    want = GPT(config(), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))
    ids = torch.randint(0, 40, (1, 20))
    assert torch.equal(model(ids), want(ids))


@pytest.mark.parametrize("name,millions", [("S", 124), ("M", 354), ("L", 772)])
def test_paper_presets(name, millions):
    preset = PRESETS[name]
    with torch.device("meta"):
        total = sum(p.numel() for p in GPT(preset.model).parameters())
    assert round(total / 1e6) == millions
    assert preset.model.head_dim == 128 and preset.tokens_per_step == 524288
    assert preset.tokens_per_step * preset.steps == pytest.approx(10e9, rel=0.05)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(n_head=3), "d_model / n_head must be an even whole number.* 16 / 3"),
        (dict(d_model=6, n_head=2), "even whole number"),
        (dict(n_streams=0), "n_streams must be a whole number of at least 1, got 0"),
        (dict(n_streams=65), "n_streams must be between 1 and 64, got 65"),
        (dict(n_layer=2.5), "n_layer must be a whole number"),
        (dict(residual="mgr-competetive"), "Did you mean 'mgr-competitive'"),
        (dict(stream_memory="reply"), "Did you mean 'replay'"),
        (dict(n_streams=40, n_layer=22), "Eq. 14 has no bias for M = 5 lerping sublayers and n = 40"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(config(**change))


def test_bad_ids_are_named():
    model = GPT(config(), seed=0)
    with pytest.raises(ValueError, match="21 tokens do not fit: the model was built for seq_len = 20"):
        model(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ids must be whole numbers of shape \[B, T\], got torch.float32"):
        model(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="the cache holds 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=KVCache.empty(model.config, 1, 4))
