"""What every residual connection must do, run over the registry: a new file is tested by existing."""

import pytest
import torch

from depthmix import GPT, GPTConfig, available_residuals
from depthmix.config import TrainConfig
from depthmix.info import describe
from depthmix.residuals import build_residual, residual_summaries


def tiny(residual, **changes):
    options = dict(vocab_size=32, n_layer=4, d_model=16, n_head=2, seq_len=12, n_streams=3, replay_window=2)
    return GPTConfig(residual=residual, **(options | changes))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def perturbed(config, seed=0, size=0.3):
    """A model whose every parameter is away from its initial value, so that no gate is at rest.

    Where roundings are compared, ``size`` is smaller: matrices that nothing constrains (``hc``) multiply
    them, in every implementation, by more the further they are from the identity.
    """
    model = GPT(config, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return model


every = pytest.mark.parametrize("residual", available_residuals())


@every
def test_named_and_described(residual):
    assert residual_summaries()[residual]


@every
def test_described_without_storage(residual):
    """What it would cost is found with tensors that have a shape and no numbers."""
    found = describe(TrainConfig(model=tiny(residual), steps=1, batch_size=1))
    assert found["activation_bytes_per_token"] > 0
    model = GPT(tiny(residual), seed=0)
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())


@every
def test_every_parameter_gets_a_gradient(residual):
    model = perturbed(tiny(residual))
    ids = torch.randint(0, 32, (3, 12))
    model(ids, ids.roll(1))[1].backward()
    for name, p in model.named_parameters():
        if name == "embed.weight":
            continue
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@every
def test_perturbing_any_connection_weight_changes_the_output(residual):
    model = perturbed(tiny(residual))
    ids = torch.randint(0, 32, (2, 12))
    with torch.no_grad():
        before = model(ids)
        for name, p in model.named_parameters():
            if "_site." not in name and not name.startswith("residual."):
                continue
            saved = p.clone()
            p.add_(torch.randn(p.shape))
            assert not torch.allclose(model(ids), before, atol=1e-6), name
            p.copy_(saved)
        assert torch.equal(model(ids), before)


@every
def test_causal(residual):
    model = perturbed(tiny(residual)).double()
    ids = torch.randint(0, 32, (2, 12))
    with torch.no_grad():
        before = model(ids)
        for t in range(12):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 32
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])


@every
def test_a_batch_equals_its_rows(residual):
    model = perturbed(tiny(residual)).double()
    ids = torch.randint(0, 32, (4, 12))
    with torch.no_grad():
        rows = torch.cat([model(row.unsqueeze(0)) for row in ids])
        torch.testing.assert_close(model(ids), rows, rtol=1e-12, atol=1e-12)


@every
def test_gradcheck_of_a_whole_model(residual):
    model = perturbed(tiny(residual, n_layer=3, d_model=4, n_head=1, seq_len=3, vocab_size=5)).double()
    ids, targets = torch.randint(0, 5, (1, 3)), torch.randint(0, 5, (1, 3))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids, targets))[1]

    # fast_mode compares random projections of the Jacobian: every parameter takes part.
    inputs = tuple(p.detach().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True, atol=1e-6)


@every
def test_no_state_is_left_on_modules(residual):
    """Two forward passes before two backward passes give what each gives alone."""
    model = perturbed(tiny(residual))
    first, second = torch.randint(0, 32, (2, 12)), torch.randint(0, 32, (3, 12))

    def gradients(*losses):
        model.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    alone = [gradients(model(ids, ids)[1]) for ids in (first, second)]
    loss_1, loss_2 = model(first, first)[1], model(second, second)[1]
    together = gradients(loss_2, loss_1)
    for a, b, c in zip(*alone, together, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(residual, dtype):
    torch.manual_seed(0)
    model = perturbed(tiny(residual), size=0.1).to(dtype)
    ids = torch.randint(0, 32, (2, 12))
    logits = model(ids)
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    model(ids, ids)[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    wide = perturbed(tiny(residual), size=0.1).to(dtype).double()
    coarse = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    with torch.no_grad():
        exact = wide(ids)
    assert (logits.double() - exact).abs().max() <= coarse * exact.abs().max()


@every
def test_autocast_keeps_the_streams_in_fp32(residual):
    model = perturbed(tiny(residual))
    ids = torch.randint(0, 32, (2, 12))
    _, exact = model(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = model(ids, ids)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()


@every
def test_compiles_as_one_graph(residual):
    torch.manual_seed(0)
    torch._dynamo.reset()
    # Three blocks have all there is: streams being appended, lerps, both ends of a window and of a block.
    model = perturbed(tiny(residual, n_layer=3), size=0.1)
    ids = torch.randint(0, 32, (2, 12))

    def run(f):
        model.zero_grad(set_to_none=True)
        loss = f(ids, ids.roll(1))[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    for eager, compiled in zip(run(model), run(torch.compile(model, fullgraph=True)), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-4, atol=1e-5)


@every
def test_eval_equals_train_and_no_grad(residual):
    model = perturbed(tiny(residual))
    ids = torch.randint(0, 32, (2, 12))
    trained = model.train()(ids)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), trained)


@every
def test_state_dict_round_trip(residual):
    model, other = perturbed(tiny(residual)), GPT(tiny(residual), seed=5)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 32, (2, 12))
    assert torch.equal(model(ids), other(ids))


@every
def test_step_is_write_then_read(residual):
    config = tiny(residual, stream_memory="store")
    connection = build_residual(config).double()
    _, fused = connection.begin(torch.randn(2, 5, 16, dtype=torch.float64))
    for i in range(1, config.n_sublayers + 1):
        site = connection.site(i).double()
        for p in site.parameters():
            torch.nn.init.normal_(p)
        y = torch.randn(2, 5, 16, dtype=torch.float64)
        written = site.write(y, fused)
        h, fused = site(y, fused)
        assert all(torch.equal(a, b) for a, b in zip(written, fused, strict=True))
        assert torch.equal(site.read(written), h)


@every
def test_gates_and_mix_are_the_step_written_as_its_equation(residual):
    """Over 36 sublayers (more than 32 sources), the fused step against its linear form, in float64."""
    config = tiny(residual, n_layer=18)
    connection = build_residual(config).double()
    if connection.not_linear:
        return
    for p in connection.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    h, state = connection.begin(x)
    mixed_h, mixed = connection.begin_mix(x, connection.begin_gates(x))
    torch.testing.assert_close(mixed_h, h, rtol=1e-12, atol=1e-12)
    for i in range(1, config.n_sublayers + 1):
        site = connection.site(i).double()
        for p in site.parameters():
            torch.nn.init.normal_(p)
        y = torch.randn(2, 5, 16, dtype=torch.float64)
        with torch.no_grad():
            gates = site.gates(y, state)
            mixed_h, mixed = site.mix(y, mixed, gates)
            h, state = site(y, state)
        torch.testing.assert_close(mixed_h, h, rtol=1e-10, atol=1e-10)
        for a, b in zip(site.streams(mixed) or (), site.streams(state) or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(connection.finish(mixed_h, mixed), connection.finish(h, state))


@every
def test_mix_is_linear(residual):
    """Given the gates, every read is linear in the embedding and the outputs, one channel or many."""
    config = tiny(residual)
    connection = build_residual(config).double()
    if connection.not_linear:
        assert "linear" in connection.not_linear
        return
    sites = [connection.site(i).double() for i in range(1, config.n_sublayers + 1)]
    for module in (connection, *sites):
        for p in module.parameters():
            torch.nn.init.normal_(p)
    v = torch.randn(config.n_sublayers + 1, 2, 5, 16, dtype=torch.float64)

    with torch.no_grad():
        gates, state = [connection.begin_gates(v[0])], connection.begin(v[0])[1]
        for site, y in zip(sites, v[1:], strict=True):
            gates.append(site.gates(y, state))
            state = site(y, state)[1]

        def reads(values):
            h, state = connection.begin_mix(values[0], gates[0])
            found = [h]
            for site, y, g in zip(sites, values[1:], gates[1:], strict=True):
                h, state = site.mix(y, state, g)
                found.append(h)
            found[-1] = connection.finish(h, state)
            return torch.stack(found)

        other = torch.randn_like(v)
        torch.testing.assert_close(reads(2 * v - 3 * other), 2 * reads(v) - 3 * reads(other))
        leading = reads(torch.stack([v, other], 1))
        torch.testing.assert_close(leading, torch.stack([reads(v), reads(other)], 1))
        if not any(site.per_channel for site in sites):
            torch.testing.assert_close(reads(v[..., :1]), reads(v)[..., :1])


@every
@pytest.mark.parametrize("blocks", [1, 32])
def test_depth(residual, blocks):
    model = GPT(tiny(residual, n_layer=blocks, n_streams=2), seed=0)
    ids = torch.randint(0, 32, (2, 12))
    loss = model(ids, ids)[1]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_sublayers_start_equal_whatever_the_connection():
    models = {name: dict(GPT(tiny(name), seed=3).named_parameters()) for name in available_residuals()}
    base = models["prenorm"]
    for parameters in models.values():
        for name, p in base.items():
            assert torch.equal(p, parameters[name]), name
    other = dict(GPT(tiny("prenorm"), seed=4).named_parameters())
    assert not torch.equal(other["embed.weight"], base["embed.weight"])
