"""The mixing map against what the models really computed, and against the equations written out."""

import dataclasses
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import depthmix
from depthmix import GPT, GPTConfig, available_residuals, mixing
from depthmix.mixing import MixingMap, mixing_error, mixing_map, residuals_with_map
from depthmix.residuals import Residual, Site

VOCABULARY = 32


def perturbed(residual, seed=0, dtype=torch.float32, **changes):
    """A model whose every parameter is away from its initial value, so that no gate is at rest."""
    options = dict(vocab_size=VOCABULARY, n_layer=4, d_model=16, n_head=2, seq_len=12, n_streams=3)
    model = GPT(GPTConfig(residual=residual, **(options | changes)), seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model.to(dtype)


def per_channel(residual):
    return any(getattr(site, "per_channel", False) for site in perturbed(residual).modules())


def tokens(batch=3, length=12, seed=0):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class ToySite(Site):
    """Two streams; gates per channel, of either sign."""

    per_channel = True

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).uniform_(-1, 1))

    def gates(self, layer_output, state):
        return (torch.tanh(layer_output * self.weight), torch.tanh(state[0] - layer_output))

    def mix(self, layer_output, state, gates):
        a, b = gates
        first, second = state
        state = (first - a * layer_output, b * second + (1 - b) * layer_output)
        return state[0] + 0.5 * state[1], state

    def forward(self, layer_output, state):
        return ToySite.mix(self, layer_output, state, self.gates(layer_output, state))

    def streams(self, state):
        return state


class Toy(Residual):
    """Coefficients at the beginning, and an end that is not the last read."""

    def begin_gates(self, x):
        return (torch.sigmoid(x),)

    def begin_mix(self, x, gates):
        return gates[0] * x, (x, -x)

    def begin(self, x):
        return self.begin_mix(x, self.begin_gates(x))

    def finish(self, h, state):
        return h + state[1]


def toy(n_layer=4, dtype=torch.float32):
    torch.manual_seed(0)
    model = perturbed("prenorm", n_layer=n_layer)
    model.residual = Toy(model.config)
    for block in model.blocks:
        block.attn_site, block.mlp_site = ToySite(16), ToySite(16)
    return model.to(dtype)


def build(name, **options):
    return toy(**options) if name == "toy" else perturbed(name, **options)


linear = pytest.mark.parametrize("residual", [*residuals_with_map(), "toy"])


def record(model, ids):
    """Sources, inputs and streams of a run, by wrapping forward methods (not by hooks)."""
    sources, inputs, streams = [], [], []
    readers = [norm for block in model.blocks for norm in (block.attn.norm, block.mlp.norm)]
    sites = [s for block in model.blocks for s in (block.attn_site, block.mlp_site)]

    def wrap(module, before=None, after=None):
        forward = module.forward

        def wrapped(*args):
            result = forward(*args)
            if before:
                before(args)
            if after:
                after(result)
            return result

        module.forward = wrapped

    wrap(model.embed, after=sources.append)
    for reader in (*readers, model.norm):
        wrap(reader, before=lambda args: inputs.append(args[0]))
    for site in sites:
        site.fuses_norm = False  # what the norm reads is wanted
        wrap(
            site,
            before=lambda args: sources.append(args[0]),
            after=lambda result, site=site: streams.append(site.streams(result[1])),
        )
    with torch.no_grad():
        model(ids)
    for module in (model.embed, model.norm, *readers, *sites):
        del module.forward
    for site in sites:
        del site.fuses_norm
    return torch.stack(sources), torch.stack(inputs), streams


# --- the identity ---------------------------------------------------------------------------------


@linear
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_inputs_are_the_mixture_of_the_sources(residual, dtype, bound):
    model, ids = build(residual, dtype=dtype), tokens()
    found = mixing_map(model, ids, per="channel", streams=True)
    sources, inputs, streams = record(model, ids)
    assert found.channels.dtype == dtype
    mixed = (found.channels.double() * sources.double()).sum(1)
    for row, h in zip(mixed, inputs, strict=True):
        assert (row - h).abs().max() <= bound * h.abs().max()
    kinds = [real is not None for real in streams]
    assert len(found.streams) == (len(streams) if any(kinds) else 0)
    for coefficients, real in zip(found.streams, streams, strict=False):
        assert len(coefficients) == len(real)
        for row, s in zip(coefficients, real, strict=True):
            off = (row.double() * sources.double()).sum(0) - s
            assert off.abs().max() <= bound * s.abs().max()


@pytest.mark.parametrize("residual", [name for name in residuals_with_map() if not per_channel(name)])
def test_coefficients_are_what_a_fit_to_the_run_finds(residual):
    """With more channels than sources, inputs and sources of one token leave one choice of coefficients.

    A coefficient per channel cannot be found so, from one value per channel.
    """
    model, ids = perturbed(residual, n_layer=3, dtype=torch.float64), tokens(2, 5)
    found = mixing_map(model, ids, per="token").tokens
    sources, inputs, _ = record(model, ids)
    for row, h in enumerate(inputs):
        # Only the outputs that exist by then take part.
        basis = sources[: row + 1].permute(1, 2, 3, 0)
        fitted = torch.linalg.lstsq(basis, h.unsqueeze(-1)).solution.squeeze(-1)
        torch.testing.assert_close(
            found[row, : row + 1].permute(1, 2, 0), fitted, rtol=1e-6, atol=1e-6 * fitted.abs().max().item()
        )
        assert not found[row, row + 1 :].any()


@linear
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_error_is_small_at_any_depth(residual, dtype, bound):
    """Eight and 36 sublayers: more than 32 sources."""
    for n_layer in (4, 18):
        assert mixing_error(build(residual, n_layer=n_layer, dtype=dtype), tokens()) <= bound


@linear
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_error_in_half_precision_is_that_of_rounded_streams(residual, dtype, bound):
    """A few units of the last place: 2^-8 and 2^-11 of the largest value, once a sublayer."""
    model = build(residual, dtype=dtype)
    assert mixing_error(model, tokens()) <= bound
    found = mixing_map(model, tokens())
    assert found.matrix.dtype == torch.float32 and torch.isfinite(found.matrix).all()


@linear
def test_error_sees_a_wrong_coefficient(residual):
    model, ids = build(residual), tokens()
    site = model.blocks[2].mlp_site
    mix = site.mix
    # One site's mixture with its output counted 1 % more than the model counted it.
    site.mix = lambda y, state, gates: mix(1.01 * y, state, gates)
    assert mixing_error(model, ids) > 1e-4


def test_error_sees_a_wrong_stream_that_nobody_reads():
    model, ids = toy(), tokens()
    site = model.blocks[-1].mlp_site
    streams = site.streams
    site.streams = lambda state: (
        (streams(state)[0], 1.001 * streams(state)[1]) if state[0].dim() == 4 else state
    )
    assert mixing_error(model, ids) == pytest.approx(1e-3, rel=0.01)


def test_error_is_the_largest_over_the_batch():
    model, ids = toy(dtype=torch.bfloat16), tokens(4)
    trunk = mixing._trunk(model)
    alone = [mixing._errors(trunk, row[None], mixing.CHUNK_BYTES)[0].max() for row in ids]
    together = mixing._errors(trunk, ids, mixing.CHUNK_BYTES)[0].max()
    # Numerator and denominator are each the largest, so the whole is at most the worst row.
    assert 0 < together <= max(alone)


# --- known maps -----------------------------------------------------------------------------------


def test_prenorm_is_all_ones():
    found = mixing_map(perturbed("prenorm"), tokens(), per="token", streams=True)
    assert torch.equal(found.matrix, torch.ones(9, 9).tril())
    assert torch.equal(found.tokens, torch.ones(9, 9).tril()[:, :, None, None].expand(-1, -1, 3, 12))
    assert found.streams == ()


def numpy_mgr(model, sources, gate, eps):
    """Section 3 of the paper for one token: ``sources [L+1, D]`` -> rows and streams as coefficients."""
    norm = lambda s: s / np.sqrt((s * s).mean() + eps)  # noqa: E731
    n, L, D = model.config.n_streams, len(sources) - 1, sources.shape[1]
    sites = [s for block in model.blocks for s in (block.attn_site, block.mlp_site)]
    unit = np.eye(L + 1)
    streams, rows, every = [unit[0]], [unit[0]], []
    for index, site in enumerate(sites, 1):
        weights = {name: p.detach().numpy() for name, p in site.named_parameters()}
        real = [s @ sources for s in streams]
        if len(streams) < n:
            streams = [*streams, unit[index]]
        else:
            g = np.array([weights["gate_weight"] @ norm(s) / np.sqrt(D) for s in real])
            if gate == "competitive":
                e = np.exp(np.concatenate([[0.0], g]) + weights["gate_bias"])
                beta = e[1:] / e.sum()
            else:
                beta = 1 / (1 + np.exp(-g - weights["gate_bias"]))
            streams = [(1 - b) * s + b * unit[index] for b, s in zip(beta, streams, strict=True)]
        a = np.exp([weights["pool_weight"] @ norm(s @ sources) / np.sqrt(D) for s in streams])
        rows.append(sum(w * s for w, s in zip(a / a.sum(), streams, strict=True)))
        every.append(np.stack(streams))
    return np.stack(rows), every


@pytest.mark.parametrize("gate", ["competitive", "independent"])
def test_multi_gate_residuals_are_products_of_gates(gate):
    model, ids = perturbed(f"mgr-{gate}", dtype=torch.float64), tokens(2, 5)
    found = mixing_map(model, ids, per="token", streams=True)
    sources, _, _ = record(model, ids)
    for b, t in [(0, 0), (0, 4), (1, 2)]:
        rows, streams = numpy_mgr(model, sources[:, b, t].numpy(), gate, model.config.norm_eps)
        np.testing.assert_allclose(found.tokens[:, :, b, t].numpy(), rows, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(found.streams, streams, strict=True):
            np.testing.assert_allclose(mine[:, :, b, t].numpy(), theirs, rtol=1e-9, atol=1e-12)
    assert [len(stream) for stream in found.streams] == [2, 3, 3, 3, 3, 3, 3, 3]
    # Convex in every sublayer: rows are means.
    torch.testing.assert_close(found.tokens.sum(1), torch.ones(9, 2, 5, dtype=torch.float64))


def test_initial_map_of_a_ramp_by_hand():
    """n = 3: means of 1, 2 and 3 sources; then one lerp with beta on every stream."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GPT(
            GPTConfig(VOCABULARY, 2, 16, 2, 12, residual="mgr-competitive", n_streams=3), seed=0
        ).double()
    beta = 1 / (np.exp(model.residual.init_bias) + 3)
    third = np.full(3, 1 / 3)
    expected = np.zeros((5, 5))
    expected[0, 0], expected[1, :2], expected[2, :3] = 1, 0.5, third
    expected[3, :3], expected[3, 3] = third * (1 - beta), beta
    expected[4, :3], expected[4, 3:] = third * (1 - beta) ** 2, (beta * (1 - beta), beta)
    found = mixing_map(model, tokens(), streams=True)
    np.testing.assert_allclose(found.matrix.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(found.streams[0].numpy(), np.eye(5)[:2], atol=1e-12)
    np.testing.assert_allclose(found.streams[-1].mean(0).numpy(), expected[4], atol=1e-12)


# --- forms of the answer --------------------------------------------------------------------------


@linear
def test_means_agree_with_the_finer_forms(residual):
    model, ids = build(residual, dtype=torch.float64), tokens()
    L, B, T, D = 8, 3, 12, 16
    mean, token, channel = (mixing_map(model, ids, per=per, streams=True) for per in mixing.PER)
    assert mean.tokens is None and mean.channels is None and token.channels is None
    assert mean.matrix.shape == (L + 1, L + 1)
    assert token.tokens.shape == (L + 1, L + 1, B, T) and channel.channels.shape == (L + 1, L + 1, B, T, D)
    for other in (token, channel):
        torch.testing.assert_close(other.matrix, mean.matrix)
        torch.testing.assert_close(other.tokens.mean((2, 3)), mean.matrix)
    torch.testing.assert_close(channel.channels.mean(-1), token.tokens)
    for a, b, c in zip(mean.streams, token.streams, channel.streams, strict=True):
        n = len(a)
        assert a.shape == (n, L + 1) and b.shape == (n, L + 1, B, T) and c.shape == (n, L + 1, B, T, D)
        torch.testing.assert_close(b.mean((2, 3)), a)
        torch.testing.assert_close(c.mean(-1), b)
    assert mixing_map(model, ids).streams is None


def test_channels_differ_where_gates_do():
    found = mixing_map(toy(), tokens(), per="channel")
    assert found.channels.std(-1).max() > 0.1 and found.matrix.min() < 0


@linear
def test_a_batch_is_its_sequences(residual):
    model, ids = build(residual, dtype=torch.float64), tokens()
    whole = mixing_map(model, ids, per="token")
    for b in range(3):
        alone = mixing_map(model, ids[b : b + 1], per="token").tokens
        torch.testing.assert_close(whole.tokens[:, :, b : b + 1], alone)
    rms = record(model, ids)[0].square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(whole.source_rms, rms)


def test_labels_and_description():
    found = mixing_map(perturbed("mgr-review", n_layer=2), tokens())
    assert found.labels == ("embedding", "attn 1", "mlp 1", "attn 2", "mlp 2")
    assert found.row_labels == ("attn 1", "mlp 1", "attn 2", "mlp 2", "output")
    assert found.residual == "mgr-review" and found.n_tokens == 36
    assert repr(found) == "MixingMap('mgr-review', 4 sublayers, mean over 36 tokens)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.residual = "prenorm"


def test_summaries_by_hand():
    matrix = torch.tensor([[2.0, 0.0, 0.0], [1.0, -3.0, 0.0], [1.0, 2.0, -1.0]])
    found = MixingMap(matrix, torch.tensor([4.0, 1.0, 2.0]), ("embedding",), ("output",), "x", 1)
    torch.testing.assert_close(found.shares, torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.25, 0.5, 0.25]]))
    assert found.embedding_share == 0.25
    torch.testing.assert_close(found.contributions[-1], torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(found.source_age, torch.tensor([0.0, 0.25, 1.0]))
    ages = mixing_map(perturbed("prenorm"), tokens()).source_age
    torch.testing.assert_close(ages, torch.arange(9) / 2)


# --- memory ---------------------------------------------------------------------------------------


@linear
def test_chunks_change_nothing(residual):
    model, ids = build(residual, dtype=torch.float64), tokens()
    whole = mixing_map(model, ids, per="channel", streams=True)
    cut = mixing_map(model, ids, per="channel", streams=True, chunk_bytes=1)
    assert torch.equal(whole.channels, cut.channels)
    assert all(map(torch.equal, whole.streams, cut.streams))
    torch.testing.assert_close(mixing_map(model, ids, chunk_bytes=10_000).matrix, whole.matrix)
    assert mixing_error(model, ids, chunk_bytes=1) <= 1e-10


class Largest(TorchDispatchMode):
    """The most bytes that any one operation has returned in fp64."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_of_a_mean_is_bounded():
    model, ids = toy(n_layer=20), tokens(4)
    budget = 2**17
    with Largest() as seen:
        mixing_map(model, ids, chunk_bytes=budget)
    everything = 41 * 41 * ids.numel() * 16 * 8
    assert 12 * 16 * 8 <= seen.bytes <= budget < everything / 50
    with Largest() as unbounded:
        mixing_map(model, ids)
    assert unbounded.bytes > seen.bytes


# --- the model is left alone ----------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@linear
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(residual, training):
    model, ids = build(residual).train(training), tokens()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(ids)
    random = torch.get_rng_state()
    first = mixing_map(model, ids)
    mixing_error(model, ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0 and torch.is_grad_enabled()
    assert all(module.training is training for module in model.modules())
    assert names == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    assert torch.equal(mixing_map(model, ids).matrix, first.matrix)


@pytest.mark.parametrize("name", ["gates", "forward", "streams"])
def test_hooks_are_gone_after_an_error(name, monkeypatch):
    model, ids = perturbed("mgr-competitive"), tokens()

    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(model.blocks[2].mlp_site, name, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        mixing_error(model, ids)
    assert hooks(model) == 0


def test_compiled_models_run_uncompiled():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model, ids = perturbed("mgr-competitive"), tokens()
    expected = mixing_map(model, ids).matrix
    assert torch.equal(mixing_map(torch.compile(model, backend=refuse), ids).matrix, expected)
    for block in model.blocks:
        block.compile(backend=refuse)
    assert torch.equal(mixing_map(model, ids).matrix, expected)
    assert mixing_error(model, ids) <= 1e-5


def test_nothing_of_the_compiler_is_imported():
    """It takes seconds, and a model that was never compiled needs none of it."""
    code = (
        "import sys, torch, depthmix; m = depthmix.GPT(depthmix.GPTConfig(8, 1, 8, 1, 8), seed=0); "
        "depthmix.mixing_map(m, torch.zeros(1, 4, dtype=torch.int64)); print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"


def test_autocast():
    """Streams and gates stay in fp32, so the identity holds as in fp32."""
    for name in ("prenorm", "mgr-competitive"):
        model, ids = perturbed(name), tokens()
        with torch.autocast("cpu", torch.bfloat16):
            assert mixing_error(model, ids) <= 1e-5
            found = mixing_map(model, ids)
        assert found.matrix.dtype == torch.float32


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", mixing.PER)
@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "toy"])
@pytest.mark.parametrize("streams", [True, False])
def test_save_and_load(residual, per, streams, tmp_path):
    found = mixing_map(build(residual), tokens(), per=per, streams=streams)
    path = found.save(tmp_path / "map.npz")
    again = MixingMap.load(path)
    for field in dataclasses.fields(MixingMap):
        a, b = getattr(found, field.name), getattr(again, field.name)
        if field.name == "streams" and a is not None:
            assert len(a) == len(b) and all(map(torch.equal, a, b))
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


def test_broken_files(tmp_path):
    path = tmp_path / "map.npz"
    with pytest.raises(ValueError, match=r"cannot read mixing map .*map\.npz"):
        MixingMap.load(path)
    whole = mixing_map(perturbed("prenorm"), tokens()).save(path).read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"map\.npz is no mixing map"):
            MixingMap.load(path)
    np.savez(path, matrix=np.eye(2))
    with pytest.raises(ValueError, match=r"map\.npz is no mixing map"):
        MixingMap.load(path)


# --- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(2, 5), r"whole numbers of shape \[B, T\].*float32 \[2, 5\]"),
        (torch.zeros(5, dtype=torch.int64), r"whole numbers of shape \[B, T\].*int64 \[5\]"),
        (torch.zeros(1, 2, 5, dtype=torch.int64), r"\[1, 2, 5\]"),
        (torch.zeros(2, 5, dtype=torch.bool), "bool"),
        (torch.zeros(0, 5, dtype=torch.int64), "not empty"),
        (torch.full((1, 3), 32), "ids must be from 0 to 31, got 32 to 32"),
        (torch.full((1, 3), -1), "ids must be from 0 to 31, got -1 to -1"),
        (torch.zeros(1, 13, dtype=torch.int64), "seq_len = 12"),
        ([[1, 2]], "tensor of whole numbers"),
    ],
)
@pytest.mark.parametrize("function", [mixing_map, mixing_error])
def test_wrong_ids(function, ids, message):
    model = perturbed("prenorm")
    with pytest.raises(ValueError, match=message):
        function(model, ids)
    assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_numbers_of_any_type(dtype):
    model, ids = perturbed("mgr-independent"), tokens()
    assert torch.equal(mixing_map(model, ids.to(dtype)).matrix, mixing_map(model, ids).matrix)


def test_other_wrong_requests():
    model, ids = perturbed("prenorm"), tokens()
    with pytest.raises(ValueError, match=r"unknown per 'tokens'.*'token'.*mean, token, channel"):
        mixing_map(model, ids, per="tokens")
    with pytest.raises(ValueError, match=r"model must be a depthmix\.GPT, .* got Linear"):
        mixing_map(nn.Linear(2, 2), ids)
    with torch.device("meta"):
        empty = GPT(model.config)
    with pytest.raises(ValueError, match="meta device"):
        mixing_map(empty, ids)


def test_connections_without_a_map_say_why():
    model = perturbed("prenorm")
    model.residual.not_linear = "its state passes through a norm, so it is not linear."
    for function in (mixing_map, mixing_error):
        with pytest.raises(ValueError) as error:
            function(model, tokens())
        assert str(error.value) == (
            "prenorm has no mixing map: its state passes through a norm, so it is not linear. "
            f"Connections that have one: {', '.join(residuals_with_map())}"
        )


@pytest.mark.parametrize("residual", [n for n in available_residuals() if n not in residuals_with_map()])
def test_registered_connections_without_a_map(residual):
    with pytest.raises(ValueError, match=f"{residual} has no mixing map: .*linear.*prenorm, mgr"):
        mixing_map(perturbed(residual), tokens())


def test_which_connections_have_a_map():
    without = {"siamese", "moda"}
    assert residuals_with_map() == [name for name in available_residuals() if name not in without]


def test_the_pages_example_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "mixing-map.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "mixing-map.md", "exec"), {})
    assert "torch.Size([13, 13, 4, 128])" in capsys.readouterr().out


def test_public_names():
    assert depthmix.mixing_map is mixing_map and depthmix.mixing_error is mixing_error
    assert depthmix.MixingMap is MixingMap
