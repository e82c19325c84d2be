"""A connection of depthmix against the same one of another package: time of forward and backward.

Both sides run a trunk of sublayers that cost next to nothing (``y = h * scale + shift``, fixed), so that what
is timed is the connection; MoDA's is one attention over a sequence and 16 depth sources. Where both
compute the same equations from the same parameters, outputs and gradients of the embedding are compared first, and
no time is taken of a pair that disagrees. The two take turns; figures are medians, ratios are
taken turn by turn. Needs the extra ``peers``.

    python benchmarks/peer_modules.py --out benchmarks/results/peer-modules-cpu.json
"""

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from tyro.conf import arg

from depthmix import GPTConfig, functional
from depthmix.bench.machine import machine
from depthmix.residuals import build_residual

SIZES = ((16, 128, 64), (4, 256, 256))
"""Sequences, tokens, D."""


@dataclass
class Options:
    """Time of a connection over that of another package's, forward and backward.

    Example: python benchmarks/peer_modules.py --pairs attnres hc --threads 2
    """

    pairs: tuple[str, ...] = ()
    """Which pairs. Default: all."""
    sublayers: int = 32
    """Sublayers of the trunk."""
    n_streams: int = 4
    """Parallel streams of the connections that have them."""
    rounds: int = 9
    """Timed turns of each side."""
    threads: Annotated[int, arg(help_behavior_hint="(default: all cores)")] = os.cpu_count() or 1
    """CPU threads."""
    out: Path | None = None
    """Write the figures here as JSON."""


@dataclass
class Pair:
    """Two ways to the same output: each takes ``x [B, T, D]`` and returns ``[B, T, D]``."""

    package: str
    other: str
    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    differs: str | None = None
    """Why the outputs are not the same by design; ``None`` where they must be."""


class Sublayers:
    """``y_l = h * scale_l + shift_l`` for l = 1 .. L, fixed."""

    def __init__(self, count: int, width: int):
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.randn(count, width, generator=generator) * 0.2
        self.shift = torch.randn(count, width, generator=generator)

    def __call__(self, index: int, h: Tensor) -> Tensor:
        return h * self.scale[index] + self.shift[index]

    def __len__(self) -> int:
        return len(self.scale)


def trunk(residual: str, width: int, sublayers: Sublayers, n_streams: int) -> Callable[[Tensor], Tensor]:
    """The connection of that name over ``sublayers``."""
    config = GPTConfig(16, len(sublayers) // 2, width, 1, 8, residual=residual, n_streams=n_streams)
    connection = build_residual(config)
    sites = nn.ModuleList(connection.site(i + 1) for i in range(len(sublayers)))

    def run(x: Tensor) -> Tensor:
        h, state = connection.begin(x)
        for i, site in enumerate(sites):
            h, state = site(sublayers(i, h), state)
        return connection.finish(h, state)

    run.parameters = [*connection.parameters(), *sites.parameters()]
    return run


def attnres(width: int, sublayers: Sublayers, n_streams: int) -> Pair:
    from fla.ops.attnres.naive import naive_attnres

    queries = nn.Parameter(torch.zeros(len(sublayers), width))
    weights = nn.Parameter(torch.ones(len(sublayers), width))

    def theirs(x: Tensor) -> Tensor:
        sources, h = [x], x
        for i in range(len(sublayers)):
            sources.append(sublayers(i, h))
            h = naive_attnres(queries[i], sources, weights[i])
        return h

    theirs.parameters = [queries, weights]
    return Pair("fla-core", "naive_attnres", trunk("attnres", width, sublayers, n_streams), theirs)


def _streams_of(modules: nn.ModuleList, sublayers: Sublayers, n_streams: int) -> Callable[[Tensor], Tensor]:
    """A trunk of the hyper-connections package: its streams are folded into the batch."""
    from hyper_connections import get_expand_reduce_stream_functions

    expand, reduce = get_expand_reduce_stream_functions(n_streams)

    def theirs(x: Tensor) -> Tensor:
        streams = expand(x)
        for i, module in enumerate(modules):
            h, write = module(streams)
            streams = write(sublayers(i, h))
        return reduce(streams)

    theirs.parameters = [*modules.parameters()]
    return theirs


def hc(width: int, sublayers: Sublayers, n_streams: int) -> Pair:
    from hyper_connections.hyper_connections import HyperConnections

    modules = nn.ModuleList(
        HyperConnections(n_streams, dim=width, layer_index=i) for i in range(len(sublayers))
    )
    theirs = _streams_of(modules, sublayers, n_streams)
    ours = trunk("hc:norm=rms", width, sublayers, n_streams)
    return Pair("hyper-connections", "HyperConnections", ours, theirs)


def mhc(width: int, sublayers: Sublayers, n_streams: int) -> Pair:
    from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections

    modules = nn.ModuleList(
        ManifoldConstrainedHyperConnections(n_streams, dim=width, layer_index=i)
        for i in range(len(sublayers))
    )
    return Pair(
        "hyper-connections",
        "ManifoldConstrainedHyperConnections",
        trunk("mhc", width, sublayers, n_streams),
        _streams_of(modules, sublayers, n_streams),
        differs="its coefficients come from each stream alone, ours from all n D numbers, as in the report",
    )


def mhc_transformers(width: int, sublayers: Sublayers, n_streams: int) -> Pair:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    config = DeepseekV4Config(hidden_size=width, hc_mult=n_streams, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
    modules = nn.ModuleList(DeepseekV4HyperConnection(config) for _ in range(len(sublayers)))
    with torch.no_grad():
        for k, module in enumerate(modules):
            module.fn.zero_()
            module.scale.fill_(0.01)
            pre, post, combine = module.base.split([n_streams, n_streams, n_streams**2])
            for gate in (pre, post):
                gate.fill_(-1.0)
                gate[k % n_streams] = 1.0
            combine.fill_(-8.0)
            combine[:: n_streams + 1] = 0.0

    def theirs(x: Tensor) -> Tensor:
        streams = x.unsqueeze(2).expand(-1, -1, n_streams, -1)
        for i, module in enumerate(modules):
            # A view of the flattened streams is taken inside.
            post, combine, h = module(streams.contiguous())
            y = sublayers(i, h)
            # As the decoder layer there does it.
            streams = post.unsqueeze(-1) * y.unsqueeze(2) + torch.matmul(combine.transpose(-1, -2), streams)
        return streams.sum(2)

    theirs.parameters = [*modules.parameters()]
    return Pair(
        "transformers", "DeepseekV4HyperConnection", trunk("mhc", width, sublayers, n_streams), theirs,
        # 1e-6 inside every one of its divisions: a few parts in a million per sublayer.
    )  # fmt: skip


def moda(width: int, sublayers: Sublayers, n_streams: int) -> Pair:
    from moda.kernels.moda_naive import moda_attention_naive

    depth, heads = 16, width // 32
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(2 * depth + 2, 1, 1, 1, 32, generator=generator) + 0.5

    def parts(x: Tensor) -> tuple[Tensor, ...]:
        """Query, key, value and the depth keys and values, each ``[B, H, T, 32]``."""
        heads_of_x = x.unflatten(-1, (heads, 32)).transpose(1, 2)
        return heads_of_x, *(heads_of_x * scale for scale in scales)

    def merge(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(-2)

    def ours(x: Tensor) -> Tensor:
        q, k, v, *depth_parts = parts(x)
        return merge(functional.depth_attention(q, k, v, depth_parts[:depth], depth_parts[depth:]))

    def theirs(x: Tensor) -> Tensor:
        q, k, v, *depth_parts = parts(x)
        keys, values = (
            torch.stack(half, 3).flatten(2, 3) for half in (depth_parts[:depth], depth_parts[depth:])
        )
        return merge(moda_attention_naive(q, k, v, keys, values, depth))

    ours.parameters = theirs.parameters = []
    return Pair("moda-attention", "moda_attention_naive", ours, theirs)


PAIRS = {"attnres": attnres, "hc": hc, "mhc": mhc, "mhc-transformers": mhc_transformers, "moda": moda}


def step(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the embedding; the parameters' gradients are computed and dropped."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(grad)
    for p in run.parameters:
        p.grad = None
    return y.detach(), x.grad


def disagreement(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def measure(name: str, size: tuple[int, int, int], options: Options) -> dict:
    """One row: milliseconds of both sides and their ratio. Raises ``ValueError`` when the sides disagree."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, *size)
    pair = PAIRS[name](size[-1], Sublayers(options.sublayers, size[-1]), options.n_streams)
    ours, theirs = step(pair.ours, x, grad), step(pair.theirs, x, grad)
    error = max(disagreement(a, b) for a, b in zip(ours, theirs, strict=True))
    if pair.differs is None and not error < 1e-4:
        raise ValueError(f"{name} at {size}: the two sides differ by {error:.2e}; no time is taken")
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(options.rounds):
        for side, run in (("ours", pair.ours), ("theirs", pair.theirs)):
            began = time.perf_counter()
            step(run, x, grad)
            times[side].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "pair": name,
        "package": f"{pair.package} {version(pair.package)}",
        "module": pair.other,
        "size": list(size),
        "ms": round(1e3 * statistics.median(times["ours"]), 1),
        "their_ms": round(1e3 * statistics.median(times["theirs"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "disagreement": None if pair.differs else float(f"{error:.2g}"),
        "differs": pair.differs,
    }


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    torch.set_num_threads(options.threads)
    results = {
        "command": shlex.join(["python", "benchmarks/peer_modules.py", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "sublayers": options.sublayers,
        "n_streams": options.n_streams,
        "rounds": options.rounds,
        "rows": [],
    }
    for size in SIZES:
        for name in options.pairs or PAIRS:
            row = measure(name, size, options)
            results["rows"].append(row)
            print(
                f"{name:<18}{size!s:<16}{row['ms']:>9.1f} ms {row['their_ms']:>9.1f} ms  {row['ratio']:.2f} x "
                f"{row['package']} {row['module']}"
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
