"""Passes of their own against float64 computations that share nothing with them."""

import copy
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depthmix
from depthmix import GPT, GPTConfig, available_residuals
from depthmix.diagnostics import passes
from depthmix.diagnostics.passes import block_removal, gradient_rms, mixing, reconstruction
from depthmix.diagnostics.subject import Run, Subject
from depthmix.errors import UserError
from depthmix.memory import reconstruction_error

VOCABULARY = 32


def perturbed(residual, dtype=torch.float64, seed=0, **changes):
    options = dict(vocab_size=VOCABULARY, n_layer=4, d_model=16, n_head=2, seq_len=12, n_streams=3)
    model = GPT(GPTConfig(residual=residual, **(options | changes)), seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model.to(dtype)


def run(residual, **changes):
    return Run(perturbed(residual, **changes), name="tiny")


def tokens(count=5, length=7, seed=0):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


class Chain(Subject):
    """x <- x + tanh(W x) in blocks that share weights: what is no model of depthmix."""

    def __init__(self, n_layer=3, width=6):
        g = torch.Generator().manual_seed(0)
        self.name, self.residual, self.detail = "chain", "prenorm", ""
        self.n_layer, self.d_model, self.n_streams, self.max_length = n_layer, width, 0, 100
        self.module = nn.Module()
        self.module.embed = nn.Parameter(torch.randn(VOCABULARY, width, generator=g, dtype=torch.float64))
        weights = [torch.randn(width, width, generator=g, dtype=torch.float64) * 0.5 for _ in range(n_layer)]
        self.module.weights = nn.ParameterList(weights)

    def capture(self, patterns, to=None):
        raise AssertionError("these passes look at no point")

    def begin(self, ids):
        return self.module.embed[ids]

    def block(self, index, x):
        return x + torch.tanh(x @ self.module.weights[index])

    def without(self, index, x):
        return None if index == 1 else x

    def end(self, x):
        return x

    def head(self, x):
        return x @ self.module.embed.T

    def block_parameters(self, index):
        # The head's matrix is also the middle block's, the first block's is also the last one's.
        w = self.module.weights
        return [[w[0]], [w[1], self.module.embed], [w[2], w[0], w[0]]][index]

    def logits(self, ids, skip=None):
        x = self.begin(ids)
        for i in range(self.n_layer):
            if i != skip:
                x = x + torch.tanh(x @ self.module.weights[i])
        return x @ self.module.embed.T


def loss_of_texts(logits, ids):
    """``[N]``: mean over the tokens of each text, from the definition."""
    p = logits[:, :-1].double().softmax(-1)
    return -p.gather(-1, ids[:, 1:, None])[..., 0].log().mean(1)


def test_removal_of_a_model_that_is_not_ours():
    subject, ids = Chain(), tokens(6)
    with torch.no_grad():
        base = loss_of_texts(subject.logits(ids), ids)
        truth = {l: loss_of_texts(subject.logits(ids, skip=l), ids) - base for l in (0, 2)}  # noqa: E741
    found = block_removal(subject, ids, batch=4)
    assert found["removal_delta"].axes == ("block",) and found["removal_delta"].unit == "nats"
    assert found["removal_base"].values == pytest.approx(base.mean().item(), rel=1e-12)
    assert np.isnan(found["removal_delta"].values[1]) and np.isnan(found["removal_se"].values[1])
    for block, changes in truth.items():
        assert found["removal_delta"].values[block] == pytest.approx(changes.mean().item(), rel=1e-10)
        error = math.sqrt(((changes - changes.mean()) ** 2).sum().item() / 5 / 6)
        assert found["removal_se"].values[block] == pytest.approx(error, rel=1e-10)


def test_removal_of_prenorm_equals_models_without_the_block():
    subject, ids = run("prenorm"), tokens()
    found = block_removal(subject, ids, batch=2)
    with torch.no_grad():
        base = loss_of_texts(subject.module(ids), ids)
        for block in range(4):
            shorter = copy.deepcopy(subject.module)
            del shorter.blocks[block]
            changes = loss_of_texts(shorter(ids), ids) - base
            assert found["removal_delta"].values[block] == pytest.approx(changes.mean().item(), rel=1e-9)
            error = changes.std().item() / math.sqrt(5)
            assert found["removal_se"].values[block] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("residual", available_residuals())
def test_removal_equals_starting_again_for_every_block(residual):
    """Nothing that the shared prefix hands over is spoilt by what starts from it."""
    subject, ids = run(residual), tokens()
    found = block_removal(subject, ids, batch=3)["removal_delta"].values
    base = loss_of_texts(subject.module(ids).detach(), ids).mean().item()
    for block in range(4):
        with torch.no_grad():
            carry = subject.begin(ids)
            for i in range(4):
                carry = subject.without(i, carry) if i == block else subject.block(i, carry)
                if carry is None:
                    break
            if carry is None:
                assert np.isnan(found[block])
                continue
            logits = subject.head(subject.end(carry))
        assert found[block] == pytest.approx(loss_of_texts(logits, ids).mean().item() - base, rel=1e-8)
    assert np.isfinite(found).sum() == (3 if residual.startswith("mgr") else 4)


@pytest.mark.parametrize(
    "residual", ["prenorm", "siamese", "denseformer", "hc", "hc-static", "mhc", "mhc-lite", "mgr-competitive"]
)
def test_a_planted_identity_block_costs_nothing(residual):
    subject = run(residual)
    block = subject.module.blocks[2]
    with torch.no_grad():
        if residual.startswith("mgr"):
            for site in (block.attn_site, block.mlp_site):
                site.gate_bias[1:] = -math.inf
        else:
            block.attn.proj.weight.zero_()
            block.mlp.proj.weight.zero_()
    found = block_removal(subject, tokens(), batch=5)
    assert abs(found["removal_delta"].values[2]) < 1e-13 and found["removal_se"].values[2] < 1e-13
    assert abs(found["removal_delta"].values[3]) > 1e-4


def test_a_single_block():
    subject, ids = run("prenorm", n_layer=1), tokens()
    model = subject.module
    with torch.no_grad():
        without = loss_of_texts(model.norm(model.embed(ids)) @ model.embed.weight.T, ids)
        base = loss_of_texts(model(ids), ids)
    found = block_removal(subject, ids, batch=5)["removal_delta"].values
    np.testing.assert_allclose(found, [(without - base).mean().item()], rtol=1e-10)


def test_a_single_text_has_no_standard_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = block_removal(run("prenorm"), tokens(1), batch=8)
    assert np.isnan(found["removal_se"].values).all() and np.isfinite(found["removal_delta"].values).all()


ALIVE = weakref.WeakSet()


class Carry:
    """One of those that are alive."""

    def __init__(self, value):
        self.value = value
        ALIVE.add(self)


class Counting(Run):
    def __init__(self, *args, **kwargs):
        self.blocks, self.in_blocks, self.in_head, self.rows = 0, 0, 0, 0
        super().__init__(*args, **kwargs)

    def begin(self, ids):
        return Carry(super().begin(ids))

    def block(self, index, carry):
        self.blocks += 1
        self.in_blocks = max(self.in_blocks, len(ALIVE))
        return Carry(super().block(index, carry.value))

    def without(self, index, carry):
        return Carry(super().without(index, carry.value))

    def end(self, carry):
        return super().end(carry.value)

    def head(self, hidden):
        self.in_head = max(self.in_head, len(ALIVE))
        self.rows = max(self.rows, hidden.numel() // self.d_model)
        return super().head(hidden)


@pytest.mark.parametrize("depth", [3, 9])
def test_memory_and_work_of_removal(depth):
    """Two carries whatever the depth, one while logits are there; half of the blocks that L passes would run."""
    subject = Counting(perturbed("hc", n_layer=depth), name="tiny")
    block_removal(subject, tokens(4), batch=4)
    assert subject.in_blocks == 2 and subject.in_head == 1
    assert subject.blocks == depth + depth * (depth - 1) // 2
    assert len(ALIVE) == 0


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_head_in_parts_changes_nothing(rows, monkeypatch):
    ids = tokens(6, 9)
    whole = Counting(perturbed("mgr-competitive", n_streams=1), name="tiny")
    truth, gradients = block_removal(whole, ids, batch=6), gradient_rms(whole, ids, batch=6)
    assert whole.rows == 6 * 8
    parts = Counting(whole.module, name="tiny")
    monkeypatch.setattr(passes, "LOGIT_BYTES", rows * VOCABULARY * 8)
    found = block_removal(parts, ids, batch=6)
    assert parts.rows == min(rows, 6 * 8)
    for name in truth:
        np.testing.assert_allclose(found[name].values, truth[name].values, rtol=1e-10)
    found = gradient_rms(parts, ids, batch=6)["gradient_rms"].values
    np.testing.assert_allclose(found, gradients["gradient_rms"].values, rtol=1e-10)


class Broken(Run):
    """Without block 1 nothing is finite."""

    def without(self, index, carry):
        h, (x,), *rest = super().without(index, carry)
        return (h, (x * math.nan,), *rest) if index == 1 else (h, (x,), *rest)


def test_a_loss_that_is_not_finite_is_kept_and_told():
    model, ids = perturbed("prenorm"), tokens()
    truth = block_removal(Run(model, name="tiny"), ids, batch=2)["removal_delta"].values
    with pytest.warns(UserWarning, match="without block 1 is not finite"):
        found = block_removal(Broken(model, name="tiny"), ids, batch=2)["removal_delta"].values
    assert np.isnan(found[1])
    np.testing.assert_array_equal(np.delete(found, 1), np.delete(truth, 1))


def test_a_model_whose_loss_is_not_finite():
    subject = run("prenorm")
    with torch.no_grad():
        subject.module.blocks[1].mlp.proj.weight[0, 0] = math.nan
    whole = pytest.warns(UserWarning, match="whole model is not finite on 5 of 5 texts")
    with whole, pytest.warns(UserWarning, match="without block 0, 2, 3 is not finite"):
        found = block_removal(subject, tokens(), batch=2)
    assert np.isnan(found["removal_base"].values) and np.isnan(found["removal_delta"].values).all()
    with pytest.warns(UserWarning, match="gradient of block"):
        assert np.isnan(gradient_rms(subject, tokens(), batch=2)["gradient_rms"].values).any()


@pytest.mark.parametrize("f", [block_removal, gradient_rms])
def test_progress_adds_up_to_the_texts(f):
    for subject in (run("mgr-competitive"), Chain()):
        seen = []
        f(subject, tokens(7), 3, seen.append)
        assert sum(seen) == pytest.approx(7) and min(seen) > 0


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("residual", available_residuals())
def test_gradients_equal_those_of_one_loss(residual, batch):
    subject, ids = run(residual), tokens()
    model = subject.module
    logits = model(ids)[:, :-1]
    F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)).backward()
    truth = []
    for block in model.blocks:
        gradient = torch.cat([p.grad.flatten() for p in block.parameters()])
        truth.append(gradient.square().mean().sqrt().item())
    model.zero_grad(set_to_none=True)
    found = gradient_rms(subject, ids, batch)["gradient_rms"]
    assert found.axes == ("block",)
    np.testing.assert_allclose(found.values, truth, rtol=1e-9)


def test_gradients_of_shared_and_tied_parameters():
    subject, ids = Chain(), tokens(6)
    loss_of_texts(subject.logits(ids), ids).mean().backward()
    w, embed = subject.module.weights, subject.module.embed
    truth = []
    for parameters in ([w[0]], [w[1], embed], [w[2], w[0]]):
        squares = [p.grad.square().sum().item() for p in parameters]
        truth.append(math.sqrt(sum(squares) / sum(p.numel() for p in parameters)))
    subject.module.zero_grad(set_to_none=True)
    np.testing.assert_allclose(gradient_rms(subject, ids, 4)["gradient_rms"].values, truth, rtol=1e-10)


def test_a_parameter_without_part_in_the_loss_counts_as_zero():
    subject, ids = run("prenorm"), tokens()
    before = gradient_rms(subject, ids, 5)["gradient_rms"].values
    size = sum(p.numel() for p in subject.module.blocks[1].parameters())
    subject.module.blocks[1].spare = nn.Parameter(torch.zeros(3 * size, dtype=torch.float64))
    after = gradient_rms(subject, ids, 5)["gradient_rms"].values
    np.testing.assert_allclose(after, before / np.array([1, 2, 1, 1]), rtol=1e-12)


def test_low_precision_is_added_up_in_fp32():
    """bf16 gradients of 40 batches: added up in bf16 they would be off by percents."""
    model = perturbed("prenorm", dtype=torch.bfloat16)
    ids = tokens(40)
    sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in model.blocks[0].parameters()}
    for one in ids.split(1):
        model.zero_grad(set_to_none=True)
        hidden = model.hidden(one)[:, :-1]
        F.cross_entropy(F.linear(hidden, model.embed.weight)[0].float(), one[0, 1:]).backward()
        for p, total in sums.items():
            total += p.grad.float() / 40
    truth = torch.cat([total.flatten() for total in sums.values()]).square().mean().sqrt().item()
    model.zero_grad(set_to_none=True)
    found = gradient_rms(Run(model, name="tiny"), ids, 1)["gradient_rms"].values[0]
    assert found == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("f", [block_removal, gradient_rms])
def test_the_model_is_left_as_it_was(f):
    subject = run("prenorm")
    model = subject.module.train()
    model.blocks[1].eval()
    model.blocks[2].mlp.fc.weight.requires_grad_(False)
    mark = torch.full_like(model.norm.weight, 7.0)
    model.norm.weight.grad = mark
    modes = [m.training for m in model.modules()]
    values = [p.detach().clone() for p in model.parameters()]
    seen = []
    subject = Run(model.float(), name="tiny")
    qkv = model.blocks[0].attn.qkv
    qkv.register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        f(subject, tokens(), 2)
    assert set(seen) == {(False, torch.float32)}
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["blocks.2.mlp.fc.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["norm.weight"]
    assert (model.norm.weight.grad == 7.0).all()
    assert all(torch.equal(p, v.float()) for p, v in zip(model.parameters(), values, strict=True))


def test_the_model_is_left_as_it_was_when_something_fails():
    subject = run("prenorm")
    model = subject.module.train()

    def fail(module, args):
        raise RuntimeError("planted")

    handle = model.blocks[2].register_forward_pre_hook(fail)
    for f in (block_removal, gradient_rms):
        with pytest.raises(RuntimeError, match="planted"):
            f(subject, tokens(), 2)
    handle.remove()
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_mixing_is_the_map_of_the_first_texts():
    subject, ids = run("attnres", dtype=torch.float32), tokens(9)
    found = mixing(subject, ids, tokens=21)
    truth = depthmix.mixing_map(subject.module, ids[:3])
    np.testing.assert_array_equal(found["mixing_matrix"].values, truth.matrix.numpy())
    np.testing.assert_array_equal(found["mixing_source_rms"].values, truth.source_rms.numpy())
    assert found["mixing_matrix"].axes == ("reader", "source")
    short = mixing(subject, ids, tokens=3)["mixing_matrix"].values
    np.testing.assert_array_equal(short, depthmix.mixing_map(subject.module, ids[:1, :3]).matrix.numpy())


def test_reconstruction_stands_at_the_lerping_sublayers():
    subject, ids = run("mgr-independent", dtype=torch.float32), tokens(9)
    found = reconstruction(subject, ids, tokens=21)
    rows = {row["sublayer"]: row for row in reconstruction_error(subject.module, ids[:3])}
    assert min(rows) == 3  # two sublayers append
    for key in ("measured", "predicted", "kept", "anchor"):
        values = found[f"reconstruction_{key}"].values
        assert values.shape == (8,) and np.isnan(values[:2]).all()
        np.testing.assert_array_equal(values[2:], [float(rows[i][key]) for i in range(3, 9)])


def test_what_a_model_does_not_have_is_refused_with_the_reason():
    with pytest.raises(UserError, match="no mixing map: a post-norm"):
        mixing(run("siamese"), tokens())
    with pytest.raises(UserError, match="no lerping sublayers"):
        reconstruction(run("prenorm"), tokens())
    for f in (mixing, reconstruction):
        with pytest.raises(UserError, match="chain is no model of depthmix"):
            f(Chain(), tokens())
