"""Attention Residuals against the report's equations, transcribed here a second time in float64."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from depthmix import GPT, GPTConfig
from depthmix.memory import saved_bytes
from depthmix.residuals import build_residual
from depthmix.residuals.attnres import block_starts, reader_groups

WIDTH = 8


def transcribed(x, outputs, queries, gammas, block_of, eps):
    """h_2 .. h_L and the trunk's output, [L, B, T, D], token by token (Eq. 2 to 6).

    ``block_of[l]`` is the block of sublayer l (0-based); the full form has a block for each. The sources of
    the read behind sublayer l: the embedding and, for every block begun, the sum of its outputs so far.
    """
    reads = np.zeros((len(outputs), *x.shape))
    for token in np.ndindex(*x.shape[:-1]):
        for l in range(len(outputs)):  # noqa: E741
            sources = [x[token]]
            for block in range(block_of[l] + 1):
                members = [outputs[i][token] for i in range(l + 1) if block_of[i] == block]
                sources.append(sum(members))
            logits = []
            for v in sources:
                key = v / math.sqrt((v**2).mean() + eps) * gammas[l]
                logits.append(float(queries[l] @ key))
            top = max(logits)
            total = sum(math.exp(a - top) for a in logits)
            for a, v in zip(logits, sources, strict=True):
                reads[l][token] += math.exp(a - top) / total * v
    return reads


def config_of(residual, n_layer, **changes):
    return GPTConfig(16, n_layer, WIDTH, 1, 8, residual=residual, **changes)


def sites_of(residual, n_layer, dtype=torch.float64, seed=0, **changes):
    """The connection and its sites, every parameter drawn."""
    config = config_of(residual, n_layer, **changes)
    connection = build_residual(config)
    sites = [connection.site(i).to(dtype) for i in range(1, config.n_sublayers + 1)]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for site in sites for p in site.parameters()):
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return connection, sites


def drawn(n_sublayers, dtype=torch.float64, seed=1, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 3, WIDTH, generator=g, dtype=torch.float64) for _ in range(n_sublayers + 1)]
    return [(t * (1 + i % 3)).to(dtype).requires_grad_(requires_grad) for i, t in enumerate(tensors)]


def run(connection, sites, values):
    """The reads behind every sublayer, whose outputs are given; in two phases, as the model does it."""
    _, state = connection.begin(values[0])
    state = connection.foresee(state, sites)
    reads = []
    for site, y in zip(sites, values[1:], strict=True):
        h, state = site(y, state)
        reads.append(h)
    return reads


def parameters_of(sites):
    queries = [site.query for site in sites]
    gammas = [
        torch.ones(WIDTH, dtype=torch.float64) if s.key_norm_weight is None else s.key_norm_weight
        for s in sites
    ]
    return queries, gammas


@pytest.mark.parametrize("key_norm", ["learned", "plain"])
@pytest.mark.parametrize(
    "residual,n_layer,block_of",
    [
        ("attnres", 1, [0, 1]),
        ("attnres", 22, list(range(44))),  # 45 sources at the end
        ("attnres-block", 12, [i // 3 for i in range(24)]),  # 8 blocks
        ("attnres-block", 2, [0, 1, 2, 3]),  # fewer sublayers than 8
        ("attnres-block:blocks=4", 5, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]),
        ("attnres-block:blocks=1", 3, [0] * 6),
        ("attnres-block:block_size=4", 5, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ("attnres-block:block_size=1", 20, list(range(40))),
    ],
)
def test_reads_equal_the_equations(residual, n_layer, block_of, key_norm):
    connection, sites = sites_of(f"{residual}:key_norm={key_norm}", n_layer, norm_eps=0.01)
    values = drawn(len(sites))
    queries, gammas = ([p.detach().numpy() for p in ps] for ps in parameters_of(sites))
    want = transcribed(values[0].numpy(), [v.numpy() for v in values[1:]], queries, gammas, block_of, 0.01)
    h, _ = connection.begin(values[0])
    assert torch.equal(h, values[0])
    for got, expected in zip(run(connection, sites, values), want, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("residual", ["attnres", "attnres-block:blocks=3"])
@pytest.mark.parametrize(
    "dtype,bound", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_low_precision_rounds_once(residual, dtype, bound):
    """Scores and mean are fp32: the error is that of rounding the sources written and the result."""
    connection, sites = sites_of(residual, 20, dtype)
    values = drawn(len(sites), dtype)
    _, state = connection.begin(values[0])
    for site, y in zip(sites, values[1:], strict=True):
        h, state = site(y, state)
        k = site.n_sources + site.new_source
        sources = [v.double() for v in state[:k]]
        query = site.query.double() * site.key_norm_weight.double()
        logits = torch.stack(
            [(v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ query for v in sources]
        )
        want = (logits.softmax(0).unsqueeze(-1) * torch.stack(sources)).sum(0)
        assert h.dtype == dtype and all(v.dtype == dtype for v in state[:k])
        assert (h.double() - want).abs().max() <= bound * want.abs().max()


def test_starts_as_the_mean_of_the_sources():
    connection, sites = sites_of("attnres", 4)
    values = drawn(8)
    for site in sites:
        site.reset_parameters()
        assert not site.query.any() and torch.equal(site.key_norm_weight, torch.ones_like(site.query))
    for i, h in enumerate(run(connection, sites, values)):
        torch.testing.assert_close(h * (i + 2), sum(values[: i + 2]))


def test_one_block_is_a_residual_with_the_embedding_apart():
    connection, sites = sites_of("attnres-block:blocks=1", 3)
    x, *outputs = drawn(6)
    for i, h in enumerate(run(connection, sites, [x, *outputs])):
        added = sum(outputs[: i + 1])
        # On the line between the two, at the same place for every feature.
        share = ((h - x) * (added - x)).sum(-1, keepdim=True) / (added - x).square().sum(-1, keepdim=True)
        assert (share > 0).all() and (share < 1).all()
        torch.testing.assert_close(h, x + share * (added - x))
    for site in sites:
        site.reset_parameters()
    torch.testing.assert_close(run(connection, sites, [x, *outputs])[-1], (x + sum(outputs)) / 2)


def test_as_many_blocks_as_sublayers_is_the_full_form():
    values = drawn(10)
    full = run(*sites_of("attnres", 5), values)
    for spec in ("blocks=10", "block_size=1"):
        for a, b in zip(full, run(*sites_of(f"attnres-block:{spec}", 5), values), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "n_sublayers,blocks,block_size,sizes",
    [
        (24, None, None, [3] * 8),
        (6, None, None, [1] * 6),
        (24, 4, None, [6] * 4),
        (24, None, 6, [6] * 4),
        (32, 6, None, [6, 6, 5, 5, 5, 5]),
        (10, 7, None, [2, 2, 2, 1, 1, 1, 1]),  # ceil(10 / 7) = 2 a block would be 5 blocks
        (10, None, 4, [4, 4, 2]),
        (10, 1, None, [10]),
        (10, None, 10, [10]),
        (10, 10, None, [1] * 10),
    ],
)
def test_block_sizes(n_sublayers, blocks, block_size, sizes):
    want = [i == 0 for size in sizes for i in range(size)]
    assert block_starts(n_sublayers, blocks, block_size) == want


@pytest.mark.parametrize(
    "spec,message",
    [
        ("attnres-block:blocks=0", "blocks must be at least 1, got 0"),
        ("attnres-block:block_size=-2", "block_size must be at least 1, got -2"),
        ("attnres-block:blocks=2:block_size=2", "got both: blocks = 2 and block_size = 2"),
        ("attnres-block:blocks=9", "blocks = 9 is more than the model's 8 sublayers.*Use 1 to 8"),
        ("attnres-block:block_size=9", "block_size = 9 is more than the model's 8 sublayers"),
        ("attnres-block:blocks=two", "blocks must be a whole number or none"),
        ("attnres:key_norm=none", "key_norm must be learned or plain"),
        ("attnres:blocks=2", "residual attnres has no option 'blocks'"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_residual(config_of(spec, 4))


def test_parameters_and_their_groups():
    _, learned = sites_of("attnres", 2)
    _, plain = sites_of("attnres:key_norm=plain", 2)
    for site in learned:
        assert {n: tuple(p.shape) for n, p in site.named_parameters()} == {
            "query": (WIDTH,),
            "key_norm_weight": (WIDTH,),
        }
        assert {site.optimizer_group(n, p) for n, p in site.named_parameters()} == {"adamw_no_decay"}
    assert [n for site in plain for n, _ in site.named_parameters()] == ["query"] * 4
    # Nothing is learned before the first sublayer: the sites are the only owners.
    model = GPT(config_of("attnres", 2), seed=0)
    assert not list(model.residual.parameters())


def test_key_norm_weight_scales_the_keys():
    connection, sites = sites_of("attnres", 3)
    _, plain = sites_of("attnres:key_norm=plain", 3)
    with torch.no_grad():
        for a, b in zip(sites, plain, strict=True):
            b.query.copy_(a.query * a.key_norm_weight)
    values = drawn(6)
    for a, b in zip(run(connection, sites, values), run(connection, plain, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_every_source_beyond_32_is_read():
    connection, sites = sites_of("attnres", 24)
    values = drawn(48, requires_grad=True)
    last = run(connection, sites, values)[-1]
    for i, gradient in enumerate(torch.autograd.grad(last.sum(), values)):
        assert gradient.abs().min() > 0, i


# Gradients. The truth is autograd's, through every mixture written out over a plain list of sources.


def plain_reads(sites, values, block_of):
    reads, sources = [], [values[0]]
    for l, (site, y) in enumerate(zip(sites, values[1:], strict=True)):  # noqa: E741
        if l == 0 or block_of[l] != block_of[l - 1]:
            sources = [*sources, y]
        else:
            sources = [*sources[:-1], sources[-1] + y]
        v = torch.stack(sources)
        keys = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * site.key_norm_weight
        reads.append(((keys @ site.query).softmax(0).unsqueeze(-1) * v).sum(0))
    return reads


def forked_reads(connection, sites, values):
    """Every state is stepped twice, and read once more by itself; the second step goes nowhere."""
    _, state = connection.begin(values[0])
    state = connection.foresee(state, sites)
    reads = []
    for site, y in zip(sites, values[1:], strict=True):
        aside, _ = site(y, state)
        h, state = site(y, state)
        reads += [h, aside, site.read(state), site.read(state)]
    return reads


def written_then_read(connection, sites, values):
    _, state = connection.begin(values[0])
    state = connection.foresee(state, sites)
    reads = []
    for site, y in zip(sites, values[1:], strict=True):
        state = site.write(y, state)
        reads.append(site.read(state))
    return reads


def sources_alone(connection, sites, values):
    """Between sites the state is cut down to its sources, as a pipeline may send it."""
    _, state = connection.begin(values[0])
    reads = []
    for site, y in zip(sites, values[1:], strict=True):
        h, state = site(y, state[: site.n_sources])
        reads.append(h)
    return reads


BLOCKS = {"attnres": list(range(8)), "attnres-block:blocks=3": [0, 0, 0, 1, 1, 1, 2, 2]}
both_forms = pytest.mark.parametrize("residual", list(BLOCKS))


def gradients(reads, weights, inputs, extra=0.0):
    loss = sum((h * w).sum() for h, w in zip(reads, weights, strict=True) if w is not None) + extra
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@both_forms
@pytest.mark.parametrize("used", ["all", "last", "third", "second and sixth"])
def test_gradients_whatever_is_used(residual, used):
    connection, sites = sites_of(residual, 4)
    values = drawn(8, requires_grad=True)
    inputs = [*values, *(p for site in sites for p in site.parameters())]
    weights = drawn(7, seed=5)
    indices = {"all": range(8), "last": [7], "third": [2], "second and sixth": [1, 5]}[used]
    weights = [w if i in indices else None for i, w in enumerate(weights)]
    want = gradients(plain_reads(sites, values, BLOCKS[residual]), weights, inputs)
    for ways in (run, written_then_read, sources_alone):
        got = gradients(ways(connection, sites, values), weights, inputs)
        for a, b in zip(got, want, strict=True):
            if b is None:  # an unused query of a group has a gradient of zeros
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@both_forms
def test_gradients_of_a_state_that_is_used_more_than_once(residual):
    connection, sites = sites_of(residual, 4)
    values = drawn(8, requires_grad=True)
    inputs = [*values, *(p for site in sites for p in site.parameters())]
    weights = [w for w in drawn(7, seed=5) for _ in range(4)]
    want = gradients(
        [h for h in plain_reads(sites, values, BLOCKS[residual]) for _ in range(4)], weights, inputs
    )
    got = gradients(forked_reads(connection, sites, values), weights, inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@both_forms
def test_gradients_of_outputs_that_are_used_elsewhere(residual):
    """A loss on the outputs themselves, on the state's own sources, and twice backward through one graph."""
    connection, sites = sites_of(residual, 4)
    values = drawn(8, requires_grad=True)
    weights = drawn(7, seed=5)
    want = gradients(
        plain_reads(sites, values, BLOCKS[residual]), weights, values, sum(v.pow(3).sum() for v in values)
    )
    _, state = connection.begin(values[0])
    state = connection.foresee(state, sites)
    reads, extra = [], values[0].pow(3).sum()
    for site, y in zip(sites, values[1:], strict=True):
        h, state = site(y, state)
        reads.append(h)
        newest = state[site.n_sources + site.new_source - 1]
        extra = extra + (newest if site.new_source else y).pow(3).sum()
    loss = sum((h * w).sum() for h, w in zip(reads, weights, strict=True)) + extra
    first = torch.autograd.grad(loss, values, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, values)
    for a, b, c, d in zip(first, kept, second, want, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
        torch.testing.assert_close(a, d, rtol=1e-10, atol=1e-12)


@both_forms
def test_gradients_where_some_inputs_have_none(residual):
    connection, sites = sites_of(residual, 4)
    values = [v.requires_grad_(i in (2, 5)) for i, v in enumerate(drawn(8))]
    for site in sites[1::2]:
        site.query.requires_grad_(False)
    inputs = [values[2], values[5], *(p for site in sites for p in site.parameters() if p.requires_grad)]
    weights = drawn(7, seed=5)
    want = gradients(plain_reads(sites, values, BLOCKS[residual]), weights, inputs)
    for a, b in zip(gradients(run(connection, sites, values), weights, inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for site in sites:
        site.requires_grad_(False)
    want = gradients(plain_reads(sites, values, BLOCKS[residual]), weights, inputs[:2])
    for a, b in zip(gradients(run(connection, sites, values), weights, inputs[:2]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@both_forms
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(residual, reentrant):
    """Gradients are right where every block is computed again in the backward pass."""
    config = GPTConfig(32, 4, 16, 2, 12, residual=residual)
    model = GPT(config, seed=0).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_site." in name:
                p.add_(torch.randn(p.shape, generator=g))
    ids = torch.randint(0, 32, (2, 12), generator=g)

    def gradients(recompute):
        model.zero_grad(set_to_none=True)
        h, state = model.residual.begin(model.embed(ids))
        state = model.residual.foresee(state, [s for b in model.blocks for s in (b.attn_site, b.mlp_site)])
        for block in model.blocks:

            def flat(h, *state, block=block):
                h, state = block(h, state, model.rope_cos, model.rope_sin)
                return h, *state

            # Flat, since the reentrant kind overlooks tensors inside a tuple.
            h, *state = checkpoint(flat, h, *state, use_reentrant=reentrant) if recompute else flat(h, *state)
        model.norm(h).pow(3).sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@both_forms
def test_compiled_and_eager_blocks_mix(residual):
    """One compiled block between two eager ones."""
    torch._dynamo.reset()
    config = GPTConfig(32, 3, 16, 2, 12, residual=residual)
    model = GPT(config, seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_site." in name:
                p.add_(torch.randn(p.shape, generator=g))
    ids = torch.randint(0, 32, (2, 12), generator=g)

    def gradients(blocks):
        model.zero_grad(set_to_none=True)
        h, state = model.residual.begin(model.embed(ids))
        state = model.residual.foresee(state, [s for b in model.blocks for s in (b.attn_site, b.mlp_site)])
        for block in blocks:
            h, state = block(h, state, model.rope_cos, model.rope_sin)
        model.norm(h).pow(3).sum().backward()
        return [p.grad for p in model.parameters()]

    mixed = [torch.compile(b, fullgraph=True) if i == 1 else b for i, b in enumerate(model.blocks)]
    # In fp32, for which the compiled attention of torch 2.11 has a backward pass on a CPU; in float64 it has none.
    for a, b in zip(gradients(mixed), gradients(model.blocks), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5 * b.abs().max().item())


def test_a_source_that_overflows_its_mean_square_has_score_zero():
    """As RMSNorm itself: 1 / sqrt(inf) = 0. Nothing becomes nan, forwards or backwards."""
    connection, sites = sites_of("attnres", 2, torch.float32)
    values = drawn(4, torch.float32)
    values[2] = torch.full_like(values[2], 1e30)
    values = [v.requires_grad_() for v in values]
    reads = run(connection, sites, values)
    loss = sum((h * 1e-30).sum() for h in reads)
    for gradient in torch.autograd.grad(loss, [*values, *(p for s in sites for p in s.parameters())]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("residual", ["attnres", "attnres-block:blocks=5"])
@pytest.mark.parametrize("n_layer", [4, 20])
def test_saved_bytes(residual, n_layer):
    """Over PreNorm: one [N, D] per sublayer, one number per token and read, and the query times its norm weight,
    once by itself and once for its group. Nothing more, however many reads share a source."""
    options = dict(vocab_size=64, n_layer=n_layer, d_model=32, n_head=2, seq_len=16)
    ids = torch.randint(0, 64, (2, 3, 16))
    kept = {
        name: saved_bytes(GPT(GPTConfig(residual=name, **options), seed=0), *ids)
        for name in ("prenorm", residual)
    }
    L, N, D = 2 * n_layer, ids[0].numel(), 32
    extra = L * N * D + L * N + 2 * L * D
    assert kept[residual] - kept["prenorm"] == 4 * extra


# Two phases.


def in_one_phase(connection, sites, values):
    _, state = connection.begin(values[0])
    reads = []
    for site, y in zip(sites, values[1:], strict=True):
        h, state = site(y, state)
        assert len(state) == site.n_sources + site.new_source
        reads.append(h)
    return reads


@pytest.mark.parametrize("residual", ["attnres", "attnres-block:blocks=5", "attnres-block:blocks=17"])
def test_two_phases_are_one(residual):
    """The same numbers and gradients as a pool over all sources at every reader."""
    connection, sites = sites_of(residual, 20)
    values = drawn(40, requires_grad=True)
    inputs = [*values, *(p for site in sites for p in site.parameters())]
    weights = drawn(39, seed=5)
    one, two = (f(connection, sites, values) for f in (in_one_phase, run))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(two, weights, inputs), gradients(one, weights, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", ["attnres", "attnres-block:blocks=4"])
def test_error_of_two_phases(residual, dtype):
    """In a model of that dtype, over all its gradients: at most twice that of one phase."""
    config = GPTConfig(32, 8, 32, 2, 12, residual=residual)
    g = torch.Generator().manual_seed(1)
    exact_model = GPT(config, seed=0)
    with torch.no_grad():
        for name, p in exact_model.named_parameters():
            if "_site." in name:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    exact_model = exact_model.to(dtype).double()
    ids = torch.randint(0, 32, (4, 12), generator=g)

    def errors(one_phase, kind):
        model = GPT(config, seed=0).to(kind)
        model.load_state_dict(exact_model.state_dict())
        if one_phase:
            model.residual.foresee = lambda state, sites: state
        model(ids, ids.roll(1))[1].backward()
        return [p.grad.double() for p in model.parameters()]

    exact = errors(True, torch.float64)
    one, two = (
        math.sqrt(sum(((a - b).norm() / b.norm()) ** 2 for a, b in zip(errors(w, dtype), exact, strict=True)))
        for w in (True, False)
    )
    assert two <= 2 * one


def test_groups():
    """They begin where a block does and divide the readers; each site knows its place."""
    assert reader_groups([True] * 32) == [(0, 6), (6, 6), (12, 6), (18, 6), (24, 6), (30, 2)]
    assert reader_groups(block_starts(32, 8, None)) == [(i, 4) for i in range(0, 32, 4)]
    assert reader_groups(block_starts(32, 1, None)) == [(0, 32)]
    assert reader_groups(block_starts(72, None, 9)) == [(i, 9) for i in range(0, 72, 9)]
    assert reader_groups([True]) == [(0, 1)]
    for blocks in range(1, 33):
        starts = block_starts(32, blocks, None)
        groups = reader_groups(starts)
        assert [i for first, size in groups for i in range(first, first + size)] == list(range(32))
        assert all(starts[first] for first, _ in groups)


def test_sources_are_met_once_by_a_group():
    """The state carries what a group made, and nothing of it remains behind the last reader."""
    connection, sites = sites_of("attnres", 4)  # groups of 3, 3, 2
    _, state = connection.begin(drawn(8)[0])
    state = connection.foresee(state, sites)
    made = []
    for site, y in zip(sites, drawn(8)[1:], strict=True):
        _, state = site(y, state)
        made.append(len(state) - site.n_sources - site.new_source)
        assert state[-1].shape[-1] == WIDTH and state[-1].dim() == 2
    assert made == [7, 5, 3, 7, 5, 3, 5, 3]


@both_forms
def test_begins_in_the_middle(residual):
    """Queries of the sites from a group's beginning on may be foreseen there, as at a pipeline's boundary."""
    connection, sites = sites_of(residual, 4)
    values = drawn(8)
    want = run(connection, sites, values)
    first = next(i for i, site in enumerate(sites) if i and site.group)
    _, state = connection.begin(values[0])
    for i, (site, y) in enumerate(zip(sites, values[1:], strict=True)):
        if i == first:
            state = connection.foresee(state, sites[first:])
        h, state = site(y, state)
        torch.testing.assert_close(h, want[i], rtol=1e-12, atol=1e-12)
