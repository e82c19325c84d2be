"""Replay repeats store to the last bit; saved bytes are counted exactly."""

import dataclasses

import pytest
import torch

from depthmix import GPT, GPTConfig
from depthmix.memory import saved_bytes
from depthmix.ops.replay import replay


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


def test_replay_function_recomputes_the_forward():
    anchor = torch.randn(5, 3, 8)
    steps = [(torch.randn(5, 8), torch.rand(5, 3)) for _ in range(4)]
    streams = replay(anchor, *(x for step in steps for x in step))
    s = anchor.double()
    for j, (y, beta) in enumerate(steps):
        s = s + beta.double().unsqueeze(-1) * (y.double().unsqueeze(1) - s)
        torch.testing.assert_close(streams[j].double(), s, rtol=1e-6, atol=1e-6)


def test_leaving_a_window_is_an_error_not_a_wrong_gradient():
    model = GPT(GPTConfig(64, 4, 32, 2, 16, n_streams=2, replay_window=4), seed=0)
    h, state = model.residual.begin(model.embed(torch.randint(0, 64, (1, 16))))
    for _ in range(2):
        h, state = model.blocks[0](h, state, model.rope_cos, model.rope_sin)
        if len(state) > 1:
            break
    with pytest.raises(RuntimeError, match="replay window was left before its last step"):
        h.sum().backward()


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
        # store: the streams entering every lerp and those leaving the last; replay: those entering a window.
        # The ramp's pool keeps the first of them in both.
        assert store - value == (lerps + 1 - -(-lerps // window)) * n * width * tokens * 4
