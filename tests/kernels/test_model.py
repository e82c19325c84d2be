"""Whole models on Triton kernels: losses and gradients of the torch operations; on a GPU also compiled and captured."""

import dataclasses

import pytest
import torch

from depthmix import GPT, GPTConfig

pytestmark = pytest.mark.kernels
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: Triton's interpreter is not compiled or captured"
)
STRATEGIES = ("store", "replay", "inversion")


def small(residual, **options):
    return GPTConfig(32, 3, 20, 2, 4, **dict(residual=residual, n_streams=3, replay_window=3) | options)


def run(config, device, kernels, monkeypatch, dtype=torch.float32, compiled=False, seed=0):
    """Loss and gradients of a model whose gates are away from rest."""
    monkeypatch.setenv("DEPTHMIX_KERNELS", kernels)
    model, g = GPT(config, seed=seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_site." in name:
                p.add_(0.5 * torch.randn(p.shape, generator=g))
    model.to(device, dtype)
    ids = torch.randint(0, config.vocab_size, (1, config.seq_len), generator=g).to(device)
    call = torch.compile(model, fullgraph=config.stream_memory != "inversion") if compiled else model
    loss = call(ids, ids.roll(1))[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(found, want, rtol):
    assert abs(found[0] - want[0]) <= rtol * abs(want[0])
    for name, gradient in want[1].items():
        error = (found[1][name].double() - gradient.double()).norm()
        assert error <= rtol * gradient.double().norm() + 1e-9, name


@pytest.mark.parametrize(
    "residual",
    [
        "mgr-independent",
        "mgr-competitive",
        "mgr-review",
        "attnres",
        "attnres-block:blocks=2",
        "highway",
        "review",
    ],
)
def test_kernels_are_the_torch_operations(residual, device, monkeypatch):
    want = run(small(residual), device, "torch", monkeypatch)
    assert_close(run(small(residual), device, "triton", monkeypatch), want, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_bit_identical_to_store(dtype, device, monkeypatch):
    config = small("mgr-competitive", stream_memory="store")
    loss, gradients = run(config, device, "triton", monkeypatch, dtype)
    again, found = run(
        dataclasses.replace(config, stream_memory="replay"), device, "triton", monkeypatch, dtype
    )
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_replay_of_36_blocks(dtype, n, device, monkeypatch):
    config = GPTConfig(256, 36, 256, 2, 64, n_streams=n, stream_memory="store")
    loss, gradients = run(config, device, "triton", monkeypatch, dtype)
    for memory in ("replay", "store"):  # and a second run gives the same bits
        again, found = run(
            dataclasses.replace(config, stream_memory=memory), device, "triton", monkeypatch, dtype
        )
        assert torch.equal(loss, again)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, found[name]), (memory, name)


@on_gpu
@pytest.mark.parametrize("residual", ["mgr-competitive", "attnres", "attnres-block:blocks=2", "highway"])
@pytest.mark.parametrize("stream_memory", STRATEGIES)
def test_compiled(residual, stream_memory, device, monkeypatch):
    torch._dynamo.reset()
    config = small(residual, stream_memory=stream_memory, d_model=64, seq_len=64)
    want = run(config, device, "triton", monkeypatch)
    assert_close(run(config, device, "triton", monkeypatch, compiled=True), want, rtol=1e-3)


@on_gpu
def test_training_and_decoding_in_cuda_graphs(device, monkeypatch):
    """What is captured once and replayed on other tokens is what runs without a graph."""
    monkeypatch.setenv("DEPTHMIX_KERNELS", "triton")
    model = GPT(small("mgr-competitive", d_model=64, seq_len=64), seed=0).to(device)
    batches = [torch.randint(0, 32, (2, 64), device=device) for _ in range(2)]

    def step(ids):
        model.zero_grad(set_to_none=False)
        loss = model(ids, ids.roll(1, 1))[1]
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batches[0])
    torch.cuda.current_stream().wait_stream(side)
    static, graph = batches[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    static.copy_(batches[1])
    graph.replay()
    found = captured.clone(), [p.grad.clone() for p in model.parameters()]
    want = step(batches[1]), [p.grad for p in model.parameters()]
    assert torch.equal(found[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], want[1], strict=True))

    static, graph = batches[0][:, :1].clone(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(static)
        with torch.cuda.graph(graph):
            captured = model(static)
        static.copy_(batches[1][:, :1])
        graph.replay()
        assert torch.equal(captured, model(batches[1][:, :1]))


@on_gpu
@pytest.mark.parametrize("stream_memory", STRATEGIES)
def test_autocast(stream_memory, device, monkeypatch):
    config = small("mgr-competitive", stream_memory=stream_memory, d_model=64, seq_len=64)
    with torch.autocast("cuda", torch.bfloat16):
        want = run(dataclasses.replace(config, stream_memory="store"), device, "torch", monkeypatch)
        found = run(config, device, "triton", monkeypatch)
    assert_close(found, want, rtol=0.02)  # products in bf16 around kernels in fp32
