"""Blocks that write nothing: every connection against models and equations that do not have the block."""

import copy
import math

import pytest
import torch

from depthmix import GPT, GPTConfig, available_residuals
from depthmix.diagnostics.subject import Run

VOCABULARY = 32

DELETED = "prenorm", "moda", "highway", "highway-additive", "review", "review-convex"
"""Without a block these are the model without its modules."""
ZEROED = (
    "prenorm",
    "siamese",
    "denseformer",
    "hc",
    "hc-static",
    "mhc",
    "mhc-lite",
    "highway-additive",
    "review",
)
"""These are what they are where both sublayers return zero."""
MGR = "mgr-competitive", "mgr-independent", "mgr-review"
SOURCES = "attnres", "attnres-block"


def perturbed(residual, seed=0, **changes):
    """A float64 model whose every parameter is away from its initial value."""
    options = dict(vocab_size=VOCABULARY, n_layer=4, d_model=16, n_head=2, seq_len=12, n_streams=3)
    model = GPT(GPTConfig(residual=residual, **(options | changes)), seed=seed).double()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
    return model


def tokens(batch=2, length=7):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def removed(model, block, ids):
    """The trunk's output without the block, ``None`` where it cannot be removed."""
    subject = Run(model, name="tiny")
    carry = subject.begin(ids)
    for i in range(block):
        carry = subject.block(i, carry)
    carry = subject.without(block, carry)
    if carry is None:
        assert "append" in subject.kept_because(block)
        return None
    assert subject.kept_because(block) is None
    for i in range(block + 1, model.config.n_layer):
        carry = subject.block(i, carry)
    return subject.end(carry)


@torch.no_grad()
def hidden(model, ids):
    return model.hidden(ids)


def same(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


def zeroed(model, block):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[block].attn.proj.weight.zero_()
        model.blocks[block].mlp.proj.weight.zero_()
    return model


def shut(model, block):
    """Both gates of an MGR block admit nothing."""
    model = copy.deepcopy(model)
    for site in (model.blocks[block].attn_site, model.blocks[block].mlp_site):
        with torch.no_grad():
            site.gate_bias[-site.n_streams :] = -math.inf
    return model


def test_every_connection_has_its_truth_here():
    assert {*DELETED, *ZEROED, *MGR, *SOURCES} == {*available_residuals()}


PLACES = [(4, 0), (4, 1), (4, 2), (4, 3), (1, 0)]
depths = pytest.mark.parametrize("n_layer,block", PLACES, ids=lambda value: str(value))


@depths
@pytest.mark.parametrize("residual", DELETED)
def test_equals_the_model_without_the_block(residual, n_layer, block):
    model, ids = perturbed(residual, n_layer=n_layer), tokens()
    shorter = copy.deepcopy(model)
    del shorter.blocks[block]
    found = removed(model, block, ids)
    same(found, hidden(shorter, ids) if n_layer > 1 else shorter.norm(shorter.embed(ids)))
    assert not torch.allclose(found, hidden(model, ids), rtol=1e-3)


@pytest.mark.parametrize(
    "residual,n_layer,block",
    [(r, *place) for r in (*ZEROED, "hc:merge=mean", "hc-static:merge=mean") for place in PLACES]
    # An average over every second block takes two.
    + [(f"denseformer:{o}=2", *place) for o in ("dilation", "period") for place in PLACES if place[0] > 1],
)
def test_equals_a_block_whose_sublayers_return_zero(residual, n_layer, block):
    model, ids = perturbed(residual, n_layer=n_layer), tokens()
    found = removed(model, block, ids)
    same(found, hidden(zeroed(model, block), ids))
    assert not torch.allclose(found, hidden(model, ids), rtol=1e-3)


@depths
@pytest.mark.parametrize("memory", ["store", "replay", "inversion"])
@pytest.mark.parametrize("n_streams", [1, 2, 3])
@pytest.mark.parametrize("residual", MGR)
def test_equals_shut_gates(residual, n_streams, memory, n_layer, block):
    """The pool behind the block still reads; blocks whose outputs are streams cannot be removed."""
    model = perturbed(residual, n_layer=n_layer, n_streams=n_streams, stream_memory=memory, replay_window=2)
    ids = tokens()
    found = removed(model, block, ids)
    if 2 * block + 1 < n_streams:  # attention appends
        assert found is None
        return
    same(found, hidden(shut(model, block), ids))
    assert not torch.allclose(found, hidden(model, ids), rtol=1e-3)


@torch.no_grad()
def over_remaining_sources(model, ids, block_of, block):
    """Attention Residuals as their equations stand, over the outputs of all sublayers but the block's."""
    cos, sin = model.rotary(ids)
    embedding = h = model.embed(ids)
    sums = {}
    sublayers = [(f, s) for b in model.blocks for f, s in ((b.attn, b.attn_site), (b.mlp, b.mlp_site))]
    for place, (sublayer, site) in enumerate(sublayers):
        if place // 2 != block:
            x = sublayer.norm(h)
            y = sublayer(x, cos, sin) if place % 2 == 0 else sublayer(x)
            sums[block_of[place]] = sums.get(block_of[place], 0) + y
        sources = torch.stack([embedding, *sums.values()])
        keys = sources / (sources.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
        query = site.query * site.key_norm_weight
        h = ((keys @ query).softmax(0).unsqueeze(-1) * sources).sum(0)
    return model.norm(h)


@pytest.mark.parametrize(
    "residual,block_of",
    [
        ("attnres", [*range(12)]),
        ("attnres", [0, 1]),
        ("attnres-block", [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]),
        ("attnres-block", [0, 1]),
        (
            "attnres-block:blocks=4",
            [i // 3 for i in range(12)],
        ),  # blocks that begin in a removed block's middle
        ("attnres-block:blocks=1", [0] * 12),
        ("attnres-block:block_size=4", [i // 4 for i in range(12)]),
        ("attnres-block:block_size=5", [i // 5 for i in range(12)]),
        ("attnres-block:block_size=2", [i // 2 for i in range(12)]),
    ],
)
def test_equals_attention_over_the_remaining_sources(residual, block_of):
    n_layer, ids = len(block_of) // 2, tokens()
    model = perturbed(residual, n_layer=n_layer)
    with torch.no_grad():
        same(over_remaining_sources(model, ids, block_of, None), hidden(model, ids))
    for block in range(n_layer):
        found = removed(model, block, ids)
        same(found, over_remaining_sources(model, ids, block_of, block))
        assert not torch.allclose(found, hidden(model, ids), rtol=1e-3)


@pytest.mark.parametrize("residual", available_residuals())
def test_nothing_that_was_handed_over_changes(residual):
    """The walk goes on from the state that was given to ``without``."""
    model, ids = perturbed(residual), tokens()
    subject = Run(model, name="tiny")
    with torch.no_grad():
        carry = subject.begin(ids)
        for block in range(4):
            subject.without(block, carry)
            carry = subject.block(block, carry)
        assert torch.equal(subject.end(carry), subject.hidden(ids))
